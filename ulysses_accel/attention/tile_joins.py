"""Fewer and larger tiles with the same visible pairs: each kernel call saves the merge of its result with another's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ulysses_accel.attention.tiles import Tile


def joined_tiles(tiles: Iterable[Tile]) -> tuple[Tile, ...]:
    """Returns tiles with the same visible pairs, neighbours joined where the union is a tile.

    Args:
        tiles: of one row, no pair twice.
    """
    squares, rest = _joined_squares(list(tiles))
    full = [tile for tile in rest if tile.shape == "full"]
    others = [tile for tile in rest if tile.shape != "full"]
    return (*squares, *_joined_columns(_joined_rows(full)), *others)


def _joined_squares(tiles: list[Tile]) -> tuple[list[Tile], list[Tile]]:
    """Returns the causal squares, joined over the rectangle between two where they meet, and the tiles left over."""
    squares = {(tile.q_start, tile.k_start): tile for tile in tiles if tile.shape == "causal"}
    rest = {tile: None for tile in tiles if tile.shape != "causal"}
    found = []
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
        found.append(square)
    return found, list(rest)


def _joined_rows(tiles: list[Tile]) -> list[Tile]:
    """Joins rectangles of the same queries whose keys follow each other."""
    found: list[Tile] = []
    for tile in sorted(tiles, key=lambda tile: (tile.q_start, tile.q_stop, tile.k_start)):
        if found and (*_queries(found[-1]), found[-1].k_stop) == (*_queries(tile), tile.k_start):
            tile = replace(tile, k_start=found.pop().k_start)
        found.append(tile)
    return found


def _queries(tile: Tile) -> tuple[int, int]:
    return tile.q_start, tile.q_stop


def _joined_columns(tiles: list[Tile]) -> list[Tile]:
    """Joins rectangles of the same keys whose queries follow each other."""
    turned = [Tile(tile.k_start, tile.k_stop, tile.q_start, tile.q_stop, "full") for tile in tiles]
    return [Tile(tile.k_start, tile.k_stop, tile.q_start, tile.q_stop, "full") for tile in _joined_rows(turned)]
