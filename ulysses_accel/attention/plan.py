"""What one rank of a ring computes and exchanges for one batch: made once, used by every layer.

Shapes: R = ranks of the ring, s = S / R tokens on each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ulysses_accel.attention.tiles import Tile, tiles
from ulysses_accel.sequence import Rows, Segment
from ulysses_accel.sequence_layout import Layout, Run, runs

Range = tuple[int, int]


@dataclass(frozen=True)
class RingPlan:
    """The tiles between this rank's queries and every rank's keys, and which keys travel.

    Args:
        length: tokens S of the whole sequence.
        size: ranks R of the ring.
        rank: this one.
        layout: how tokens are dealt to the ranks.
        rows: each row's documents, in positions of the whole sequence.
        is_causal: whether a query sees only keys up to its own position.
        window: keys that a query sees, its own included; None for all.
    """

    length: int
    size: int
    rank: int
    layout: Layout
    rows: Rows
    is_causal: bool
    window: int | None = None

    @property
    def shard_length(self) -> int:
        """Tokens s on one rank."""
        return self.length // self.size

    @cached_property
    def row_groups(self) -> tuple[tuple[slice, tuple[Segment, ...]], ...]:
        """Rows of the batch that have the same documents and are computed together, with those documents."""
        if len(set(self.rows)) == 1:
            return ((slice(0, len(self.rows)), self.rows[0]),)
        return tuple((slice(row, row + 1), documents) for row, documents in enumerate(self.rows))

    def runs_of(self, rank: int) -> tuple[Run, ...]:
        """Returns the tokens that a rank holds."""
        return runs(self.length, self.size, rank, self.layout)

    def tiles_for(self, source: int) -> tuple[tuple[slice, tuple[Tile, ...]], ...]:
        """Returns this rank's tiles against the keys of rank `source`, for each group of rows."""
        return self._tiles[source]

    @cached_property
    def _tiles(self) -> tuple[tuple[tuple[slice, tuple[Tile, ...]], ...], ...]:
        own = self.runs_of(self.rank)
        return tuple(
            tuple(
                (rows, tiles(own, self.runs_of(source), documents, self.is_causal, self.window))
                for rows, documents in self.row_groups
            )
            for source in range(self.size)
        )

    def needed(self, reader: int, source: int) -> tuple[Range, ...]:
        """Returns the local key ranges of rank `source` that rank `reader` sees, one for each run, empty ones left out.

        Every rank computes the same answer for any pair, so that both sides of a transfer know its size.
        """
        found = []
        for run in self.runs_of(source):
            spans = [
                tile.seen_keys
                for documents in set(self.rows)
                for tile in tiles(self.runs_of(reader), (run,), documents, self.is_causal, self.window)
            ]
            if spans:
                found.append((min(start for start, _ in spans), max(stop for _, stop in spans)))
        return tuple(found)

    @cached_property
    def incoming(self) -> tuple[tuple[Range, ...], ...]:
        """For each other rank the key ranges that come from it; nothing from this rank itself."""
        return tuple(() if rank == self.rank else self.needed(self.rank, rank) for rank in range(self.size))

    @cached_property
    def outgoing(self) -> tuple[tuple[Range, ...], ...]:
        """For each other rank the key ranges that go to it."""
        return tuple(() if rank == self.rank else self.needed(rank, self.rank) for rank in range(self.size))

    @property
    def drops_late_half(self) -> bool:
        """Whether the second run of a rank is seen only by ranks below it, as in causal zigzag."""
        return self.layout == "zigzag" and self.is_causal and self.size > 1

    def carries_late_half(self, reader: int, hop: int) -> bool:
        """Whether the keys that reach rank `reader` at hop 1 to R - 1 still hold their second run.

        Keys rotate downwards. A rank's late tokens are seen only by lower ranks, so they stop at rank 0, and the
        passage from rank 0 up to the last rank carries the early half alone: 0.75 of the usual bytes.
        """
        return not self.drops_late_half or reader + hop < self.size

    def carried_length(self, reader: int, hop: int) -> int:
        """Tokens that reach rank `reader` at a hop."""
        return self.shard_length if self.carries_late_half(reader, hop) else self.shard_length // 2


def total_length(ranges: tuple[Range, ...]) -> int:
    """Tokens in all ranges together."""
    return sum(stop - start for start, stop in ranges)
