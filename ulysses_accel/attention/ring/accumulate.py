"""A tile's views of queries and keys, and the accumulation of tiles' results.

Shapes: B = rows, N = heads, D = head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ulysses_accel.attention.alibi import Alibi
from ulysses_accel.attention.ring.tiles import Tile
from ulysses_accel.sequence.documents import Segment, joined

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class KeyBlock:
    """Keys and values `[B, K, k, D]` of consecutive tokens of one rank, from its token `start`
    on.
    """

    start: int
    key: Tensor
    value: Tensor

    def has(self, tile: Tile) -> bool:
        """Returns whether it contains all keys that a tile sees."""
        first, stop = tile.seen_keys
        return self.start <= first and stop <= self.start + self.key.shape[2]


def query_views(tile: Tile, *tensors: Tensor) -> Tensors:
    """Returns a tile's part of each tensor `[B, H, tokens, ...]`, reversed for anti-causal tiles.

    A square in which query i sees the keys after i is, without its last query and its first key,
    causal when both are reversed.
    """
    if tile.shape == "anti_causal":
        return tuple(tensor[:, :, tile.q_start : tile.q_stop - 1].flip(2) for tensor in tensors)
    return tuple(tensor[:, :, tile.q_start : tile.q_stop] for tensor in tensors)


def key_views(tile: Tile, *tensors: Tensor) -> Tensors:
    """As `query_views`, for keys `[B, K, tokens, ...]`."""
    start, stop = tile.seen_keys
    views = tuple(tensor[:, :, start:stop] for tensor in tensors)
    return tuple(view.flip(2) for view in views) if tile.shape == "anti_causal" else views


def alibi_of(slopes: Tensor, tile: Tile, positions: Tensors) -> Alibi:
    """Returns a tile's biases.

    Args:
        slopes: `[H]`.
        tile: within this rank's queries and another rank's keys.
        positions: of these queries `[s]` and keys `[s]` in the sequence.
    """
    queries, keys = positions
    (tile_queries,) = query_views(tile, queries[None, None])
    (tile_keys,) = key_views(tile, keys[None, None])
    return Alibi(slopes, tile_queries[0, 0], tile_keys[0, 0])


def in_order(tile: Tile, *parts: Tensor) -> Tensors:
    """Returns a tile's results `[B, N, tokens, ...]` in the order of the sequence."""
    return tuple(part.flip(2) for part in parts) if tile.shape == "anti_causal" else parts


def add_parts(totals: Tensors, parts: Tensors) -> None:
    """Adds each part to its total, in place."""
    for total, part in zip(totals, parts):
        total.add_(part)


def merge_softmax(totals: Tensors, parts: Tensors) -> None:
    """Merges output `[B, H, q, D]` and log-sum-exp `[B, H, q]` over some keys into those over
    others, in place.
    """
    (out, lse), (part, part_lse) = totals, parts
    part_lse = part_lse.to(lse.dtype)
    weight = (part_lse - lse).sigmoid_()
    torch.logaddexp(lse, part_lse, out=lse)
    out.lerp_(part.to(out.dtype), weight.unsqueeze(-1))


class BlockSum:
    """The accumulated results of tiles; nothing is allocated before the first part.

    A part with all rows, and more tokens than all earlier parts, becomes the total itself. Tokens
    with a single part are copied, not added, and a total that is one part keeps its dtype.

    Args:
        likes: for each tensor of the total, one `[B, N, tokens, ...]` of its shape.
        dtype: to accumulate in.
        groups: the rows that tiles are computed for together.
        join: accumulates parts into the total of the same tokens, in place.
        empty: for each tensor, the value of tokens without any part.
    """

    def __init__(
        self,
        likes: Tensors,
        dtype: torch.dtype,
        groups: Sequence[slice],
        join: Callable[[Tensors, Tensors], None] = add_parts,
        empty: tuple[float, ...] = (0.0, 0.0),
    ) -> None:
        self._likes, self._dtype, self._join, self._empty = likes, dtype, join, empty
        self._written: dict[int, tuple[slice, tuple[Segment, ...]]] = {
            rows.start: (rows, ()) for rows in groups
        }
        # The tensors hold the tokens from `_start` on.
        self._start = 0
        self._tensors: Tensors = ()

    def add(self, rows: slice, start: int, *parts: Tensor) -> None:
        """Accumulates a tile's parts.

        Args:
            rows: one of the groups.
            start: first token of the parts.
            parts: `[rows, N, tokens, ...]` for each tensor of the total; may become the total
                itself, so the caller must not write to them.
        """
        start, stop = bounds = start, start + parts[0].shape[2]
        written = self._written[rows.start][1]
        seen = [(max(a, start), min(b, stop)) for a, b in written if a < stop and start < b]
        unseen = _gaps(seen, start, stop)
        if self._is_outgrown_by(start, parts):
            # The part becomes the total, and the total so far is accumulated into it.
            self._start, start = start, self._start
            self._tensors, parts = parts, self._tensors
            unseen = []
        elif not self._spans(start, stop):
            self._hold_all()
        self._written[rows.start] = rows, joined([*written, bounds])
        for begin, end in unseen:
            for total, part in zip(self._views(rows, begin, end), parts):
                total.copy_(part[:, :, begin - start : end - start])
        if seen:
            self._tensors = tuple(tensor.to(self._dtype) for tensor in self._tensors)
        for begin, end in seen:
            slices = tuple(part[:, :, begin - start : end - start] for part in parts)
            self._join(self._views(rows, begin, end), slices)

    def full(self) -> Tensors:
        """Returns the total of all tokens; no parts can be added after that."""
        if not self._spans(0, self._likes[0].shape[2]):
            self._hold_all()
        for rows, start, stop in self._unwritten():
            for tensor, value in zip(self._views(rows, start, stop), self._empty):
                tensor.fill_(value)
        return self._tensors

    def add_to(self, targets: Tensors) -> None:
        """Adds the total to tensors `[B, N, tokens, ...]`."""
        for rows, start, stop in self._ranges():
            for target, part in zip(targets, self._views(rows, start, stop)):
                target[rows, :, start:stop].add_(part)

    def copy_to(self, targets: Tensors) -> None:
        """Copies the total to tensors `[B, N, tokens, ...]`."""
        for rows, start, stop in self._ranges():
            for target, part in zip(targets, self._views(rows, start, stop)):
                target[rows, :, start:stop].copy_(part)
        for rows, start, stop in self._unwritten():
            for target, value in zip(targets, self._empty):
                target[rows, :, start:stop].fill_(value)

    def _is_outgrown_by(self, start: int, parts: Tensors) -> bool:
        """Whether parts have all rows, and all tokens that the total has so far."""
        if parts[0].shape[0] != self._likes[0].shape[0]:
            return False
        if not self._tensors:
            return True
        length, more = self._tensors[0].shape[2], parts[0].shape[2]
        return more > length and start <= self._start and self._start + length <= start + more

    def _spans(self, start: int, stop: int) -> bool:
        if not self._tensors:
            return False
        return self._start <= start and stop <= self._start + self._tensors[0].shape[2]

    def _hold_all(self) -> None:
        """Allocates tensors for all tokens, and copies the total so far into them."""
        held = []
        if self._tensors:
            held = [(bounds, self._views(*bounds)) for bounds in self._ranges()]
        tensors = []
        for like in self._likes:
            # Tokens before heads in memory, as the kernels return it.
            shape = like.transpose(1, 2).shape
            tensors.append(like.new_empty(shape, dtype=self._dtype).transpose(1, 2))
        self._start, self._tensors = 0, tuple(tensors)
        for bounds, parts in held:
            for tensor, part in zip(self._views(*bounds), parts):
                tensor.copy_(part)

    def _views(self, rows: slice, start: int, stop: int) -> Tensors:
        return tuple(
            tensor[rows, :, start - self._start : stop - self._start] for tensor in self._tensors
        )

    def _ranges(self) -> Iterator[tuple[slice, int, int]]:
        for rows, segments in self._written.values():
            for start, stop in segments:
                yield rows, start, stop

    def _unwritten(self) -> Iterator[tuple[slice, int, int]]:
        for rows, segments in self._written.values():
            for start, stop in _gaps(segments, 0, self._likes[0].shape[2]):
                yield rows, start, stop


def _gaps(segments: Sequence[Segment], start: int, stop: int) -> list[Segment]:
    """Returns the segments of [start, stop) that are in none of the ordered ones."""
    edges = [start, *(edge for segment in segments for edge in segment), stop]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2]) if a < b]
