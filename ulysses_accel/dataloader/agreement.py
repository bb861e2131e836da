"""The agreement on a batch: a header that each rank sends the others before any data moves, and
what all ranks conclude from the headers.

Fixed size, integers only. `check` is a pure function of all ranks' headers, so that every rank
comes to the same decision; `agree_on_batch` exchanges them and raises the same error everywhere
when the decision is a failure.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
import torch.distributed as dist

from ulysses_accel.distributed.consensus import (
    MAX_TEXT,
    bounded_utf8,
    by_value,
    failures,
    gather_bytes,
    gather_ints,
    group_ranks,
    text_of,
)
from ulysses_accel.errors import BatchError, RankDisagreementError

MAX_KEYS = 32
MAX_DIMS = 6
REPLICATED = -1

_MAGIC = 0x554C5901  # "UL", "Y", version of the header's layout
_FIXED = 8
_PER_KEY = 4 + MAX_DIMS
HEADER_SIZE = _FIXED + MAX_KEYS * _PER_KEY

DTYPES: tuple[torch.dtype, ...] = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)


class Status(IntEnum):
    """What a rank has to say about its next batch."""

    OK = 0
    END = 1
    ERROR = 2


class Verdict(IntEnum):
    """What all ranks do next; everything from `FAILED` on is an error."""

    PROCEED = 0
    END = 1
    FAILED = 2
    POSITIONS = 3
    UNEVEN = 4
    KEYS = 5
    CONTENT = 6
    DUPLICATE = 7


@dataclass(frozen=True)
class Entry:
    """One tensor of a batch: crc32 of its key, dtype, sharded dim (`REPLICATED` for none),
    shape.
    """

    key: int
    dtype: torch.dtype
    dim: int
    shape: tuple[int, ...]

    @property
    def kind(self) -> tuple[int, torch.dtype, int, int]:
        """What must be the same on all ranks even where shapes may differ."""
        return self.key, self.dtype, self.dim, len(self.shape)


@dataclass(frozen=True)
class Header:
    """What one rank tells the others before any data moves.

    Args:
        status: batch, end of data, or failure.
        position: micro-steps before this batch; ranks that resumed from different states differ
            here.
        is_last: the rank's loader says that no batch follows.
        checksum: of the batch's integer tensors, 0 when not computed.
        side_bytes: length of the description and the non-tensor entries, when they are to be sent.
        text_bytes: length of the text this rank would send if the decision is a failure.
        entries: the batch's tensors, ordered by `Entry.key`.
    """

    status: Status
    position: int = 0
    is_last: bool = False
    checksum: int = 0
    side_bytes: int = 0
    text_bytes: int = 0
    entries: tuple[Entry, ...] = ()

    def encode(self) -> list[int]:
        """Returns the header as `HEADER_SIZE` integers."""
        values = [
            _MAGIC,
            self.status,
            self.position,
            int(self.is_last),
            self.checksum,
            self.side_bytes,
        ]
        values += [self.text_bytes, len(self.entries)]
        for entry in self.entries:
            shape = entry.shape + (0,) * (MAX_DIMS - len(entry.shape))
            values += [entry.key, DTYPES.index(entry.dtype), entry.dim, len(entry.shape), *shape]
        return values + [0] * (HEADER_SIZE - len(values))


@dataclass(frozen=True)
class Decision:
    """The outcome of an agreement, the same on every rank.

    Args:
        verdict: proceed, end, or which failure.
        present: indices in the group of the ranks that have a batch.
        is_last: no batch follows this one.
    """

    verdict: Verdict
    present: tuple[int, ...] = ()
    is_last: bool = False


def key_code(name: str) -> int:
    """Returns the number that stands for a key's name in a header."""
    return zlib.crc32(name.encode())


def make_entries(
    tensors: Mapping[str, tuple[torch.dtype, int, tuple[int, ...]]],
) -> tuple[Entry, ...]:
    """Returns a batch's header entries, ordered by key code.

    Args:
        tensors: for each key its dtype, sharded dim (`REPLICATED` for none) and shape.

    Raises:
        BatchError: too many keys or dims, a dtype without a code, or two names with the same code.
    """
    if len(tensors) > MAX_KEYS:
        raise BatchError(
            f"the batch has {len(tensors)} tensors, the ranks' agreement has room for {MAX_KEYS}. "
            "Drop the keys that the model does not use in the collate function."
        )
    entries = []
    for name, (dtype, dim, shape) in tensors.items():
        if dtype not in DTYPES or len(shape) > MAX_DIMS:
            raise BatchError(
                f"'{name}' is a {dtype} tensor of shape {list(shape)}; a batch's tensors have at "
                f"most {MAX_DIMS} dims "
                "and an ordinary dtype. Convert it in the collate function."
            )
        entries.append(Entry(key_code(name), dtype, dim, tuple(shape)))
    if len({entry.key for entry in entries}) < len(entries):
        raise BatchError(
            f"two of the keys {sorted(tensors)} have the same crc32. Rename one of them."
        )
    return tuple(sorted(entries, key=lambda entry: entry.key))


def decode(values: Sequence[int]) -> Header:
    """Returns the header that `Header.encode` wrote.

    Raises:
        RankDisagreementError: the numbers are no header of this version.
    """
    try:
        if len(values) != HEADER_SIZE or values[0] != _MAGIC:
            raise ValueError(f"magic number {values[0] if values else None}")
        count = _bounded(values[7], 0, MAX_KEYS)
        entries = tuple(
            _decode_entry(values[_FIXED + i * _PER_KEY :][:_PER_KEY]) for i in range(count)
        )
        return Header(
            Status(values[1]),
            position=_bounded(values[2], 0, 2**62),
            is_last=bool(_bounded(values[3], 0, 1)),
            checksum=_bounded(values[4], 0, 2**32 - 1),
            side_bytes=_bounded(values[5], 0, 2**40),
            text_bytes=_bounded(values[6], 0, MAX_TEXT),
            entries=entries,
        )
    except ValueError as error:
        raise RankDisagreementError(
            f"a rank sent something else than a batch header ({error}). Every rank must run the "
            "same version of "
            "ulysses_accel and iterate the same data loaders in the same order."
        ) from error


def _bounded(value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise ValueError(f"{value} is not in {low}..{high}")
    return value


def _decode_entry(values: Sequence[int]) -> Entry:
    key, code, dim, ndim = values[:4]
    dtype = DTYPES[_bounded(code, 0, len(DTYPES) - 1)]
    ndim = _bounded(ndim, 0, MAX_DIMS)
    shape = tuple(_bounded(size, 0, 2**48) for size in values[4 : 4 + ndim])
    return Entry(_bounded(key, 0, 2**32 - 1), dtype, _bounded(dim, REPLICATED, ndim - 1), shape)


def check(
    headers: Sequence[Header],
    *,
    on_uneven: str = "error",
    same_batch: bool = False,
    distinct: bool = False,
) -> Decision:
    """Returns what all ranks do next: a pure function of what all of them said.

    Args:
        headers: of all ranks of the group, in rank order.
        on_uneven: what happens when some ranks are out of data: "error", "drop" (all stop) or "pad"
            (all go on).
        same_batch: all ranks must hold the same batch; otherwise each has another, and only keys
            and dtypes must match.
        distinct: equal content on all of several ranks is a failure.
    """
    present = tuple(rank for rank, header in enumerate(headers) if header.status is Status.OK)
    if any(header.status is Status.ERROR for header in headers):
        return Decision(Verdict.FAILED)
    if len({header.position for header in headers}) > 1:
        return Decision(Verdict.POSITIONS, present)
    if not present or (len(present) < len(headers) and on_uneven == "drop"):
        return Decision(Verdict.END)
    if len(present) < len(headers) and on_uneven != "pad":
        return Decision(Verdict.UNEVEN, present)
    verdict = _compare([headers[rank] for rank in present], same_batch, distinct)
    return Decision(verdict, present, is_last=any(headers[rank].is_last for rank in present))


def _compare(headers: Sequence[Header], same_batch: bool, distinct: bool) -> Verdict:
    first = headers[0]
    kinds = [[entry.kind for entry in header.entries] for header in headers]
    if any(kind != kinds[0] for kind in kinds):
        return Verdict.KEYS
    alike = all(
        header.checksum == first.checksum and header.entries == first.entries for header in headers
    )
    if same_batch:
        if any(header.entries != first.entries for header in headers):
            return Verdict.KEYS
        return Verdict.PROCEED if alike else Verdict.CONTENT
    return (
        Verdict.DUPLICATE
        if distinct and alike and first.checksum and len(headers) > 1
        else Verdict.PROCEED
    )


def agree_on_batch(
    header: Header,
    text: str,
    group: dist.ProcessGroup | None,
    *,
    on_uneven: str = "error",
    same_batch: bool = False,
    distinct: bool = False,
    cause: BaseException | None = None,
) -> tuple[Decision, list[Header]]:
    """Exchanges headers and returns the common decision, or raises the same error on every rank.

    Args:
        header: this rank's.
        text: this rank's error message, or its keys separated by ", "; sent only when the decision
            is a failure.
        group: the ranks that must agree; None for this process alone.
        on_uneven: as for `check`.
        same_batch: as for `check`.
        distinct: as for `check`.
        cause: this rank's exception, to be chained.

    Returns:
        The decision and all headers, in rank order.

    Raises:
        BatchError: at least one rank failed to produce a batch.
        RankDisagreementError: ranks ran out of data unevenly, or their batches don't belong
            together.
    """
    data = bounded_utf8(text)
    header = replace(header, text_bytes=len(data))
    headers = [decode(values) for values in gather_ints(header.encode(), group)]
    decision = check(headers, on_uneven=on_uneven, same_batch=same_batch, distinct=distinct)
    if decision.verdict >= Verdict.FAILED:
        texts = gather_bytes(data, [one.text_bytes for one in headers], group)
        raise explain(
            decision, headers, [text_of(one) for one in texts], group_ranks(group)
        ) from cause
    return decision, headers


def explain(
    decision: Decision, headers: Sequence[Header], texts: Sequence[str], ranks: Sequence[int]
) -> BatchError | RankDisagreementError:
    """Returns the error for a failed decision: the same sentence on every rank, naming global
    ranks.
    """
    if decision.verdict is Verdict.FAILED:
        failed = [rank for rank, header in enumerate(headers) if header.status is Status.ERROR]
        return BatchError(
            failures({rank: texts[rank] for rank in failed}, ranks, "failed to produce a batch")
        )
    present = [ranks[rank] for rank in decision.present]
    if decision.verdict is Verdict.UNEVEN:
        ended = [rank for rank in ranks if rank not in present]
        return RankDisagreementError(
            f"ranks {ended} ran out of batches while ranks {present} still have data "
            "(on_uneven='error'). "
            "Give every rank the same number of batches, or use on_uneven='drop' or 'pad'."
        )
    if decision.verdict is Verdict.POSITIONS:
        values = {rank: header.position for rank, header in zip(ranks, headers)}
        return RankDisagreementError(
            f"ranks of one sequence group are at different micro-steps: {by_value(values)}. "
            "Load the same loader state on all of them, and iterate on all of them."
        )
    if decision.verdict is Verdict.KEYS:
        return RankDisagreementError(
            _key_difference([texts[rank] for rank in decision.present], present)
        )
    sums = {ranks[rank]: f"{headers[rank].checksum:#010x}" for rank in decision.present}
    if decision.verdict is Verdict.DUPLICATE:
        return RankDisagreementError(
            f"ranks {present} drew the same first batch (checksum {sums[present[0]]}), though each "
            "rank should bring "
            "its own (same_batch=False). Use a DistributedSampler, same_batch=True, or "
            "allow_duplicates=True."
        )
    return RankDisagreementError(
        "ranks of one sequence group drew different batches (same_batch=True): checksum "
        f"{by_value(sums)}. "
        "Shard the loader over data parallel ranks only and seed its sampler and collate function "
        "alike on all ranks."
    )


def _key_difference(texts: Sequence[str], ranks: Sequence[int]) -> str:
    keys = [set(text.split(", ")) for text in texts]
    common = set.intersection(*keys)
    extra = {
        rank: ", ".join(sorted(local - common)) or "nothing more"
        for rank, local in zip(ranks, keys)
    }
    return (
        "ranks disagree on the tensors of a batch: besides what all have, there is "
        f"{by_value(extra)}. "
        "Return the same keys and dtypes from the collate function on every rank."
    )
