"""TRL's trainers add the router loss of the whole sequence to theirs, and give it back in their
metrics.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.forward.test_router_loss import build_experts, keep_float64
from tests.helpers import trl_jobs
from tests.helpers.ranks import run_ranks
from tests.helpers.support import Support
from tests.helpers.trainer_jobs import ONE, Mode
from tests.helpers.trl_jobs import Case, differences, pairs, plain_texts, run_all

# TRL's reference sums the experts' shares of choices in float32.
FLOAT32 = 1e-6
CASES = {
    "SFTTrainer": Case(
        "SFTTrainer", plain_texts, {"gradient_accumulation_steps": 2}, steps=2, evaluate=4
    ),
    "DPOTrainer": Case("DPOTrainer", pairs, steps=2),
}


@pytest.fixture(autouse=True)
def _experts(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_float64(monkeypatch.setattr)
    for name in CASES:
        trainer, config, _ = trl_jobs._TRAINERS[name]
        monkeypatch.setitem(
            trl_jobs._TRAINERS, name, (trainer, config, lambda: build_experts("Qwen3-MoE"))
        )


def test_router_loss_is_that_of_one_process(tmp_path: Path, support: Support) -> None:
    (expected,) = run_ranks(run_all, 1, CASES, ONE, str(tmp_path), init=False)
    for rank in run_ranks(run_all, 2, CASES, Mode(sp=2), str(tmp_path), init=False):
        for name, found in rank.items():
            assert "aux_loss" in found["logs"]
            assert differences(found, expected[name], FLOAT32) == {}
            assert max(found["tokens"]) == -(-max(expected[name]["tokens"]) // 2)
    code: dict[str, Any] = {name: f"{name}(moe_model, ...)" for name in CASES}
    for name in CASES:
        support(
            "trainer", f"TRL {name}, mixture of experts with its router loss", "sp", code=code[name]
        )
