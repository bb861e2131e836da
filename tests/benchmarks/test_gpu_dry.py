"""The GPU measurements run, in tiny sizes on the CPU, and their own checks hold and can fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.cases import CASES
from benchmarks.gpu.large import _other_rows_are_zero, _result
from benchmarks.gpu.models import FEATURE_SETS, Training
from benchmarks.gpu.scale import Scale
from benchmarks.memory.step import preload

# Before any test, because importing some of it sets environment variables.
preload()

SCALE = Scale.of(dry=True, limit=30.0)
# Everything is float32 here; the loss sums tiles in another order than the whole.
TOLERANCE = 1e-5


@pytest.mark.parametrize("name", ["large-mlp", "large-loss", "large-attention"])
def test_large_tensors_are_compared_with_what_the_sampled_rows_give(name: str) -> None:
    row = CASES[name].run(SCALE, lambda row: None)
    assert row["is_right"]
    assert max(row["errors"].values()) < TOLERANCE


def test_a_wrong_row_is_seen() -> None:
    grad, rows = torch.zeros(10, 4), torch.tensor([2, 9])
    grad[rows] = 1.0
    assert _other_rows_are_zero(grad.clone(), rows)
    grad[3, 1] = 1e-6
    assert not _other_rows_are_zero(grad, rows)
    assert not _result(SCALE, 10, 4, {"dX": 0.5}, True)["is_right"]
    assert not _result(SCALE, 10, 4, {"dX": 0.0}, False)["is_right"]


def test_every_set_of_features_computes_the_same() -> None:
    found = {}
    for name, features in FEATURE_SETS.items():
        if "liger" not in features and "DeepSpeed TiledMLP" not in features:
            training = Training(SCALE, layers=2, tokens=96, features=features)
            found[name] = training.step(96)
            training.close()
    expected = torch.tensor(found.pop("transformers device"))
    assert len(found) >= 5
    for name, values in found.items():
        torch.testing.assert_close(
            torch.tensor(values), expected, rtol=TOLERANCE, atol=0.0, msg=name
        )


def test_the_longest_sequence_is_the_last_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def fails_beyond_400(self: Training, tokens: int) -> tuple[float, float]:
        tried.append(tokens)
        if tokens > 400:
            raise torch.OutOfMemoryError("out of memory")
        return 0.0, 0.0

    monkeypatch.setattr(Training, "step", fails_beyond_400)
    row = CASES["longest: ours all"].run(SCALE, lambda row: None)
    assert row["tokens"] == 384
    assert "out of memory" in row["failure"]
    assert tried[:5] == [32, 64, 128, 256, 512]


def test_a_case_in_its_own_process_gives_a_row(tmp_path: Path) -> None:
    row = gpu.run_case("large-loss", 100.0, dry=True)
    assert row["is_right"]
    assert gpu.cells(json.loads(json.dumps(row)))[0] == "large-loss"


def test_a_failing_case_is_a_row_that_says_why() -> None:
    row = gpu.run_case("no-such-case", 100.0, dry=True)
    assert "invalid choice" in row["refused"]
