"""Fixed-shape agreement between the ranks of a group: all proceed, or all raise the same error.

A rank that fails alone must not raise before a collective that the others enter. It tells its
failure in an all-gather of fixed shape instead; after it every rank holds the same numbers and
decides by a pure function of them. Free text (error messages, values) travels in a second
collective, only when there is a failure, which all ranks know by then. Integers and bytes only:
nothing that arrives here can execute code.

A group of None means this process alone: the same path without a collective.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ulysses_accel.distributed.collectives import gather_into
from ulysses_accel.errors import RankDisagreementError

MAX_TEXT = 4096
_MAGIC = 0x554C59


def agree(error: Exception | None, group: dist.ProcessGroup | None, what: str = "failed") -> None:
    """Raises on every rank if any rank has an error; returns on all of them otherwise.

    Args:
        error: this rank's failure or None.
        group: the ranks that must agree; None for this process alone.
        what: the predicate of the message, as in `rank 1 failed: OSError: disk is full`.

    Raises:
        RankDisagreementError: the same sentence on every rank, naming the ranks that failed.
    """
    data = bounded_utf8(describe_error(error)) if error is not None else b""
    sizes = [_size(values) for values in gather_ints([_MAGIC, len(data)], group)]
    if not any(sizes):
        return
    texts = gather_bytes(data, sizes, group)
    failed = {rank: text_of(text) for rank, text in enumerate(texts) if text}
    raise RankDisagreementError(failures(failed, group_ranks(group), what)) from error


def _size(values: Sequence[int]) -> int:
    if values[0] != _MAGIC or not 0 <= values[1] <= MAX_TEXT:
        raise RankDisagreementError(
            f"a rank sent {list(values)} where the length of a message was expected. "
            "Every rank must run the same version of ulysses_accel and the same program."
        )
    return values[1]


def same_everywhere(
    values: Mapping[str, int | str], group: dist.ProcessGroup | None, what: str
) -> None:
    """Checks that all ranks hold the same small set of values.

    Args:
        values: names and values, JSON-like; at most `MAX_TEXT` bytes as JSON.
        group: the ranks to compare; None for this process alone.
        what: what the values are, for the message.

    Raises:
        RankDisagreementError: some differ; the message names the fields and their values on each
            rank.
    """
    data = json.dumps(dict(values), sort_keys=True, separators=(",", ":"), default=str).encode()
    gathered = gather_ints([zlib.crc32(data), len(data)], group)
    if all(one == gathered[0] for one in gathered):
        return
    # The length decides on all ranks alike whether the texts can travel.
    if max(size for _, size in gathered) > MAX_TEXT:
        raise RankDisagreementError(
            f"{what} is not the same on all ranks (and too long to be compared here)."
        )
    texts = gather_bytes(data, [size for _, size in gathered], group)
    ranks = group_ranks(group)
    tables = [json.loads(text) for text in texts]
    names = sorted({name for table in tables for name in table})
    parts = []
    for name in names:
        each = {rank: json.dumps(table.get(name)) for rank, table in zip(ranks, tables)}
        if len(set(each.values())) > 1:
            parts.append(f"{name} is {by_value(each)}")
    raise RankDisagreementError(
        f"{what} is not the same on all ranks: {'; '.join(parts)}. Start every rank alike."
    )


def describe_error(error: BaseException) -> str:
    """Returns `Type: first lines of the message` of an exception, without a traceback."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def group_ranks(group: dist.ProcessGroup | None) -> list[int]:
    """Returns the global ranks of a group in group order; this process alone is `[its rank]`."""
    if group is None:
        return [dist.get_rank() if dist.is_initialized() else 0]
    return list(dist.get_process_group_ranks(group))


def wire_device(group: dist.ProcessGroup) -> torch.device:
    """Returns where tensors must lie to travel over the group: the host when its backend can, else
    this rank's GPU.
    """
    if "cpu:" in dist.get_backend_config(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def contact(group: dist.ProcessGroup) -> Iterator[None]:
    """Turns a backend's failure in a collective into an error that says what it means.

    Raises:
        RankDisagreementError: another rank is gone, or did not come.
    """
    try:
        yield
    except RuntimeError as error:
        raise RankDisagreementError(
            f"rank {dist.get_rank()} lost contact with the other ranks of {group_ranks(group)} "
            f"({_first_line(error)}). "
            "Another rank died, is stuck, or runs another program: look for the first error in the "
            "other ranks' logs."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def gather_ints(values: Sequence[int], group: dist.ProcessGroup | None) -> list[list[int]]:
    """Returns every rank's integers (the same number on each), in rank order: one all-gather."""
    if group is None:
        return [list(values)]
    mine = torch.tensor(values, dtype=torch.int64, device=wire_device(group))
    size = dist.get_world_size(group)
    everyone = torch.empty(size * len(values), dtype=torch.int64, device=mine.device)
    with contact(group):
        gather_into(everyone, mine, group=group)
    rows: list[list[int]] = everyone.view(size, len(values)).tolist()
    return rows


def gather_bytes(data: bytes, sizes: Sequence[int], group: dist.ProcessGroup | None) -> list[bytes]:
    """Returns every rank's bytes, whose lengths all ranks know already: one all-gather, padded to
    the longest.
    """
    if group is None:
        return [data]
    longest = max([*sizes, 1])
    rows = gather_ints(list(data.ljust(longest, b"\0")), group)
    return [bytes(row[:size]) for row, size in zip(rows, sizes)]


def bounded_utf8(text: str) -> bytes:
    """Returns the text's first `MAX_TEXT` bytes; never empty, so that a failure without a message
    is still told.
    """
    return (text or "unknown").encode(errors="replace")[:MAX_TEXT]


def text_of(data: bytes) -> str:
    """Returns the text of `bounded_utf8`; a character cut at the end is dropped."""
    return data.decode(errors="ignore")


def failures(failed: Mapping[int, str], ranks: Sequence[int], what: str) -> str:
    """Returns `rank 1 failed: A; ranks [2, 3] failed: B`: ranks with the same text together."""
    together: dict[str, list[int]] = {}
    for rank, text in failed.items():
        together.setdefault(text, []).append(ranks[rank])
    return "; ".join(f"{_ranks(own)} {what}: {text}" for text, own in together.items())


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {list(ranks)}"


def by_value(values: Mapping[int, Hashable]) -> str:
    """Returns `2 on ranks [0, 1], 4 on ranks [2]` for each rank's value."""
    together: dict[Hashable, list[int]] = {}
    for rank, value in values.items():
        together.setdefault(value, []).append(rank)
    return ", ".join(f"{value} on ranks {own}" for value, own in together.items())
