"""Which rectangles of scores one rank computes against another rank's keys: pure arithmetic, on the host.

A sequence is laid out over a ring in runs of equally spaced tokens. Between a run of queries and a run of keys, causal
attention within documents, with or without a window, is a set of tiles without any mask: full rectangles, causal
squares and (for the far edge of a window) anti-causal squares. Every visible pair of tokens is in exactly one tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ulysses_accel.errors import ConfigError
from ulysses_accel.sequence_layout import Run

Shape = Literal["full", "causal", "anti_causal"]


@dataclass(frozen=True)
class Tile:
    """Queries [q_start, q_stop) against keys [k_start, k_stop), in the ranks' local indices.

    Args:
        shape: `full`; `causal`: query i sees keys 0 to i of the square; `anti_causal`: it sees the keys behind i.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    shape: Shape

    @property
    def seen_keys(self) -> tuple[int, int]:
        """The keys that some query of the tile sees; an anti-causal square's first key is seen by none."""
        return (self.k_start + 1 if self.shape == "anti_causal" else self.k_start), self.k_stop

    @property
    def num_scores(self) -> int:
        """Visible pairs of tokens."""
        rows, columns = self.q_stop - self.q_start, self.k_stop - self.k_start
        if self.shape == "full":
            return rows * columns
        return rows * (rows + 1) // 2 if self.shape == "causal" else rows * (rows - 1) // 2


def tiles(
    queries: tuple[Run, ...],
    keys: tuple[Run, ...],
    documents: tuple[tuple[int, int], ...],
    is_causal: bool,
    window: int | None = None,
) -> tuple[Tile, ...]:
    """Returns the tiles of one row between one rank's queries and one rank's keys.

    Args:
        queries: runs of the rank that computes.
        keys: runs of the rank that the keys are from; spaced as the queries.
        documents: (start, stop) token positions; pairs from different documents see nothing of each other.
        is_causal: whether a query sees only keys up to its own position.
        window: with causal attention, how many keys a query sees, its own included; None for all.

    Raises:
        ConfigError: a window without causality.
    """
    if window is not None and not is_causal:
        raise ConfigError(f"window={window} without causal attention is not computed. Use window=None.")
    return tuple(
        tile
        for q_run in queries
        for k_run in keys
        for document in documents
        for tile in _document_tiles(q_run, k_run, document, is_causal, window)
    )


def _document_tiles(
    q_run: Run, k_run: Run, document: tuple[int, int], is_causal: bool, window: int | None
) -> Iterator[Tile]:
    qa, qb = q_run.indices_of(*document)
    ka, kb = k_run.indices_of(*document)
    if qa == qb or ka == kb:
        return
    if not is_causal:
        yield Tile(q_run.offset + qa, q_run.offset + qb, k_run.offset + ka, k_run.offset + kb, "full")
        return
    # Query index i sees key index j up to i + newest, and from i + oldest on.
    newest = (q_run.start - k_run.start) // q_run.step
    oldest = None if window is None else -(-(q_run.start - k_run.start - window + 1) // q_run.step)
    for tile in _band(qa, qb, ka, kb, newest, oldest):
        yield Tile(
            q_run.offset + tile.q_start,
            q_run.offset + tile.q_stop,
            k_run.offset + tile.k_start,
            k_run.offset + tile.k_stop,
            tile.shape,
        )


def _band(qa: int, qb: int, ka: int, kb: int, newest: int, oldest: int | None) -> Iterator[Tile]:
    """Tiles the pairs with i + oldest <= j <= i + newest, i in [qa, qb), j in [ka, kb)."""
    if oldest is None or qb - 1 + oldest <= ka:
        yield from _lower(qa, qb, ka, kb, newest)
        return
    width = newest - oldest + 1
    if width <= 0:
        return
    # Row blocks no taller than the window: below it, a block's old edge and its new edge can't share a key.
    for start in range(qa, qb, width):
        stop = min(start + width, qb)
        split = start + newest + 1
        # Keys that the block's first query sees already are cut at the old edge only, later ones at the new edge only.
        yield from _upper(start, stop, ka, min(kb, split), oldest)
        yield from _lower(start, stop, max(ka, split), kb, newest)


def _lower(qa: int, qb: int, ka: int, kb: int, newest: int) -> Iterator[Tile]:
    """Tiles the pairs with j <= i + newest: a rectangle, a causal square and the rectangle below it."""
    first = max(qa, ka - newest)
    last = min(qb, kb - newest)
    if first >= qb or ka >= kb:
        return
    if last <= first:
        yield Tile(first, qb, ka, kb, "full")
        return
    seam = first + newest
    if seam > ka:
        yield Tile(first, qb, ka, seam, "full")
    yield Tile(first, last, seam, last + newest, "causal")
    if last < qb:
        yield Tile(last, qb, seam, last + newest, "full")
        assert last + newest == kb


def _upper(qa: int, qb: int, ka: int, kb: int, oldest: int) -> Iterator[Tile]:
    """Tiles the pairs with j >= i + oldest: a rectangle, an anti-causal square and the rectangle above it."""
    # In terms of j > i + cut: query i of a square sees the keys behind it.
    cut = oldest - 1
    last = min(qb, kb - 1 - cut)
    first = max(qa, ka - cut)
    if ka >= kb or last <= qa:
        return
    if first > qa:
        yield Tile(qa, min(first, qb), ka, kb, "full")
    if first >= last:
        return
    square_stop = last + cut
    # Row i sees keys from i + cut + 1; the square's last column is excluded from its first row on by shape.
    if last - first > 1:
        yield Tile(first, last, first + cut, square_stop, "anti_causal")
    if square_stop < kb:
        yield Tile(first, last, square_stop, kb, "full")
