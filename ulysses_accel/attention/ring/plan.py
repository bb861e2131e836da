"""What one rank of a ring computes and exchanges for one batch: made once, used by every layer.

Shapes: R = ranks of the ring, s = S / R tokens on each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ulysses_accel.attention.ring.tiles import RowRule, Tile, check_window, joined_tiles, tiles
from ulysses_accel.sequence.description import SequenceDescription, visible_rows
from ulysses_accel.sequence.documents import Rows, Segment, equal_neighbours, joined
from ulysses_accel.sequence.layout import Layout, Run, runs


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
        window: with causal attention, keys that a query sees, its own included; without, how far
            away on either side they may be; None for all.
        holes: each row's padding inside of documents; empty where no row has any.
        prefixes: for each row and document how many of its first tokens all of its tokens see;
            empty for none.
        keys: with cross-attention, the sequence that is read, dealt over the same ring; None for
            self-attention.
    """

    length: int
    size: int
    rank: int
    layout: Layout
    rows: Rows
    is_causal: bool
    window: int | None = None
    holes: Rows = ()
    prefixes: tuple[tuple[int, ...], ...] = ()
    keys: SequenceDescription | None = None

    def __post_init__(self) -> None:
        check_window(self.window, self.is_causal)

    @classmethod
    def of(
        cls,
        description: SequenceDescription,
        rank: int,
        is_causal: bool,
        window: int | None = None,
        keys: SequenceDescription | None = None,
    ) -> RingPlan:
        """Returns the plan of one ring rank for a described batch.

        Args:
            description: of the batch, its layout and ring size included.
            rank: of the ring.
            is_causal: as for the plan.
            window: as for the plan.
            keys: as for the plan.
        """
        return cls(
            description.sequence_length,
            description.ring_size,
            rank,
            description.layout,
            description.rows,
            is_causal,
            window,
            description.holes,
            description.prefixes,
            keys,
        )

    @property
    def shard_length(self) -> int:
        """Tokens s on one rank."""
        return self.length // self.size

    @property
    def key_shard_length(self) -> int:
        """Tokens on one rank of the sequence that is read."""
        return self.shard_length if self.keys is None else self.keys.sequence_length // self.size

    @cached_property
    def row_rules(self) -> tuple[RowRule, ...]:
        """For each row which of its tokens see which."""
        seen = (None,) * len(self.rows) if self.keys is None else visible_rows(self.keys)
        return tuple(
            RowRule(
                documents,
                self.holes[row] if self.holes else (),
                self.prefixes[row] if self.prefixes else (),
                seen[row],
            )
            for row, documents in enumerate(self.rows)
        )

    @cached_property
    def row_groups(self) -> tuple[tuple[slice, RowRule], ...]:
        """Neighbouring rows of the batch that see alike and are computed together, with their
        rule.
        """
        return equal_neighbours(self.row_rules)

    def runs_of(self, rank: int) -> tuple[Run, ...]:
        """Returns the tokens that a rank holds."""
        return runs(self.length, self.size, rank, self.layout)

    def key_runs_of(self, rank: int) -> tuple[Run, ...]:
        """Returns the tokens that a rank holds of the sequence that is read."""
        if self.keys is None:
            return self.runs_of(rank)
        return runs(self.keys.sequence_length, self.size, rank, self.keys.layout)

    def places(self, source: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns the places `[S / R]` in the sequence of this rank's tokens and of those of rank
        `source`.
        """
        own, others = (
            torch.cat(
                [
                    torch.arange(run.start, run.start + run.count * run.step, run.step)
                    for run in found
                ]
            )
            for found in (self.runs_of(self.rank), self.runs_of(source))
        )
        return own.to(device), others.to(device)

    def tiles_for(self, source: int) -> tuple[tuple[slice, tuple[Tile, ...]], ...]:
        """Returns this rank's tiles against the keys of rank `source`, for each group of rows."""
        return self._tiles[source]

    @cached_property
    def _tiles(self) -> tuple[tuple[tuple[slice, tuple[Tile, ...]], ...], ...]:
        own = self.runs_of(self.rank)
        return tuple(
            tuple(
                (
                    rows,
                    joined_tiles(
                        tiles(own, self.key_runs_of(source), rule, self.is_causal, self.window)
                    ),
                )
                for rows, rule in self.row_groups
            )
            for source in range(self.size)
        )

    def needed(self, reader: int, source: int) -> tuple[Segment, ...]:
        """Returns the local key ranges of rank `source` that rank `reader` sees, in order and apart
        from each other.

        Every rank computes the same answer for any pair, so that both sides of a transfer know its
        size.
        """
        return joined(
            tile.seen_keys
            for rule in set(self.row_rules)
            for tile in tiles(
                self.runs_of(reader), self.key_runs_of(source), rule, self.is_causal, self.window
            )
        )

    @cached_property
    def incoming(self) -> tuple[tuple[Segment, ...], ...]:
        """For each other rank the key ranges that come from it; nothing from this rank itself."""
        return tuple(
            () if rank == self.rank else self.needed(self.rank, rank) for rank in range(self.size)
        )

    @cached_property
    def outgoing(self) -> tuple[tuple[Segment, ...], ...]:
        """For each other rank the key ranges that go to it."""
        return tuple(
            () if rank == self.rank else self.needed(rank, self.rank) for rank in range(self.size)
        )

    @property
    def drops_late_half(self) -> bool:
        """Whether the second run of a rank is seen only by ranks below it, as in causal zigzag
        without prefixes.
        """
        has_prefixes = any(any(lengths) for lengths in self.prefixes)
        return (
            self.layout == "zigzag"
            and self.is_causal
            and self.size > 1
            and not has_prefixes
            and self.keys is None
        )

    def carries_late_half(self, reader: int, hop: int) -> bool:
        """Whether the keys that reach rank `reader` at hop 1 to R - 1 still hold their second run.

        Keys rotate downwards. A rank's late tokens are seen only by lower ranks, so they stop at
        rank 0, and the passage from rank 0 up to the last rank carries the early half alone: 0.75
        of the usual bytes.
        """
        return not self.drops_late_half or reader + hop < self.size

    def carried_length(self, reader: int, hop: int) -> int:
        """Tokens that reach rank `reader` at a hop."""
        return (
            self.key_shard_length if self.carries_late_half(reader, hop) else self.shard_length // 2
        )


def total_length(ranges: tuple[Segment, ...]) -> int:
    """Tokens in all ranges together."""
    return sum(stop - start for start, stop in ranges)
