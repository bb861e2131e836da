"""Where the documents of a batch lie, from whatever the batch says about them.

In this order: `cu_seq_lens_q`, `seq_idx`, an attention mask that numbers its documents, and
positions that start over. A plain attention mask takes padding out of them. Works on the host: a
batch that lies on a device is read once here.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from ulysses_accel.errors import BatchError

Segment = tuple[int, int]
Rows = tuple[tuple[Segment, ...], ...]
T = TypeVar("T", bound=Hashable)
CUMULATIVE_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def document_starts(position_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Returns where a document begins: at the first counted token, and wherever positions do not go
    up by one.

    Args:
        position_ids: `[B, S]`.
        attention_mask: `[B, S]`, nonzero for tokens, zero for padding; None where there is no
            padding.

    Returns:
        `[B, S]` of bool, False on padding.
    """
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if attention_mask is None:
        return starts
    valid = attention_mask.to(torch.bool)
    starts[:, 1:] |= ~valid[:, :-1]
    return starts & valid


def find_documents(position_ids: Tensor, attention_mask: Tensor | None = None) -> Rows:
    """Returns each row's documents as (start, stop) pairs; a hole of padding inside a row ends a
    document.

    Args:
        position_ids: `[B, S]`, on the host.
        attention_mask: `[B, S]` or None, as for `document_starts`.

    Returns:
        One tuple for each row.
    """
    length = position_ids.shape[1]
    starts = document_starts(position_ids, attention_mask)
    ends = torch.ones_like(starts)
    ends[:, :-1] = starts[:, 1:]
    if attention_mask is not None:
        valid = attention_mask.to(torch.bool)
        ends[:, :-1] |= ~valid[:, 1:]
        ends &= valid
    rows = []
    for row_starts, row_ends in zip(starts, ends):
        first = row_starts.nonzero().flatten().tolist()
        last = row_ends.nonzero().flatten().tolist()
        rows.append(tuple((a, b + 1) for a, b in zip(first, last)))
    assert all(0 <= a < b <= length for row in rows for a, b in row)
    return tuple(rows)


def documents_from_lengths(cu_seq_lens: Sequence[int], length: int) -> tuple[Segment, ...]:
    """Returns one row's documents from cumulative lengths `[0, end of first, end of second, ...]`.

    Args:
        cu_seq_lens: as flash attention takes them; the last may lie before `length`, what follows
            is padding.
        length: tokens of the row.

    Raises:
        BatchError: the lengths do not start at 0, go down, or pass the end of the row.
    """
    bounds = [int(bound) for bound in cu_seq_lens]
    if (
        not bounds
        or bounds[0] != 0
        or bounds[-1] > length
        or any(a > b for a, b in pairwise(bounds))
    ):
        raise BatchError(
            f"cumulative document lengths {bounds[:8]}{'...' if len(bounds) > 8 else ''} do not "
            f"fit a row of {length} "
            f"tokens. They must start at 0, never go down, and end at {length} at most."
        )
    return tuple((a, b) for a, b in pairwise(bounds) if b > a)


def document_pieces(documents: Sequence[Segment], holes: Sequence[Segment]) -> list[list[Segment]]:
    """Returns what the holes leave of each document, both in order."""
    found: list[list[Segment]] = []
    first = 0
    for start, stop in documents:
        while first < len(holes) and holes[first][1] <= start:
            first += 1
        pieces, begin, index = [], start, first
        while index < len(holes) and holes[index][0] < stop:
            if holes[index][0] > begin:
                pieces.append((begin, holes[index][0]))
            begin, index = max(begin, holes[index][1]), index + 1
        if begin < stop:
            pieces.append((begin, stop))
        found.append(pieces)
    return found


def joined(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """Returns the same tokens in the fewest segments, in order."""
    found: list[Segment] = []
    for start, stop in sorted(segments):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return tuple(found)


def equal_neighbours(rules: Sequence[T]) -> tuple[tuple[slice, T], ...]:
    """Returns the runs of equal neighbours, each as a slice, with what they are."""
    found, start = [], 0
    for rule, group in groupby(rules):
        stop = start + len(list(group))
        found.append((slice(start, stop), rule))
        start = stop
    return tuple(found)


@dataclass(frozen=True)
class Documents:
    """The documents of a batch.

    Args:
        rows: for each row its documents as (start, stop).
        holes: for each row the padding inside of its documents as (start, stop); empty where no row
            has any.
        marked: whether something other than positions told the documents apart.
    """

    rows: Rows
    holes: Rows
    marked: bool

    def spans(self, length: int) -> Tensor:
        """Returns `[B, S]` of bool, on the host: whether a token lies in a document, or in a hole
        of one.
        """
        return _covered(self.rows, length)

    def token_mask(self, length: int) -> Tensor:
        """Returns `[B, S]` of bool, on the host: whether a token is one, rather than padding."""
        return (
            self.spans(length) & ~_covered(self.holes, length) if self.holes else self.spans(length)
        )

    def starts(self, length: int) -> Tensor:
        """Returns `[B, S]` of bool, on the host: whether a token is a document's first."""
        found = torch.zeros(len(self.rows), length, dtype=torch.bool)
        for row, segments in enumerate(self.rows):
            found[row, torch.tensor([start for start, _ in segments], dtype=torch.int64)] = True
        return found


def _covered(rows: Rows, length: int) -> Tensor:
    """Returns `[B, S]` of bool: whether a token lies in one of its row's segments."""
    change = torch.zeros(len(rows), length + 1, dtype=torch.int64)
    for row, segments in enumerate(rows):
        bounds = torch.tensor(segments, dtype=torch.int64).reshape(-1, 2)
        # The end of one is where the next may start, so both are counted.
        change[row].scatter_add_(0, bounds[:, 0], torch.ones_like(bounds[:, 0]))
        change[row].scatter_add_(0, bounds[:, 1], -torch.ones_like(bounds[:, 1]))
    return change.cumsum(1)[:, :length] > 0


def find_rows(
    batch: Mapping[str, Any], batch_size: int, length: int, prefix: str = ""
) -> Documents:
    """Returns the documents of a batch.

    Padding between tokens of one document is a hole in it; between documents, and at the ends, it
    belongs to none.

    Args:
        batch: may hold `cu_seq_lens_q` `[n]`, `seq_idx` `[B, S]`, `attention_mask` `[B, S]`, and
            `position_ids` `[B, S]`, `[1, S]` or `[k, B, S]`.
        batch_size: rows B.
        length: tokens S, before padding.
        prefix: of the mask's and the positions' names.

    Raises:
        BatchError: a mask that is not `[B, S]`, or cumulative lengths that don't fit the batch.
    """
    mask = _mask(
        batch.get(f"{prefix}attention_mask"), f"{prefix}attention_mask", batch_size, length
    )
    valid = torch.ones(batch_size, length, dtype=torch.bool) if mask is None else mask != 0
    ids = _document_ids(batch, mask, batch_size, length)
    if ids is not None:
        return _documents(ids, valid & (ids >= 0), "ids")
    positions = batch.get(f"{prefix}position_ids")
    if not isinstance(positions, Tensor):
        return _documents(
            torch.zeros(batch_size, length, dtype=torch.int64), valid, "ids", marked=False
        )
    if positions.ndim == 3 and positions.shape[1:] == (batch_size, length):
        # Four planes: transformers puts plain text positions first. Three: the first is time, which
        # stands still within an image and jumps behind it, so that only going down tells a new
        # document.
        return _documents(
            positions[0].detach().cpu(), valid, "positions" if positions.shape[0] == 4 else "time"
        )
    return _documents(
        _as_rows(positions, f"{prefix}position_ids", batch_size, length), valid, "positions"
    )


def _document_ids(
    batch: Mapping[str, Any], mask: Tensor | None, batch_size: int, length: int
) -> Tensor | None:
    """Returns a number for each token's document, negative for padding; None where the batch has no
    such numbers.
    """
    if batch.get("cu_seq_lens_q") is not None:
        ids = torch.full((1, length), -1)
        for number, (start, stop) in enumerate(
            _cumulative(batch["cu_seq_lens_q"], batch_size, length)
        ):
            ids[0, start:stop] = number
        return ids
    if isinstance(batch.get("seq_idx"), Tensor):
        return _as_rows(batch["seq_idx"], "seq_idx", batch_size, length)
    return mask if mask is not None and mask.numel() and int(mask.max()) > 1 else None


def _documents(numbers: Tensor, valid: Tensor, kind: str, marked: bool | None = None) -> Documents:
    found = [_row(own, tokens, kind) for own, tokens in zip(numbers, valid)]
    holes = tuple(gaps for _, gaps in found)
    return Documents(
        tuple(segments for segments, _ in found),
        holes if any(holes) else (),
        kind == "ids" if marked is None else marked,
    )


def _row(
    numbers: Tensor, valid: Tensor, kind: str
) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """Returns one row's documents and their holes.

    Args:
        numbers: `[S]`, by which two tokens with nothing but padding between are in one document or
            not.
        valid: `[S]` of bool, False for padding.
        kind: `ids`: equal numbers are one document; `positions`: the next number, or behind padding
            any greater one; `time`: a number that is not smaller, or behind padding any greater
            one.
    """
    index = valid.nonzero().flatten()
    if not index.numel():
        return (), ()
    left, right = index[:-1], index[1:]
    before, after, apart = numbers[left], numbers[right], right - left > 1
    if kind == "ids":
        new = before != after
    else:
        new = torch.where(
            apart, after <= before, after < before if kind == "time" else after != before + 1
        )
    seams = new.nonzero().flatten()
    starts = torch.cat([index[:1], right[seams]]).tolist()
    stops = torch.cat([left[seams], index[-1:]]).tolist()
    gaps = (apart & ~new).nonzero().flatten()
    holes = zip((left[gaps] + 1).tolist(), right[gaps].tolist())
    return tuple((start, last + 1) for start, last in zip(starts, stops)), tuple(holes)


def _mask(mask: Any, name: str, batch_size: int, length: int) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or tuple(mask.shape) != (batch_size, length):
        shape = (
            f"of shape {list(mask.shape)}"
            if isinstance(mask, Tensor)
            else f"that is a {type(mask).__name__}"
        )
        raise BatchError(
            f"the batch has {'an' if name[0] == 'a' else 'a'} {name} {shape}, but only a [batch, "
            "sequence] mask, here "
            f"[{batch_size}, {length}], can be sharded. Tell documents apart by position_ids that "
            "start over instead."
        )
    host = mask.detach().cpu()
    if host.is_floating_point() and not bool(((host == 0) | (host == 1)).all()):
        raise BatchError(
            f"the {name} has values other than 0 and 1. Give 1 for tokens and 0 for padding."
        )
    return host.to(torch.int64)


def _as_rows(tensor: Tensor, name: str, batch_size: int, length: int) -> Tensor:
    if (
        tensor.ndim not in (1, 2)
        or tensor.shape[-1] != length
        or tensor.numel() not in (length, batch_size * length)
    ):
        raise BatchError(
            f"'{name}' has shape {list(tensor.shape)}, but the batch's sequence is [{batch_size}, "
            f"{length}]. "
            "Give one number for each token."
        )
    return tensor.detach().cpu().reshape(-1, length).expand(batch_size, length)


def _cumulative(bounds: Any, batch_size: int, length: int) -> tuple[tuple[int, int], ...]:
    values = bounds.detach().cpu().flatten().tolist() if isinstance(bounds, Tensor) else bounds
    if not isinstance(values, (list, tuple)) or not all(
        isinstance(value, (int, float)) for value in values
    ):
        raise BatchError(
            f"cu_seq_lens_q is {bounds!r:.80}, but it should be the cumulative lengths of the "
            "row's documents, "
            "[0, end of first, end of second, ...]. Give them as a 1-D integer tensor."
        )
    if batch_size != 1:
        raise BatchError(
            f"cu_seq_lens_q describes one row of packed documents, but the batch has {batch_size} "
            "rows. "
            "Use batch size 1 with it, or position_ids that start over in each row."
        )
    return documents_from_lengths([int(value) for value in values], length)
