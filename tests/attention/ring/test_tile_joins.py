"""Joined tiles see what the tiles saw: every visible pair once, and no more of them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attention.ring.test_tiles import paint
from ulysses_accel.attention.ring.tiles import RowRule, Tile, joined_tiles, tiles
from ulysses_accel.sequence.layout import LAYOUTS, Layout, runs


def painted(found: tuple[Tile, ...], length: int) -> torch.Tensor:
    counts = torch.zeros(length, length, dtype=torch.int64)
    for tile in found:
        paint(tile, counts)
    return counts


@settings(max_examples=200, deadline=None)
@given(
    st.data(),
    st.sampled_from(LAYOUTS),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from([None, 1, 3, 9]),
)
def test_the_pairs_stay_the_same(
    data: st.DataObject, layout: Layout, size: int, is_causal: bool, window: int | None
) -> None:
    local = data.draw(st.sampled_from([2, 4, 8]))
    length = local * size
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=3)))
    documents = tuple(zip([0, *cuts], [*cuts, length]))
    hole = data.draw(st.integers(0, length - 1))
    holes = ((hole, hole + 1),) if data.draw(st.booleans()) else ()
    prefixes = tuple(data.draw(st.integers(0, stop - start)) for start, stop in documents)
    rule = RowRule(documents, holes, prefixes)
    own, other = (runs(length, size, data.draw(st.integers(0, size - 1)), layout) for _ in range(2))
    apart = tiles(own, other, rule, is_causal, window)
    together = joined_tiles(apart)
    assert torch.equal(painted(together, local), painted(apart, local))
    assert len(together) <= len(apart)


def test_causal_zigzag_is_one_tile_for_each_rank() -> None:
    length, size = 32, 4
    for rank in range(size):
        for source in range(size):
            found = tiles(
                *(runs(length, size, r, "zigzag") for r in (rank, source)), ((0, length),), True
            )
            later, earlier = Tile(4, 8, 0, 8, "full"), Tile(0, 8, 0, 4, "full")
            expected = (
                Tile(0, 8, 0, 8, "causal")
                if source == rank
                else later
                if source > rank
                else earlier
            )
            assert joined_tiles(found) == (expected,)
