"""The tiles of every layout, window and set of documents cover each visible pair exactly once."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ulysses_accel.attention.ring.tiles import RowRule, Tile, tiles
from ulysses_accel.errors import ConfigError
from ulysses_accel.sequence.documents import joined
from ulysses_accel.sequence.layout import LAYOUTS, Layout, multiple_of, runs


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
        [
            run.start + i * run.step
            for run in runs(length, ring_size, rank, layout)
            for i in range(run.count)
        ]
    )


def draw_documents(data: st.DataObject, length: int) -> tuple[tuple[int, int], ...]:
    bounds = sorted({0, *data.draw(st.lists(st.integers(0, length), max_size=4)), length})
    return tuple((a, b) for a, b in pairwise(bounds) if data.draw(st.booleans()))


def draw_holes(
    data: st.DataObject, documents: tuple[tuple[int, int], ...]
) -> tuple[tuple[int, int], ...]:
    holes = []
    for start, stop in documents:
        bounds = sorted(data.draw(st.sets(st.integers(start, stop), max_size=4)))
        holes += list(zip(bounds[::2], bounds[1::2]))
    return tuple(holes)


def visible_tokens(length: int, rule: RowRule) -> torch.Tensor:
    ids = torch.full((length,), -1)
    for index, (start, stop) in enumerate(rule.documents):
        ids[start:stop] = index
    for start, stop in rule.holes:
        ids[start:stop] = -1
    return ids


def dense_mask(length: int, rule: RowRule, is_causal: bool, window: int | None) -> torch.Tensor:
    """What sees what, `[S, S]`, written down token by token."""
    ids, places = visible_tokens(length, rule), torch.arange(length)
    ahead = places[:, None] - places[None, :]
    mask = torch.ones(length, length, dtype=torch.bool)
    if is_causal:
        mask &= ahead >= 0
    if window is not None:
        mask &= (ahead < window) if is_causal else (ahead.abs() <= window)
    for (start, _), prefix in zip(rule.documents, rule.prefixes if is_causal else ()):
        mask[:, start : start + prefix] = True
    return mask & (ids[:, None] == ids[None, :]) & (ids[:, None] >= 0) & (ids[None, :] >= 0)


def painted(
    length: int, ring_size: int, layouts: tuple[Layout, Layout], key_length: int, args: tuple
) -> torch.Tensor:
    """How often the tiles of all pairs of ranks cover each pair of tokens, `[S, S of the keys]`."""
    counts = torch.zeros(length, key_length, dtype=torch.long)
    for q_rank in range(ring_size):
        for k_rank in range(ring_size):
            q, k = (
                positions(length, ring_size, q_rank, layouts[0]),
                positions(key_length, ring_size, k_rank, layouts[1]),
            )
            own = torch.zeros(len(q), len(k), dtype=torch.long)
            q_runs, k_runs = (
                runs(length, ring_size, q_rank, layouts[0]),
                runs(key_length, ring_size, k_rank, layouts[1]),
            )
            for tile in tiles(q_runs, k_runs, *args):
                assert tile.num_scores > 0
                paint(tile, own)
            counts[q[:, None], k[None, :]] += own
    return counts


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_each_visible_pair_is_in_exactly_one_tile(data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from(LAYOUTS))
    ring_size = data.draw(st.integers(1, 4))
    length = multiple_of(ring_size, layout) * data.draw(st.integers(1, 6))
    documents = draw_documents(data, length)
    holes = draw_holes(data, documents) if data.draw(st.booleans()) else ()
    prefixes = tuple(data.draw(st.integers(0, stop - start)) for start, stop in documents)
    rule = RowRule(documents, holes, prefixes if data.draw(st.booleans()) else ())
    is_causal = data.draw(st.booleans())
    window = data.draw(st.none() | st.integers(int(is_causal), length + 2))
    counts = painted(length, ring_size, (layout, layout), length, (rule, is_causal, window))
    assert torch.equal(counts, dense_mask(length, rule, is_causal, window).long())


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_cross_attention_sees_all_of_the_other_sequence(data: st.DataObject) -> None:
    ring_size = data.draw(st.integers(1, 4))
    layouts = data.draw(st.sampled_from(LAYOUTS)), data.draw(st.sampled_from(LAYOUTS))
    lengths = [multiple_of(ring_size, layout) * data.draw(st.integers(1, 4)) for layout in layouts]
    documents = [draw_documents(data, length) for length in lengths]
    holes = draw_holes(data, documents[0])
    rule = RowRule(documents[0], holes, (), joined(documents[1]))
    counts = painted(lengths[0], ring_size, layouts, lengths[1], (rule, False))
    queries, keys = (
        visible_tokens(n, r) >= 0 for n, r in zip(lengths, (rule, RowRule(documents[1])))
    )
    assert torch.equal(counts, (queries[:, None] & keys[None, :]).long())


def test_layouts_hold_every_token_once() -> None:
    for layout in LAYOUTS:
        tokens = torch.cat([positions(24, 3, rank, layout) for rank in range(3)])
        assert torch.equal(tokens.sort().values, torch.arange(24))
    assert positions(8, 2, 0, "zigzag").tolist() == [0, 1, 6, 7]
    assert positions(8, 2, 1, "striped").tolist() == [1, 3, 5, 7]


# Striped ranks differ by their tokens' diagonals: 3 scores in each of 16 rows.
@pytest.mark.parametrize(
    ("layout", "gap"), [("zigzag", 0), ("striped", 3 * 16), ("contiguous", 3 * 16 * 16)]
)
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
    for is_causal, window in ((True, 0), (False, -1)):
        with pytest.raises(ConfigError, match=f"window={window} leaves a token nothing to see"):
            tiles((), (), (), is_causal, window)
