"""The table of bytes by heads and ranks: its volumes are the planner's, and say where a ring is the
cheaper one.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.bytes_table import BytesRow, bytes_table
from ulysses_accel.config.split_cost import SplitRequest, candidates
from ulysses_accel.errors import ConfigError

HEADS = st.tuples(st.integers(1, 16), st.integers(1, 8)).map(
    lambda pair: (pair[0] * pair[1], pair[0])
)
RANKS = st.integers(2, 32)


@given(HEADS, RANKS, st.booleans(), st.booleans())
def test_volumes_are_those_that_the_choice_is_made_by(
    heads: tuple[int, int], ranks: int, is_causal: bool, is_training: bool
) -> None:
    (row,) = bytes_table([heads], [ranks], is_causal=is_causal, is_training=is_training)
    request = SplitRequest(ranks, *heads, 64, None, ranks, 1.0, 1.0, is_causal, is_training)
    volumes = {split.cp_size: split.bytes_inside / (64 * 2) for split in candidates(request)}
    assert row.ring == pytest.approx(volumes.pop(ranks))
    ulysses = volumes.pop(1, None)
    assert (row.ulysses is None) == (ulysses is None) == (ranks > heads[0])
    if ulysses is not None:
        assert row.ulysses == pytest.approx(ulysses)
    assert (row.usp is None) == (not volumes)
    if volumes:
        assert row.usp == pytest.approx(min(volumes.values()))
        assert volumes[row.usp_cp_size or 0] == pytest.approx(row.usp)
    known = {"ring": row.ring, "ulysses": row.ulysses, "usp": row.usp}
    least = min(volume for volume in known.values() if volume is not None)
    assert known[row.cheapest] == least


@given(HEADS, RANKS)
def test_a_ring_sends_less_forward_below_one_plus_the_ratio(
    heads: tuple[int, int], ranks: int
) -> None:
    (full,) = bytes_table([heads], [ranks], is_causal=False, is_training=False)
    (zigzag,) = bytes_table([heads], [ranks], is_causal=True, is_training=False)
    ratio = 1 + heads[0] / heads[1]
    if full.ulysses is None:
        return
    if ranks < ratio:
        assert full.ring < full.ulysses
    elif ranks <= heads[1]:
        assert full.ring >= full.ulysses * (1 - 1e-12)
    if ranks <= heads[1]:
        assert (zigzag.ring < zigzag.ulysses * (1 - 1e-12)) == (3 * ranks < 4 * ratio - 1e-9)


def test_published_rows() -> None:
    rows = bytes_table([(64, 8), (32, 32), (2, 1)], [4, 8], is_training=False)
    assert [(row.num_heads, row.num_ranks, row.ring, row.ulysses) for row in rows[:4]] == [
        (64, 4, 36.0, 108.0),
        (64, 8, 84.0, 126.0),
        (32, 4, 144.0, 96.0),
        (32, 8, 336.0, 112.0),
    ]
    assert [row.cheapest for row in rows] == ["ring", "ring", "ulysses", "ulysses", "ring", "ring"]
    assert rows[4] == BytesRow(2, 1, 4, 4.5, None, 7.0, 2, "ring")


def test_illegal_heads() -> None:
    with pytest.raises(ConfigError, match="num_key_value_heads=3 does not divide num_heads=8"):
        bytes_table([(8, 3)], [2])
