"""The memory tables tell contenders apart, in small sizes."""

from __future__ import annotations

import pytest

from benchmarks.memory import __main__ as memory
from benchmarks.memory.blocks import loss_rows, mlp_rows, norm_rows
from benchmarks.memory.layer import layer_rows
from benchmarks.memory.step import preload

# Before any test, because importing some of it sets environment variables.
preload()

# bfloat16 keeps 8 bits: sums of products with one or two roundings each, in every contender that is
# right.
ROUNDING = 1e-2


def test_blocks_that_hold_less_are_seen_to() -> None:
    for rows in (mlp_rows(4096, 0), norm_rows(4096, 0)):
        by_name = {row["implementation"]: row for row in rows}
        ours, plain = by_name["ours"], by_name["plain"]
        assert "refused" not in ours
        assert ours["forward_peak_u"] < plain["forward_peak_u"] / 3
        assert ours["weight_error"] < max(plain["weight_error"] * 1.01, ROUNDING / 4)
        assert ours["saved_u"] < plain["saved_u"]


def test_losses_that_are_scaled_afterwards_are_told_apart() -> None:
    pytest.importorskip("deepspeed")
    rows = {row["implementation"]: row for row in loss_rows(1024, 0)}
    assert rows["ours"]["scaled_errors"]["weight"] < ROUNDING
    # A loss over 32 whose weight's gradient is not: 31 times its norm too much.
    wrong = rows["DeepSpeed TiledFusedLogitsLoss, mean of tiles"]["scaled_errors"]["weight"]
    assert wrong == pytest.approx(31, rel=0.1)
    assert "**wrong" in " ".join(
        memory.loss_cells(rows["DeepSpeed TiledFusedLogitsLoss, mean of tiles"])
    )


def test_a_layers_working_set_falls_feature_by_feature() -> None:
    rows = {row["implementation"]: row for row in layer_rows(1536, 0)}
    plain, tiled, norms = (
        rows[name] for name in ("ours: checkpoint", "ours: + TiledMLP", "ours: + norms")
    )
    assert plain["working_set_u"] > tiled["working_set_u"] > norms["working_set_u"]
    # Three products forward, none in the recompute, eight backward.
    assert norms["mlp_products"] == pytest.approx(11, abs=1e-6)
    assert [row["attention_forward_calls"] for row in rows.values()] == [4] * len(rows)
    for row in rows.values():
        assert row["errors"]["hidden"] < ROUNDING
