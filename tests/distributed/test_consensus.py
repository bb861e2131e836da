"""Agreement between ranks: the same sentence everywhere, and nothing but numbers on the wire."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.helpers.ranks import run_ranks
from ulysses_accel.dataloader.agreement import (
    DTYPES,
    HEADER_SIZE,
    MAX_DIMS,
    MAX_KEYS,
    Decision,
    Entry,
    Header,
    Status,
    Verdict,
    check,
    decode,
    explain,
    make_entries,
)
from ulysses_accel.distributed.consensus import (
    MAX_TEXT,
    agree,
    gather_bytes,
    gather_ints,
    same_everywhere,
)
from ulysses_accel.errors import BatchError, RankDisagreementError, UlyssesAccelError


def message_of(function: Any, *args: Any) -> str:
    """Returns `Type: message` of what the call raises, "" when it returns."""
    try:
        function(*args)
    except UlyssesAccelError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@st.composite
def headers(draw: st.DrawFn) -> Header:
    keys = draw(st.lists(st.integers(0, 2**32 - 1), unique=True, max_size=4))
    entries = []
    for key in sorted(keys):
        shape = tuple(draw(st.lists(st.integers(0, 2**31), max_size=MAX_DIMS)))
        entries.append(
            Entry(key, draw(st.sampled_from(DTYPES)), draw(st.integers(-1, len(shape) - 1)), shape)
        )
    return Header(
        draw(st.sampled_from(Status)),
        draw(st.integers(0, 2)),
        draw(st.booleans()),
        draw(st.integers(0, 2)),
        draw(st.integers(0, 2**30)),
        draw(st.integers(0, MAX_TEXT)),
        tuple(entries),
    )


@settings(max_examples=60, deadline=None)
@given(headers())
def test_a_header_survives_its_encoding(header: Header) -> None:
    values = header.encode()
    assert len(values) == HEADER_SIZE
    assert all(-(2**63) <= value < 2**63 for value in values)
    assert decode(torch.tensor(values, dtype=torch.int64).tolist()) == header


@settings(max_examples=60, deadline=None)
@given(
    headers(),
    st.lists(
        st.tuples(st.integers(0, HEADER_SIZE - 1), st.integers(-(2**63), 2**63 - 1)), max_size=3
    ),
)
def test_damaged_headers_are_headers_or_typed_errors(
    header: Header, damage: list[tuple[int, int]]
) -> None:
    values = header.encode()
    for place, value in damage:
        values[place] = value
    try:
        read = decode(values)
    except RankDisagreementError:
        return
    assert decode(read.encode()) == read


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40))
def test_random_numbers_are_no_header(values: list[int]) -> None:
    # Not by chance: hypothesis takes numbers from the source, so it does try the magic one.
    assume(values[:1] != Header(Status.OK).encode()[:1])
    with pytest.raises(RankDisagreementError):
        decode(values)
    with pytest.raises(RankDisagreementError):
        decode((values + [0] * HEADER_SIZE)[:HEADER_SIZE])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(headers(), min_size=1, max_size=4),
    st.sampled_from(["error", "drop", "pad"]),
    st.booleans(),
    st.booleans(),
)
def test_a_decision_follows_from_the_headers_alone(
    all_: list[Header], policy: str, same: bool, distinct: bool
) -> None:
    encoded = [header.encode() for header in all_]
    decisions = [
        check(
            [decode(values) for values in encoded],
            on_uneven=policy,
            same_batch=same,
            distinct=distinct,
        )
        for _ in all_
    ]
    assert len(set(decisions)) == 1
    decision = decisions[0]
    if decision.verdict >= Verdict.FAILED:
        error = explain(decision, all_, ["'a' int64"] * len(all_), range(len(all_)))
        assert isinstance(error, (BatchError, RankDisagreementError))
        assert "rank" in str(error)
    elif decision.verdict is Verdict.PROCEED:
        assert decision.present
    if any(header.status is Status.ERROR for header in all_):
        assert decision.verdict is Verdict.FAILED


def test_policies_for_a_rank_without_data() -> None:
    both = [Header(Status.OK), Header(Status.END)]
    assert check(both).verdict is Verdict.UNEVEN
    assert check(both, on_uneven="drop") == Decision(Verdict.END)
    assert check(both, on_uneven="pad") == Decision(Verdict.PROCEED, (0,))
    assert check([Header(Status.END)] * 2, on_uneven="pad") == Decision(Verdict.END)


def test_too_many_keys_and_strange_tensors_are_named() -> None:
    with pytest.raises(BatchError, match="33 tensors, the ranks' agreement has room for 32"):
        make_entries({f"k{i}": (torch.int64, -1, (1,)) for i in range(MAX_KEYS + 1)})
    with pytest.raises(BatchError, match=r"'x' is a torch\.int64 tensor of shape"):
        make_entries({"x": (torch.int64, -1, (1,) * (MAX_DIMS + 1))})
    with pytest.raises(BatchError, match="same crc32"):
        make_entries({"plumless": (torch.int64, -1, ()), "buckeroo": (torch.int64, -1, ())})


def test_one_process_agrees_with_itself() -> None:
    agree(None, None)
    same_everywhere({"sp_size": 2}, None, "the configuration")
    assert gather_ints([1, 2], None) == [[1, 2]]
    assert gather_bytes(b"ab", [2], None) == [b"ab"]
    assert (
        message_of(agree, OSError("disk is full"), None)
        == "RankDisagreementError: rank 0 failed: OSError: disk is full"
    )


def test_the_failure_of_one_rank_is_raised_on_all() -> None:
    def body() -> list[str]:
        rank, group = dist.get_rank(), dist.group.WORLD
        agree(None, group)
        return [
            message_of(
                agree, OSError("disk is full") if rank == 1 else None, group, "failed to save"
            ),
            message_of(agree, ValueError("x" * 9000 + "ä"), group),
            message_of(agree, KeyError() if rank else RuntimeError("a\nb"), group),
        ]

    first, second, third = (set(column) for column in zip(*run_ranks(body, 3)))
    assert first == {"RankDisagreementError: rank 1 failed to save: OSError: disk is full"}
    assert len(second) == 1
    assert len(second.pop()) < MAX_TEXT + 100
    assert third == {
        "RankDisagreementError: rank 0 failed: RuntimeError: a b; ranks [1, 2] failed: KeyError"
    }


def test_different_values_are_named_with_their_ranks() -> None:
    def body() -> list[str]:
        rank, group = dist.get_rank(), dist.group.WORLD
        same_everywhere({"sp_size": 2, "backend": "sdpa"}, group, "the configuration")
        differing: dict[str, int | str] = {"backend": "sdpa", "sp_size": 2 + 2 * (rank == 1)}
        if rank == 2:
            differing["extra"] = "on"
        return [
            message_of(same_everywhere, differing, group, "the configuration"),
            message_of(same_everywhere, {"long": "x" * (MAX_TEXT + rank)}, group, "the file list"),
        ]

    first, second = (set(column) for column in zip(*run_ranks(body, 3)))
    assert len(first) == len(second) == 1
    sentence = first.pop()
    assert "the configuration is not the same on all ranks" in sentence
    assert "sp_size is 2 on ranks [0, 2], 4 on ranks [1]" in sentence
    assert 'extra is null on ranks [0, 1], "on" on ranks [2]' in sentence
    assert "backend" not in sentence
    assert "the file list is not the same" in second.pop()


def test_agreement_in_a_group_names_global_ranks() -> None:
    def body() -> str:
        rank = dist.get_rank()
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        return message_of(agree, OSError("gone") if rank == 3 else None, groups[rank // 2])

    assert (
        run_ranks(body, 4) == ["", ""] + ["RankDisagreementError: rank 3 failed: OSError: gone"] * 2
    )
