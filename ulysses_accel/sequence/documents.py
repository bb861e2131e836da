"""Where the documents of a batch lie, from whatever the batch says about them.

In this order: `cu_seq_lens_q`, `seq_idx`, an attention mask that numbers its documents, and
positions that start over. A plain attention mask takes padding out of them. Beside them a batch may
say, for prefix language modelling, how many of a document's first tokens all of its tokens see.
Works on the host: a batch that lies on a device is read once here.

A segment is `(start, stop)` in token positions of one row; a row's segments are in order.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ulysses_accel.errors import BatchError

Segment = tuple[int, int]
Rows = tuple[tuple[Segment, ...], ...]
Prefixes = tuple[tuple[int, ...], ...]
"""For each row and document the tokens of its prefix; empty where no document has one."""

Numbers = Literal["ids", "positions", "time"]
"""What the numbers of a row's tokens are, see `_row`."""

T = TypeVar("T", bound=Hashable)
PREFIX_KEY = "prefix_lengths"
CUMULATIVE_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass(frozen=True)
class Documents:
    """The documents of a batch.

    Args:
        length: tokens S of each row, before padding to a multiple.
        rows: for each row its documents.
        holes: for each row the padding inside of its documents; empty where no row has any.
        marked: whether something other than positions told the documents apart.
    """

    length: int
    rows: Rows
    holes: Rows = ()
    marked: bool = False

    @cached_property
    def spans(self) -> Tensor:
        """`[B, S]` of bool, on the host: whether a token lies in a document, its holes included."""
        return _covered(self.rows, self.length)

    @cached_property
    def token_mask(self) -> Tensor:
        """`[B, S]` of bool, on the host: whether a token is one, rather than padding."""
        if not self.holes:
            return self.spans
        return self.spans & ~_covered(self.holes, self.length)

    @cached_property
    def starts(self) -> Tensor:
        """`[B, S]` of bool, on the host: whether a token is a document's first."""
        starts = torch.zeros(len(self.rows), self.length, dtype=torch.bool)
        for row, segments in enumerate(self.rows):
            starts[row, torch.tensor([start for start, _ in segments], dtype=torch.int64)] = True
        return starts


def _covered(rows: Rows, length: int) -> Tensor:
    """Returns `[B, S]` of bool: whether a token lies in one of its row's segments."""
    change = torch.zeros(len(rows), length + 1, dtype=torch.int64)
    for row, segments in enumerate(rows):
        bounds = torch.tensor(segments, dtype=torch.int64).reshape(-1, 2)
        # The end of one is where the next may start, so both are counted.
        change[row].scatter_add_(0, bounds[:, 0], torch.ones_like(bounds[:, 0]))
        change[row].scatter_add_(0, bounds[:, 1], -torch.ones_like(bounds[:, 1]))
    return change.cumsum(1)[:, :length] > 0


def find_documents(
    batch: Mapping[str, Any], batch_size: int, length: int, key_prefix: str = ""
) -> Documents:
    """Returns the documents of a batch.

    Padding between tokens of one document is a hole in it; between documents, and at the ends, it
    belongs to none.

    Args:
        batch: may hold `cu_seq_lens_q` `[n]`, `seq_idx` `[B, S]`, `attention_mask` `[B, S]`, and
            `position_ids` `[B, S]`, `[1, S]` or `[k, B, S]`.
        batch_size: rows B.
        length: tokens S, before padding.
        key_prefix: of the mask's and the positions' names.

    Raises:
        BatchError: a mask that is not `[B, S]`, or cumulative lengths that don't fit the batch.
    """
    mask_name, positions_name = f"{key_prefix}attention_mask", f"{key_prefix}position_ids"
    mask = _mask(batch.get(mask_name), mask_name, batch_size, length)
    valid = torch.ones(batch_size, length, dtype=torch.bool) if mask is None else mask != 0
    ids = _document_ids(batch, mask, batch_size, length)
    if ids is not None:
        return _scan(ids, valid & (ids >= 0), "ids", marked=True)
    positions = batch.get(positions_name)
    if not isinstance(positions, Tensor):
        return _scan(torch.zeros(batch_size, length, dtype=torch.int64), valid, "ids")
    if positions.ndim == 3 and positions.shape[1:] == (batch_size, length):
        # Four planes: transformers puts plain text positions first. Three: the first is time, which
        # stands still within an image and jumps after it, so that only going down tells a new
        # document.
        kind: Numbers = "positions" if positions.shape[0] == 4 else "time"
        return _scan(positions[0].detach().cpu(), valid, kind)
    return _scan(_as_rows(positions, positions_name, batch_size, length), valid, "positions")


def documents_of_ids(document_ids: Tensor) -> Documents:
    """Returns the documents of rows that number each token's.

    Args:
        document_ids: `[B, S]`, on the host, equal for consecutive tokens of one document, negative
            for padding, which ends a document.
    """
    # Runs are numbered, so that the same id before and after padding is two documents.
    run_numbers = torch.zeros_like(document_ids, dtype=torch.int64)
    run_numbers[:, 1:] = (document_ids[:, 1:] != document_ids[:, :-1]).cumsum(1)
    return _scan(run_numbers, document_ids >= 0, "ids", marked=True)


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


def _scan(numbers: Tensor, valid: Tensor, kind: Numbers, marked: bool = False) -> Documents:
    """Returns the documents of rows of numbers `[B, S]`; see `_row`."""
    rows, holes = [], []
    for row_numbers, row_valid in zip(numbers, valid):
        segments, gaps = _row(row_numbers, row_valid, kind)
        rows.append(segments)
        holes.append(gaps)
    return Documents(numbers.shape[1], tuple(rows), tuple(holes) if any(holes) else (), marked)


def _row(
    numbers: Tensor, valid: Tensor, kind: Numbers
) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """Returns one row's documents and their holes.

    Args:
        numbers: `[S]`, by which two tokens with nothing but padding between are in one document or
            not.
        valid: `[S]` of bool, False for padding.
        kind: `ids`: equal numbers are one document; `positions`: the next number, or after padding
            any greater one; `time`: a number that is not smaller, or after padding any greater one.
    """
    tokens = valid.nonzero().flatten()
    if not tokens.numel():
        return (), ()
    left, right = tokens[:-1], tokens[1:]
    before, after, is_gap = numbers[left], numbers[right], right - left > 1
    if kind == "ids":
        is_new = before != after
    elif kind == "time":
        is_new = torch.where(is_gap, after <= before, after < before)
    else:
        is_new = torch.where(is_gap, after <= before, after != before + 1)
    seams = is_new.nonzero().flatten()
    starts = torch.cat([tokens[:1], right[seams]]).tolist()
    stops = (torch.cat([left[seams], tokens[-1:]]) + 1).tolist()
    gaps = (is_gap & ~is_new).nonzero().flatten()
    holes = zip((left[gaps] + 1).tolist(), right[gaps].tolist())
    return tuple(zip(starts, stops)), tuple(holes)


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


def _cumulative(bounds: Any, batch_size: int, length: int) -> tuple[Segment, ...]:
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


def find_prefixes(prefix_lengths: Any, rows: Rows, missing_is_zero: bool = False) -> Prefixes:
    """Returns for each row and document the tokens of its prefix; empty where no document has one.

    Args:
        prefix_lengths: `[B]` where each row is one document, or `[B, documents]`, zero after a
            row's last document: an integer tensor or a list. None where there are no prefixes.
        rows: the documents of each row.
        missing_is_zero: whether a row may name the prefixes of its first documents only.

    Raises:
        BatchError: the numbers don't fit the documents.
    """
    if prefix_lengths is None:
        return ()
    numbers = _plain_numbers(prefix_lengths)
    if len(numbers) != len(rows):
        raise BatchError(
            f"'{PREFIX_KEY}' has {len(numbers)} rows, the batch has {len(rows)}. Give [batch] or "
            "[batch, documents]."
        )
    prefixes = []
    for row, (lengths, documents) in enumerate(zip(numbers, rows)):
        if missing_is_zero:
            lengths = lengths + [0] * (len(documents) - len(lengths))
        prefixes.append(_prefixes_of_row(row, lengths, documents))
    return tuple(prefixes) if any(any(row) for row in prefixes) else ()


def _plain_numbers(prefix_lengths: Any) -> list[list[int]]:
    values = prefix_lengths
    if isinstance(values, Tensor):
        values = values.detach().cpu().tolist()
    if isinstance(values, (list, tuple)):
        nested = [list(value) if isinstance(value, (list, tuple)) else [value] for value in values]
        if all(type(number) is int for row in nested for number in row):
            return nested
    raise BatchError(
        f"'{PREFIX_KEY}' is {prefix_lengths!r:.80}, but it should be the number of tokens in each "
        "document's prefix. Give whole numbers, [batch] or [batch, documents]."
    )


def _prefixes_of_row(
    row: int, lengths: list[int], documents: tuple[Segment, ...]
) -> tuple[int, ...]:
    prefixes, rest = lengths[: len(documents)], lengths[len(documents) :]
    if len(prefixes) < len(documents) or any(rest):
        raise BatchError(
            f"'{PREFIX_KEY}' has {lengths} for row {row}, which has {len(documents)} documents. "
            "Give one number for each document, and 0 after the last."
        )
    for length, (start, stop) in zip(prefixes, documents):
        if not 0 <= length <= stop - start:
            raise BatchError(
                f"'{PREFIX_KEY}' has {length} for a document of row {row} with {stop - start} "
                f"tokens (from {start} on). Use 0 to {stop - start}."
            )
    return tuple(prefixes)


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
    all_pieces: list[list[Segment]] = []
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
        all_pieces.append(pieces)
    return all_pieces


def joined(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """Returns the same tokens in the fewest segments, in order."""
    union: list[Segment] = []
    for start, stop in sorted(segments):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(stop, union[-1][1]))
        else:
            union.append((start, stop))
    return tuple(union)


def equal_neighbours(values: Sequence[T]) -> tuple[tuple[slice, T], ...]:
    """Returns the runs of equal neighbours, each as a slice, with their value."""
    runs, start = [], 0
    for value, group in groupby(values):
        stop = start + len(list(group))
        runs.append((slice(start, stop), value))
        start = stop
    return tuple(runs)
