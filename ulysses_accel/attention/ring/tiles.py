"""Which blocks of scores one rank computes with another rank's keys: arithmetic on integers.

A sequence is distributed over a ring in runs of equally spaced tokens. Between a run of queries and
a run of keys, attention within documents (causal or not, with or without a window, around padding,
with prefixes) and between two sequences is a set of tiles that need no mask: full rectangles,
causal squares and (for a window's far edge) anti-causal squares. Every visible pair of tokens is in
exactly one tile. Adjacent tiles are joined, because each kernel call costs a merge of its result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from ulysses_accel.errors import ConfigError
from ulysses_accel.sequence.documents import Segment, document_pieces, joined
from ulysses_accel.sequence.layout import Run

Shape = Literal["full", "causal", "anti_causal"]
Edges = tuple[int | None, int | None]


@dataclass(frozen=True)
class Tile:
    """Queries [q_start, q_stop) against keys [k_start, k_stop), in the ranks' local indices.

    Args:
        shape: `full`; `causal`: query i sees keys 0 to i of the square; `anti_causal`: it sees the
            keys after i.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    shape: Shape

    @property
    def seen_keys(self) -> tuple[int, int]:
        """The keys that some query of the tile sees: all but an anti-causal square's first one."""
        first = self.k_start + 1 if self.shape == "anti_causal" else self.k_start
        return first, self.k_stop

    @property
    def num_scores(self) -> int:
        """The number of visible pairs of tokens."""
        rows, columns = self.q_stop - self.q_start, self.k_stop - self.k_start
        if self.shape == "full":
            return rows * columns
        return rows * (rows + 1) // 2 if self.shape == "causal" else rows * (rows - 1) // 2

    def moved(self, queries: int, keys: int) -> Tile:
        """Returns the tile shifted by that many queries and keys."""
        return Tile(
            self.q_start + queries,
            self.q_stop + queries,
            self.k_start + keys,
            self.k_stop + keys,
            self.shape,
        )


@dataclass(frozen=True)
class RowRule:
    """Which tokens of one row see which.

    Args:
        documents: (start, stop) token positions; tokens of different documents don't see each
            other.
        holes: (start, stop) positions of padding inside of documents.
        prefixes: for each document, the number of its first tokens that all of its tokens see;
            empty for none.
        seen: with cross-attention, the (start, stop) positions of the keys' sequence that all
            tokens see; None for self-attention.
    """

    documents: tuple[Segment, ...]
    holes: tuple[Segment, ...] = ()
    prefixes: tuple[int, ...] = ()
    seen: tuple[Segment, ...] | None = None


def tiles(
    queries: tuple[Run, ...],
    keys: tuple[Run, ...],
    rule: RowRule | tuple[Segment, ...],
    is_causal: bool,
    window: int | None = None,
) -> tuple[Tile, ...]:
    """Returns the tiles of one row between one rank's queries and one rank's keys.

    Args:
        queries: runs of the rank that computes.
        keys: runs of the rank that the keys are from; spaced as the queries, but for
            cross-attention.
        rule: which tokens see which; or only its documents.
        is_causal: whether a query sees only keys up to its position.
        window: with causal attention, the number of keys that a query sees, its position included;
            without, the largest distance on either side; None for all.

    Raises:
        ConfigError: a window that leaves a token nothing to see.
    """
    check_window(window, is_causal)
    if not isinstance(rule, RowRule):
        rule = RowRule(rule)
    pieces = document_pieces(rule.documents, rule.holes)
    if rule.seen is not None:
        visible = joined(piece for document in pieces for piece in document)
        return tuple(_cross_tiles(queries, keys, visible, rule.seen))
    prefixes = rule.prefixes if is_causal and rule.prefixes else (0,) * len(pieces)
    result: list[Tile] = []
    for q_run, k_run in product(queries, keys):
        edges = _edges(q_run, k_run, is_causal, window)
        for (start, _), document, prefix in zip(rule.documents, pieces, prefixes):
            result += _document_tiles(q_run, k_run, document, start + prefix, edges)
    return tuple(result)


def _cross_tiles(
    queries: tuple[Run, ...],
    keys: tuple[Run, ...],
    q_segments: Iterable[Segment],
    k_segments: Iterable[Segment],
) -> Iterator[Tile]:
    """Yields the rectangles of cross-attention between visible tokens."""
    segments = list(product(q_segments, k_segments))
    for q_run, k_run in product(queries, keys):
        for q_segment, k_segment in segments:
            if _meet(q_run, k_run, q_segment, k_segment):
                yield _rectangle(q_run, k_run, q_segment, k_segment)


def check_window(window: int | None, is_causal: bool) -> None:
    """Refuses a window in which a token sees nothing, not even itself.

    Raises:
        ConfigError: it is too small.
    """
    if window is not None and window < int(is_causal):
        raise ConfigError(
            f"window={window} leaves a token nothing to see. Use {int(is_causal)} or more, or "
            "window=None for all."
        )


def _meet(q_run: Run, k_run: Run, queries: Segment, keys: Segment) -> bool:
    """Returns whether the runs have tokens in both segments."""
    (qa, qb), (ka, kb) = q_run.indices_of(*queries), k_run.indices_of(*keys)
    return qa < qb and ka < kb


def _rectangle(q_run: Run, k_run: Run, queries: Segment, keys: Segment) -> Tile:
    (qa, qb), (ka, kb) = q_run.indices_of(*queries), k_run.indices_of(*keys)
    return Tile(q_run.offset + qa, q_run.offset + qb, k_run.offset + ka, k_run.offset + kb, "full")


def _edges(q_run: Run, k_run: Run, is_causal: bool, window: int | None) -> Edges:
    """Returns (newest, oldest): query index i sees the key indices from i + oldest to i + newest;
    None for no edge.
    """
    distance, step = q_run.start - k_run.start, q_run.step
    if is_causal:
        return distance // step, None if window is None else -(-(distance - window + 1) // step)
    if window is None:
        return None, None
    return (distance + window) // step, -(-(distance - window) // step)


def _document_tiles(
    q_run: Run, k_run: Run, pieces: list[Segment], prefix_stop: int, edges: Edges
) -> Iterator[Tile]:
    """Yields the tiles of one document: all queries see the keys before `prefix_stop`, and those
    within the edges.
    """
    newest, oldest = edges
    for (q_start, q_stop), (k_start, k_stop) in product(pieces, pieces):
        queries = (q_start, q_stop)
        seen_by_all = (k_start, min(k_stop, prefix_stop) if newest is not None else k_stop)
        if _meet(q_run, k_run, queries, seen_by_all):
            yield _rectangle(q_run, k_run, queries, seen_by_all)
        if newest is None:
            continue
        qa, qb = q_run.indices_of(*queries)
        ka, kb = k_run.indices_of(max(k_start, prefix_stop), k_stop)
        if qa < qb and ka < kb:
            for tile in _band(qa, qb, ka, kb, newest, oldest):
                yield tile.moved(q_run.offset, k_run.offset)


def _band(qa: int, qb: int, ka: int, kb: int, newest: int, oldest: int | None) -> Iterator[Tile]:
    """Yields tiles of the pairs with i + oldest <= j <= i + newest, i in [qa, qb), j in [ka,
    kb).
    """
    if oldest is None or qb - 1 + oldest <= ka:
        yield from _lower(qa, qb, ka, kb, newest)
        return
    width = newest - oldest + 1
    if width <= 0:
        return
    # Blocks of at most as many queries as the window has keys: in those, no key is at both edges.
    for start in range(qa, qb, width):
        stop = min(start + width, qb)
        split = start + newest + 1
        # The keys that the block's first query sees are limited by the old edge only, later keys by
        # the new edge only.
        yield from _upper(start, stop, ka, min(kb, split), oldest)
        yield from _lower(start, stop, max(ka, split), kb, newest)


def _lower(qa: int, qb: int, ka: int, kb: int, newest: int) -> Iterator[Tile]:
    """Yields tiles of the pairs with j <= i + newest: a rectangle, a causal square, and the
    rectangle below it.
    """
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
    """Yields tiles of the pairs with j >= i + oldest: a rectangle, an anti-causal square, and the
    rectangle beside it.
    """
    # That is j > i + cut: query i of a square sees the keys after i.
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
    # Query i sees the keys from i + cut + 1 on: in a square of one query, none.
    if last - first > 1:
        yield Tile(first, last, first + cut, square_stop, "anti_causal")
    if square_stop < kb:
        yield Tile(first, last, square_stop, kb, "full")


def joined_tiles(tiles: Iterable[Tile]) -> tuple[Tile, ...]:
    """Returns tiles with the same visible pairs, adjacent ones joined where their union is a tile.

    Args:
        tiles: of one row, with no pair of tokens in two of them.
    """
    squares, rest = _joined_squares(list(tiles))
    full = [tile for tile in rest if tile.shape == "full"]
    others = [tile for tile in rest if tile.shape != "full"]
    return (*squares, *_joined_columns(_joined_rows(full)), *others)


def _joined_squares(tiles: list[Tile]) -> tuple[list[Tile], list[Tile]]:
    """Returns the causal squares, two of them joined with the rectangle between them where all
    three form a square, and the remaining tiles.
    """
    squares = {(tile.q_start, tile.k_start): tile for tile in tiles if tile.shape == "causal"}
    rest = {tile: None for tile in tiles if tile.shape != "causal"}
    result = []
    for corner in sorted(squares):
        square = squares.pop(corner, None)
        if square is None:
            continue
        while (later := squares.get((square.q_stop, square.k_stop))) is not None:
            between = Tile(later.q_start, later.q_stop, square.k_start, square.k_stop, "full")
            if between not in rest:
                break
            del rest[between], squares[later.q_start, later.k_start]
            square = replace(square, q_stop=later.q_stop, k_stop=later.k_stop)
        result.append(square)
    return result, list(rest)


def _joined_rows(tiles: list[Tile]) -> list[Tile]:
    """Joins rectangles with the same queries and adjacent keys."""
    result: list[Tile] = []
    for tile in sorted(tiles, key=lambda tile: (tile.q_start, tile.q_stop, tile.k_start)):
        last = result[-1] if result else None
        if last is not None and _queries(last) == _queries(tile) and last.k_stop == tile.k_start:
            tile = replace(result.pop(), k_stop=tile.k_stop)
        result.append(tile)
    return result


def _queries(tile: Tile) -> tuple[int, int]:
    return tile.q_start, tile.q_stop


def _joined_columns(tiles: list[Tile]) -> list[Tile]:
    """Joins rectangles with the same keys and adjacent queries."""
    transposed = [
        Tile(tile.k_start, tile.k_stop, tile.q_start, tile.q_stop, "full") for tile in tiles
    ]
    return [
        Tile(tile.k_start, tile.k_stop, tile.q_start, tile.q_stop, "full")
        for tile in _joined_rows(transposed)
    ]
