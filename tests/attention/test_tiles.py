"""The tiles of every layout, window and set of documents cover each visible pair exactly once."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ulysses_accel.attention.tiles import Tile, tiles
from ulysses_accel.errors import ConfigError
from ulysses_accel.sequence_layout import LAYOUTS, Layout, multiple_of, runs


def paint(tile: Tile, counts: torch.Tensor) -> None:
    block = counts[tile.q_start : tile.q_stop, tile.k_start : tile.k_stop]
    ones = torch.ones_like(block)
    if tile.shape == "causal":
        assert block.shape[0] == block.shape[1]
        ones = ones.tril()
    elif tile.shape == "anti_causal":
        assert block.shape[0] == block.shape[1]
        ones = ones.triu(1)
    assert int(ones.sum()) == tile.num_scores
    block += ones


def positions(length: int, ring_size: int, rank: int, layout: Layout) -> torch.Tensor:
    return torch.tensor(
        [run.start + i * run.step for run in runs(length, ring_size, rank, layout) for i in range(run.count)]
    )


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_each_visible_pair_is_in_exactly_one_tile(data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from(LAYOUTS))
    ring_size = data.draw(st.integers(1, 4))
    length = multiple_of(ring_size, layout) * data.draw(st.integers(1, 6))
    bounds = sorted({0, *data.draw(st.lists(st.integers(0, length), max_size=4)), length})
    documents = tuple((a, b) for a, b in pairwise(bounds) if data.draw(st.booleans()))
    is_causal = data.draw(st.booleans())
    window = data.draw(st.none() | st.integers(1, length + 2)) if is_causal else None
    ids = torch.full((length,), -1)
    for index, (a, b) in enumerate(documents):
        ids[a:b] = index
    total = 0
    for q_rank in range(ring_size):
        for k_rank in range(ring_size):
            q, k = (positions(length, ring_size, rank, layout) for rank in (q_rank, k_rank))
            expected = (ids[q][:, None] == ids[k][None, :]) & (ids[q][:, None] >= 0)
            if is_causal:
                expected &= k[None, :] <= q[:, None]
            if window is not None:
                expected &= k[None, :] > q[:, None] - window
            counts = torch.zeros(len(q), len(k), dtype=torch.long)
            args = (runs(length, ring_size, q_rank, layout), runs(length, ring_size, k_rank, layout))
            for tile in tiles(*args, documents, is_causal, window):
                paint(tile, counts)
                total += tile.num_scores
            assert torch.equal(counts, expected.long())
    assert total <= length * length


def test_layouts_hold_every_token_once() -> None:
    for layout in LAYOUTS:
        tokens = torch.cat([positions(24, 3, rank, layout) for rank in range(3)])
        assert torch.equal(tokens.sort().values, torch.arange(24))
    assert positions(8, 2, 0, "zigzag").tolist() == [0, 1, 6, 7]
    assert positions(8, 2, 1, "striped").tolist() == [1, 3, 5, 7]


# Striped ranks differ by their tokens' diagonals: 3 scores in each of 16 rows.
@pytest.mark.parametrize(("layout", "gap"), [("zigzag", 0), ("striped", 3 * 16), ("contiguous", 3 * 16 * 16)])
def test_causal_work_is_even(layout: Layout, gap: int) -> None:
    work = [
        sum(
            tile.num_scores
            for k in range(4)
            for tile in tiles(runs(64, 4, q, layout), runs(64, 4, k, layout), ((0, 64),), True)
        )
        for q in range(4)
    ]
    assert sum(work) == 64 * 65 // 2
    assert max(work) - min(work) == gap


def test_illegal_layouts_are_refused() -> None:
    with pytest.raises(ConfigError, match="Pad it to a multiple of 8"):
        runs(12, 4, 0, "zigzag")
    with pytest.raises(ConfigError, match="layout='spiral'"):
        runs(12, 4, 0, "spiral")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="window=3"):
        tiles((), (), (), False, 3)
