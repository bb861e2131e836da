"""Blocks of attention in their place: a tile's part of each tensor, and how its result joins the
others'.

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
    """Keys and values `[B, K, k, D]` of consecutive tokens of one rank, the first of which is its
    token `start`.
    """

    start: int
    key: Tensor
    value: Tensor

    def has(self, tile: Tile) -> bool:
        """Returns whether it has all keys that a tile sees."""
        first, stop = tile.seen_keys
        return self.start <= first and stop <= self.start + self.key.shape[2]


def query_views(tile: Tile, *tensors: Tensor) -> Tensors:
    """Returns the part of each tensor `[B, H, tokens, ...]` that a tile has; anti-causal tiles read
    backwards.

    A square in which query i sees the keys behind i is, without its last query and its first key,
    causal when both are read backwards.
    """
    if tile.shape == "anti_causal":
        return tuple(tensor[:, :, tile.q_start : tile.q_stop - 1].flip(2) for tensor in tensors)
    return tuple(tensor[:, :, tile.q_start : tile.q_stop] for tensor in tensors)


def key_views(tile: Tile, *tensors: Tensor) -> Tensors:
    """As `query_views`, for keys `[B, K, tokens, ...]`."""
    start, stop = tile.seen_keys
    views = tuple(tensor[:, :, start:stop] for tensor in tensors)
    return tuple(view.flip(2) for view in views) if tile.shape == "anti_causal" else views


def alibi_of(slopes: Tensor, tile: Tile, places: Tensors) -> Alibi:
    """Returns a tile's biases, from slopes `[H]` and the places of all queries `[s]` and keys `[s]`
    at hand.
    """
    queries, keys = places
    (own,), (others,) = query_views(tile, queries[None, None]), key_views(tile, keys[None, None])
    return Alibi(slopes, own[0, 0], others[0, 0])


def in_order(tile: Tile, *parts: Tensor) -> Tensors:
    """Returns a tile's results `[B, N, tokens, ...]` in the tokens' own order."""
    return tuple(part.flip(2) for part in parts) if tile.shape == "anti_causal" else parts


def add_parts(places: Tensors, parts: Tensors) -> None:
    """Adds each part to its place."""
    for place, part in zip(places, parts):
        place.add_(part)


def merge_softmax(places: Tensors, parts: Tensors) -> None:
    """Merges output `[B, H, q, D]` and log-sum-exp `[B, H, q]` over some keys into those over
    others, in place.
    """
    (out, lse), (part, part_lse) = places, parts
    part_lse = part_lse.to(lse.dtype)
    weight = (part_lse - lse).sigmoid_()
    torch.logaddexp(lse, part_lse, out=lse)
    out.lerp_(part.to(out.dtype), weight.unsqueeze(-1))


class Total:
    """What the parts of tiles come to; nothing is written before a part comes.

    A part that has all rows, and more tokens than came before, becomes the total itself. Where
    tokens have one part only it is copied, and a total that is one part keeps its dtype.

    Args:
        likes: for each tensor of the total one `[B, N, tokens, ...]` of its shape.
        dtype: to join parts in.
        groups: the rows that tiles are computed for together.
        join: joins parts to what came before, in place.
        empty: for each tensor the number that tokens without any part have.
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
        self._start, self._tensors = 0, ()  # type: tuple[int, Tensors]

    def add(self, rows: slice, start: int, *parts: Tensor) -> None:
        """Joins a tile's parts `[rows, N, tokens, ...]`, of the tokens from `start` on.

        Args:
            rows: one of the groups.
            start: first token.
            parts: one for each tensor of the total, for this object to keep.
        """
        start, stop = bounds = start, start + parts[0].shape[2]
        written = self._written[rows.start][1]
        seen = [(max(a, start), min(b, stop)) for a, b in written if a < stop and start < b]
        fresh = _gaps(seen, start, stop)
        if self._is_outgrown_by(start, parts):
            (self._start, self._tensors), (start, parts) = (
                (start, parts),
                (self._start, self._tensors),
            )
            fresh = []
        elif not self._spans(start, stop):
            self._hold_all()
        self._written[rows.start] = rows, joined([*written, bounds])
        for begin, end in fresh:
            places = self._views(rows, begin, end)
            for place, part in zip(places, parts):
                place.copy_(part[:, :, begin - start : end - start])
        if seen:
            self._to_joining_dtype()
        for begin, end in seen:
            there = tuple(part[:, :, begin - start : end - start] for part in parts)
            self._join(self._views(rows, begin, end), there)

    def whole(self) -> Tensors:
        """Returns the total of all tokens; it is not to be added to any more."""
        if not self._spans(0, self._likes[0].shape[2]):
            self._hold_all()
        for rows, start, stop in self._unwritten():
            for tensor, number in zip(self._views(rows, start, stop), self._empty):
                tensor.fill_(number)
        return self._tensors

    def add_to(self, places: Tensors) -> None:
        """Adds the total to `places` `[B, N, tokens, ...]`."""
        for rows, start, stop in self._ranges():
            for place, part in zip(places, self._views(rows, start, stop)):
                place[rows, :, start:stop].add_(part)

    def copy_to(self, places: Tensors) -> None:
        """Copies the total to `places` `[B, N, tokens, ...]`."""
        for rows, start, stop in self._ranges():
            for place, part in zip(places, self._views(rows, start, stop)):
                place[rows, :, start:stop].copy_(part)
        for rows, start, stop in self._unwritten():
            for place, number in zip(places, self._empty):
                place[rows, :, start:stop].fill_(number)

    def _is_outgrown_by(self, start: int, parts: Tensors) -> bool:
        if parts[0].shape[0] != self._likes[0].shape[0]:
            return False
        if not self._tensors:
            return True
        length, more = self._tensors[0].shape[2], parts[0].shape[2]
        return more > length and start <= self._start and self._start + length <= start + more

    def _spans(self, start: int, stop: int) -> bool:
        return (
            bool(self._tensors)
            and self._start <= start
            and stop <= self._start + self._tensors[0].shape[2]
        )

    def _hold_all(self) -> None:
        """Makes room for all tokens."""
        held = [(place, self._views(*place)) for place in self._ranges()] if self._tensors else []
        # Tokens before heads, as the kernels return it.
        shapes = [like.transpose(1, 2).shape for like in self._likes]
        rooms = [
            like.new_empty(shape, dtype=self._dtype) for like, shape in zip(self._likes, shapes)
        ]
        self._start, self._tensors = 0, tuple(room.transpose(1, 2) for room in rooms)
        for place, parts in held:
            for tensor, part in zip(self._views(*place), parts):
                tensor.copy_(part)

    def _to_joining_dtype(self) -> None:
        self._tensors = tuple(tensor.to(self._dtype) for tensor in self._tensors)

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
    """Returns what ordered segments inside of [start, stop) leave of it."""
    edges = [start, *(edge for segment in segments for edge in segment), stop]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2]) if a < b]
