"""The split of ranks into ring and Ulysses: legal, cheapest, and by the published formulas."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.helpers.sources import ROOT
from ulysses_accel.attention.heads import HeadSplit
from ulysses_accel.attention.ring.plan import RingPlan
from ulysses_accel.config.split_cost import (
    SplitRequest,
    candidates,
    choose_split,
    explain,
    length_multiple,
    refusal,
    ring_units,
    ulysses_units,
)
from ulysses_accel.errors import ConfigError
from ulysses_accel.sequence.layout import multiple_of

# Divides into any split that is drawn here.
LENGTH = 2 * math.lcm(*range(1, 17)) * 16


@st.composite
def requests(draw: st.DrawFn) -> SplitRequest:
    groups = draw(st.integers(1, 16))
    return SplitRequest(
        num_ranks=draw(st.integers(1, 32)),
        num_heads=groups * draw(st.integers(1, 8)),
        num_key_value_heads=groups,
        head_dim=draw(st.sampled_from((64, 128))),
        sequence_length=draw(
            st.none() | st.sampled_from((LENGTH, 4096, 1024)) | st.integers(1, 64)
        ),
        ranks_per_node=draw(st.sampled_from((1, 2, 4, 8, 6))),
        bandwidth_inside=draw(st.floats(1, 900)),
        bandwidth_between=draw(st.floats(1, 900)),
        is_causal=draw(st.booleans()),
        is_training=draw(st.booleans()),
        element_bytes=draw(st.sampled_from((2, 4, 8))),
    )


@given(requests())
def test_candidates_are_legal_and_complete(request: SplitRequest) -> None:
    divisors = [size for size in range(1, request.num_ranks + 1) if request.num_ranks % size == 0]
    legal = {
        (request.num_ranks // sp, sp)
        for sp in divisors
        if sp <= request.num_heads
        and (request.sequence_length or 0) % multiple_of(request.num_ranks // sp, "zigzag", sp) == 0
    }
    if not legal:
        with pytest.raises(
            ConfigError, match=r"no split of .* is legal.*Pad sequences to a multiple of"
        ):
            candidates(request)
        return
    found = candidates(request)
    assert {(split.cp_size, split.sp_size) for split in found} == legal
    for split in found:
        # The package itself deals these heads and tokens.
        heads = HeadSplit(split.sp_size, request.num_heads, request.num_key_value_heads)
        busiest = max(heads.counts(rank)[0] for rank in range(split.sp_size))
        assert split.head_excess == pytest.approx(busiest * split.sp_size / request.num_heads)
        assert length_multiple(split.cp_size, split.sp_size) == multiple_of(
            split.cp_size, "zigzag", split.sp_size
        )


@given(requests())
def test_the_choice_is_the_cheapest(request: SplitRequest) -> None:
    assume(
        any(
            refusal(request, cp, request.num_ranks // cp) is None
            for cp in _divisors(request.num_ranks)
        )
    )
    chosen, every = choose_split(request), candidates(request)
    assert chosen.reason
    assert dataclasses.replace(chosen, reason="") == every[0]
    for split in every:
        time = (
            split.bytes_inside / request.bandwidth_inside
            + split.bytes_between / request.bandwidth_between
        )
        assert split.seconds == pytest.approx(time / 1e9)
        assert chosen.seconds <= split.seconds
        assert min(split.bytes_inside, split.bytes_between) >= -1e-6
    lines = explain(request).splitlines()
    assert len(lines) == 3 + len(_divisors(request.num_ranks))
    assert lines[2].endswith("<-")
    assert lines[-1].startswith(f"cp_size={chosen.cp_size}, sp_size={chosen.sp_size}: ")


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


@given(requests())
def test_volumes_are_the_formulas(request: SplitRequest) -> None:
    """Ulysses by the messages of the heads as they are dealt, the ring by its hops as they are
    planned.
    """
    request = dataclasses.replace(request, sequence_length=LENGTH)
    assume(request.num_ranks <= 16)
    for split in candidates(request):
        size, ring = split.sp_size, split.cp_size
        heads = HeadSplit(size, request.num_heads, request.num_key_value_heads)
        counts = [heads.counts(rank) for rank in range(size)]
        # To each other rank its heads of q, k, v; and of the output back what this rank has.
        sent = [sum(sum(c) for c in counts) - sum(own) + own[0] * (size - 1) for own in counts]
        ulysses = Fraction(sum(sent), size) * (2 if request.is_training else 1)
        plans = RingPlan(2 * ring * 4, ring, 0, "zigzag", (((0, 8 * ring),),), request.is_causal)
        hops = sum(
            plans.carried_length(rank, hop) for rank in range(ring) for hop in range(1, ring)
        )
        keys = Fraction(hops, ring * plans.shard_length) * 2 * sum(c[1] for c in counts)
        # Keys forward, keys again and their gradients in float32 at least.
        passes = (
            2 + max(4, request.element_bytes) // request.element_bytes if request.is_training else 1
        )
        unit = LENGTH // request.num_ranks * request.head_dim * request.element_bytes
        expected = float((ulysses + keys * passes) * unit)
        assert split.bytes_inside + split.bytes_between == pytest.approx(expected, rel=1e-12)
        units = (
            ulysses_units(
                request.num_heads, request.num_key_value_heads, size, request.is_training
            ),
            0,
        )
        assert units[0] == pytest.approx(float(ulysses))
        assert ring_units(request, ring) == pytest.approx(float(keys * passes))


def request_of(
    num_heads: int, num_key_value_heads: int, num_ranks: int, per_node: int = 8
) -> SplitRequest:
    return SplitRequest(
        num_ranks, num_heads, num_key_value_heads, 128, LENGTH, per_node, 400.0, 50.0
    )


def test_published_volumes() -> None:
    """The table of research on H = 64, K = 8 and of MHA, in u; gradients as wide as what
    travels.
    """
    narrow = {"element_bytes": 4}
    for heads, groups, ranks, ulysses, ring in (
        (64, 8, 4, 108, 36),
        (64, 8, 8, 126, 84),
        (32, 32, 8, 112, 336),
    ):
        request = dataclasses.replace(request_of(heads, groups, ranks), **narrow)
        assert ulysses_units(heads, groups, ranks, is_training=False) == ulysses
        assert ulysses_units(heads, groups, ranks) == 2 * ulysses
        assert ring_units(dataclasses.replace(request, is_training=False), ranks) == ring
        assert ring_units(request, ranks) == 3 * ring
    full = dataclasses.replace(request_of(64, 8, 8), is_causal=False, is_training=False)
    assert [ulysses_units(64, 8, 8 // cp, False) + ring_units(full, cp) for cp in (1, 2, 4, 8)] == [
        126,
        124,
        120,
        112,
    ]


@given(
    st.integers(1, 64),
    st.sampled_from((1, 2, 4, 8)),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from((2, 4)),
)
def test_full_heads_on_one_node_take_ulysses(
    heads: int, ranks: int, nodes: int, is_causal: bool, element_bytes: int
) -> None:
    assume(heads >= ranks)
    request = SplitRequest(
        ranks,
        heads,
        heads,
        64,
        LENGTH,
        ranks * nodes,
        100.0,
        10.0,
        is_causal,
        element_bytes=element_bytes,
    )
    chosen = choose_split(request)
    assert (chosen.cp_size, chosen.sp_size, chosen.bytes_between) == (1, ranks, 0)


def test_equal_bytes_go_to_the_even_heads_and_then_to_ulysses() -> None:
    # Forward alone, on two ranks, without dropped halves: 2 (H + K) / 2 = 2 K.
    forward = dataclasses.replace(request_of(4, 4, 2), is_training=False, is_causal=False)
    assert len({split.seconds for split in candidates(forward)}) == 1
    assert choose_split(forward).sp_size == 2
    assert (
        choose_split(dataclasses.replace(forward, num_heads=3, num_key_value_heads=3)).sp_size == 1
    )
    assert choose_split(dataclasses.replace(forward, is_causal=True)).sp_size == 1


@given(st.sampled_from((1, 2, 4, 8)), st.sampled_from((8, 16)), st.sampled_from((2, 4)))
def test_few_key_heads_across_nodes_take_a_ring_between_them(
    groups: int, ratio: int, nodes: int
) -> None:
    request = request_of(groups * ratio * 8 // min(8, groups), groups, 8 * nodes)
    chosen = choose_split(request)
    assert chosen.cp_size >= nodes
    # Only the ring leaves the node: heads are exchanged inside.
    unit = LENGTH / request.num_ranks * request.head_dim * request.element_bytes
    assert chosen.bytes_between == pytest.approx(ring_units(request, chosen.cp_size) * unit)


@pytest.mark.parametrize(
    ("ranks", "per_node", "sp", "share"),
    # Peers outside of the worst-placed rank's node, of all peers.
    [
        (8, 8, 8, 0),
        (16, 8, 8, 0),
        (16, 8, 16, 8 / 15),
        (4, 1, 4, 1),
        (12, 8, 4, 0),
        (6, 4, 3, 1),
        (6, 4, 6, 4 / 5),
    ],
)
def test_placement(ranks: int, per_node: int, sp: int, share: float) -> None:
    request = request_of(24, 24, ranks, per_node)
    (split,) = [split for split in candidates(request) if split.sp_size == sp]
    unit = LENGTH / ranks * 128 * 2
    ring = ring_units(request, ranks // sp) if ranks > per_node else 0
    assert split.bytes_between / unit == pytest.approx(ulysses_units(24, 24, sp) * share + ring)


def test_one_rank_and_one_choice() -> None:
    assert choose_split(request_of(4, 4, 1)).reason == "one rank holds the whole sequence"
    only = choose_split(request_of(1, 1, 7))
    assert (only.cp_size, only.sp_size, only.reason) == (7, 1, "a ring alone: the only legal split")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_ranks": 0}, "num_ranks=0 must be above 0"),
        ({"bandwidth_between": -1.0}, "bandwidth_between=-1.0 must be above 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_heads=8"),
    ],
)
def test_illegal_requests(change: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(request_of(8, 8, 2), **change)


def test_planning_does_not_import_torch() -> None:
    code = "import sys, ulysses_accel.config.split_cost; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
