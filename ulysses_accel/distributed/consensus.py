"""Agreement between the ranks of a group: all proceed, or all raise the same error.

A rank that fails alone must not raise before a collective that the other ranks enter. It reports
its failure in an all-gather of fixed shape instead, after which every rank has the same numbers and
decides by a pure function of them. Text (error messages, values) is gathered in a second
collective, only after a failure, which all ranks know of by then. Only integers and bytes are sent,
never pickles, so that nothing received can execute code.

A group of None means this process alone, without a collective.
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
        error: this rank's failure, or None.
        group: the ranks that must agree; None for this process alone.
        what: the predicate of the message: `failed` in `rank 1 failed: OSError: disk is full`.

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
        values: names and values, at most `MAX_TEXT` bytes as JSON.
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
    # The same decision on every rank, because all know the lengths.
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
        by_rank = {rank: json.dumps(table.get(name)) for rank, table in zip(ranks, tables)}
        if len(set(by_rank.values())) > 1:
            parts.append(f"{name} is {by_value(by_rank)}")
    raise RankDisagreementError(
        f"{what} is not the same on all ranks: {'; '.join(parts)}. Start every rank alike."
    )


def describe_error(error: BaseException) -> str:
    """Returns `Type: message` of an exception, on one line and without a traceback."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def group_ranks(group: dist.ProcessGroup | None) -> list[int]:
    """Returns the global ranks of a group in group order; this process alone is `[its rank]`."""
    if group is None:
        return [dist.get_rank() if dist.is_initialized() else 0]
    return list(dist.get_process_group_ranks(group))


def wire_device(group: dist.ProcessGroup) -> torch.device:
    """Returns the device of tensors for a group's collectives: the CPU where its backend supports
    that, otherwise this rank's GPU.
    """
    if "cpu:" in dist.get_backend_config(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def contact(group: dist.ProcessGroup) -> Iterator[None]:
    """Turns a backend's failure in a collective into an error that explains it.

    Raises:
        RankDisagreementError: another rank died, or did not enter the collective.
    """
    try:
        yield
    except RuntimeError as error:
        raise RankDisagreementError(
            f"rank {dist.get_rank()} lost contact with the other ranks of {group_ranks(group)} "
            f"({_first_line(error)}). Another rank died, is stuck, or runs another program: look "
            "for the first error in the other ranks' logs."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def gather_ints(values: Sequence[int], group: dist.ProcessGroup | None) -> list[list[int]]:
    """Returns every rank's integers, in rank order, by one all-gather; every rank passes the same
    number of them.
    """
    if group is None:
        return [list(values)]
    local = torch.tensor(values, dtype=torch.int64, device=wire_device(group))
    size = dist.get_world_size(group)
    gathered = torch.empty(size * len(values), dtype=torch.int64, device=local.device)
    # [n] -> [P * n]
    with contact(group):
        gather_into(gathered, local, group=group)
    rows: list[list[int]] = gathered.view(size, len(values)).tolist()
    return rows


def gather_bytes(data: bytes, sizes: Sequence[int], group: dist.ProcessGroup | None) -> list[bytes]:
    """Returns every rank's bytes, by one all-gather padded to the longest.

    Args:
        data: of this rank.
        sizes: number of bytes on each rank, which all ranks know.
        group: the ranks; None for this process alone.
    """
    if group is None:
        return [data]
    longest = max([*sizes, 1])
    rows = gather_ints(list(data.ljust(longest, b"\0")), group)
    return [bytes(row[:size]) for row, size in zip(rows, sizes)]


def bounded_utf8(text: str) -> bytes:
    """Returns the text's first `MAX_TEXT` bytes; never empty, so that a failure without a message
    is reported, too.
    """
    return (text or "unknown").encode(errors="replace")[:MAX_TEXT]


def text_of(data: bytes) -> str:
    """Returns the text of `bounded_utf8`, without an incomplete character at its end."""
    return data.decode(errors="ignore")


def failures(failed: Mapping[int, str], ranks: Sequence[int], what: str) -> str:
    """Returns `rank 1 failed: A; ranks [2, 3] failed: B`, ranks with the same text together.

    Args:
        failed: by rank of the group, the text.
        ranks: global rank of each rank of the group.
        what: the predicate, for example `failed`.
    """
    by_text: dict[str, list[int]] = {}
    for rank, text in failed.items():
        by_text.setdefault(text, []).append(ranks[rank])
    return "; ".join(f"{_ranks(members)} {what}: {text}" for text, members in by_text.items())


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {list(ranks)}"


def by_value(values: Mapping[int, Hashable]) -> str:
    """Returns `2 on ranks [0, 1], 4 on ranks [2]`, ranks with the same value together."""
    by_ranks: dict[Hashable, list[int]] = {}
    for rank, value in values.items():
        by_ranks.setdefault(value, []).append(rank)
    return ", ".join(f"{value} on ranks {members}" for value, members in by_ranks.items())
