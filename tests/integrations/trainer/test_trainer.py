"""A stock Trainer with our config, on every engine, does step by step what a stock Trainer on one
process does.

Each mode runs one job: twenty steps over ten epochs with accumulation, evaluations on the way and
at the start, a checkpoint in the middle of an epoch, predictions; then another Trainer with other
weights resumes from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.models import build
from tests.helpers.ranks import run_ranks
from tests.helpers.trainer_jobs import ONE, Mode, Recorder, pad, run_of, samples, train

STEPS, SAVED = 20, 11
BATCH, BATCHES, WINDOW = 4, 3, 2
TRAIN = samples(BATCH * BATCHES, (16, 12, 14, 9))
# Two batches, of which the last is cut: one process has 3 samples in it, and data parallel ranks
# repeat one.
EVAL = samples(7, (16,), seed=1)
MODES = [
    Mode(sp=2),
    Mode(cp=2),
    Mode(sp=2, dp=2),
    Mode(sp=2, engine="FSDP2"),
    Mode(sp=2, engine="ZeRO-2"),
    Mode(sp=2, engine="ZeRO-3"),
]
NAMES = {(2, 1, 1): "sp", (1, 2, 1): "cp", (2, 1, 2): "dp × sp"}
CODE = "Trainer(model, TrainingArguments(folder, parallelism_config=ParallelismConfig(sp_size=2)), train_dataset=data)"

Result = dict[str, Any]


def accuracy(prediction: Any) -> dict[str, float]:
    """Counts next tokens that were guessed, and what it was given."""
    logits, labels = prediction.predictions, prediction.label_ids
    right = (logits.argmax(-1)[:, :-1] == labels[:, 1:]) & (labels[:, 1:] != -100)
    return {
        "right": float(right.sum()),
        "counted": float((labels[:, 1:] != -100).sum()),
        "rows": float(len(logits)),
    }


def job(mode: Mode, folder: str) -> Result:
    dtype = torch.float32 if mode.engine.startswith("ZeRO") else torch.float64
    options: dict[str, Any] = {
        **{
            "max_steps": STEPS,
            "gradient_accumulation_steps": WINDOW,
            "learning_rate": 1e-2,
            "warmup_steps": 3,
        },
        **{"eval_strategy": "steps", "eval_steps": 10, "eval_on_start": True},
        **{"save_strategy": "steps", "save_steps": SAVED, "max_grad_norm": 0.5},
        **{"include_num_input_tokens_seen": "non_padding"},
    }

    def trainer(seed: int) -> Recorder:
        arguments = mode.arguments(folder, BATCH, **options)
        return Recorder(
            build("llama", dtype, seed=seed), arguments, pad, TRAIN, EVAL, compute_metrics=accuracy
        )

    first = trainer(seed=0)
    first.train()
    found = {"run": run_of(first), "total": first.get_total_train_batch_size(first.args)}
    found["seen"] = first.state.num_input_tokens_seen
    found["evaluations"] = [
        _numbers(entry) for entry in first.state.log_history if "eval_loss" in entry
    ]
    predicted = first.predict(EVAL)
    found["predictions"] = torch.from_numpy(predicted.predictions).double()
    found["label_ids"] = torch.from_numpy(predicted.label_ids)
    found["test"] = _numbers(predicted.metrics or {})
    second = trainer(seed=5)
    second.train(resume_from_checkpoint=f"{folder}/checkpoint-{SAVED}")
    found["resumed"] = run_of(second)
    return found


def _numbers(metrics: dict[str, float]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in metrics.items()
        if "second" not in name and "time" not in name
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """One process's results."""
    found: Result = run_ranks(job, 1, ONE, str(tmp_path_factory.mktemp("alone")), init=False)[0]
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mode], list[Result]]:
    """Returns all ranks' results of a mode, which is run once."""
    found: dict[Mode, list[Result]] = {}

    def result(mode: Mode) -> list[Result]:
        if mode not in found:
            found[mode] = run_ranks(
                job, mode.world_size, mode, str(tmp_path_factory.mktemp("ranks")), init=False
            )
        return found[mode]

    return result


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_twenty_steps(mode: Mode, alone: Result, results: Any, support: Any) -> None:
    # ZeRO keeps its gradients and Adam's state in float32, whose rounding twenty steps of Adam make
    # larger.
    exact = mode.engine in ("DDP", "FSDP2")
    tolerance = 1e-12 if exact else 2e-4
    expected = alone["run"]
    for rank in results(mode):
        run = rank["run"]
        assert len(run["losses"]) == STEPS // WINDOW * BATCHES
        torch.testing.assert_close(run["losses"], expected["losses"], rtol=tolerance, atol=0)
        assert run["parameters"].keys() == expected["parameters"].keys()
        for name, value in expected["parameters"].items():
            torch.testing.assert_close(
                run["parameters"][name].double(), value, rtol=0, atol=tolerance, msg=name
            )
        # The Trainer adds up the losses that it logs in float32.
        log_tolerance = {"loss": 1e-6 if exact else tolerance, "grad_norm": tolerance}
        assert len(run["logs"]) == STEPS
        for entry, right in zip(run["logs"], expected["logs"]):
            for name, value in entry.items():
                assert value == pytest.approx(right[name], rel=log_tolerance.get(name, 1e-12)), name
        # Rows of unequal length: the longest of a batch is 16 or 14 tokens.
        assert max(run["tokens"]) == 16 // (mode.sp * mode.cp)
        assert rank["total"] == BATCH * WINDOW
    support("trainer", "Trainer", NAMES[mode.sp, mode.cp, mode.dp], code=CODE, engine=mode.engine)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_evaluation_and_predictions(mode: Mode, alone: Result, results: Any, support: Any) -> None:
    tolerance = 1e-6 if mode.engine in ("DDP", "FSDP2") else 2e-4
    for rank in results(mode):
        assert len(rank["evaluations"]) == 3
        for found, right in zip(
            [*rank["evaluations"], rank["test"]], [*alone["evaluations"], alone["test"]]
        ):
            assert found.keys() == right.keys()
            for name, value in right.items():
                assert found[name] == pytest.approx(value, rel=tolerance), name
        torch.testing.assert_close(
            rank["predictions"], alone["predictions"], rtol=0, atol=5 * tolerance
        )
        assert torch.equal(rank["label_ids"], alone["label_ids"])
        assert rank["seen"] == alone["seen"]
    name = NAMES[mode.sp, mode.cp, mode.dp]
    support(
        "trainer",
        "Trainer, evaluate and predict",
        name,
        code="trainer.predict(data)",
        engine=mode.engine,
    )


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_resume_in_the_middle_of_an_epoch(mode: Mode, results: Any, support: Any) -> None:
    for rank in results(mode):
        whole, rest = rank["run"], rank["resumed"]
        assert len(rest["losses"]) == (STEPS - SAVED) // WINDOW * BATCHES + 1
        assert rest["losses"] == whole["losses"][-len(rest["losses"]) :]
        assert rest["logs"] == whole["logs"]
        assert torch.equal(rest["random"], whole["random"])
        for name, value in whole["parameters"].items():
            assert torch.equal(rest["parameters"][name], value), name
    name = NAMES[mode.sp, mode.cp, mode.dp]
    code = "trainer.train(resume_from_checkpoint=True)"
    support("trainer", "Trainer, resume in mid-epoch", name, code=code, engine=mode.engine)


# Upstream's defects, by their numbers in the notes on accelerate; one process is what is right.


def test_b8_no_step_of_an_epoch_is_lost(alone: Result, results: Any) -> None:
    epochs = STEPS // WINDOW
    for rank in results(MODES[0]):
        assert (rank["run"]["steps"], rank["run"]["epoch"]) == (STEPS, float(epochs))
        assert len(rank["run"]["losses"]) == epochs * BATCHES == len(alone["run"]["losses"])


def test_b9_resuming_in_an_epoch_does_not_crash(results: Any) -> None:
    for rank in results(MODES[0]):
        assert rank["resumed"]["steps"] == STEPS
        assert 0 < len(rank["resumed"]["losses"]) < len(rank["run"]["losses"])


def test_b11_the_last_batches_of_an_epoch_are_one_step(alone: Result, results: Any) -> None:
    # Three batches, two to a step: the epoch's last step has one.
    expected = [
        epoch + part for epoch in range(STEPS // WINDOW) for part in (WINDOW / BATCHES, 1.0)
    ]
    assert [entry["epoch"] for entry in alone["run"]["logs"]] == pytest.approx(expected)
    for rank in results(MODES[0]):
        assert [entry["epoch"] for entry in rank["run"]["logs"]] == pytest.approx(expected)


def test_b12_the_schedule_keeps_its_pace(alone: Result, results: Any) -> None:
    rates = [entry["learning_rate"] for entry in alone["run"]["logs"]]
    assert max(rates) == pytest.approx(1e-2)
    assert rates[-1] < 1e-3
    for mode in (MODES[0], MODES[2]):
        for rank in results(mode):
            assert [entry["learning_rate"] for entry in rank["run"]["logs"]] == pytest.approx(
                rates, rel=1e-12
            )


def uneven_windows(mode: Mode, folder: str) -> list[float]:
    """Trains steps over two micro-batches, of very different counts of labels; returns their
    losses.
    """
    data = samples(6, (16, 4))
    found: list[float] = train(mode, folder, 1, data, max_steps=3, gradient_accumulation_steps=2)[
        "losses"
    ]
    return found


def test_b13_accumulated_losses_are_weighted_by_tokens(tmp_path: Path, support: Any) -> None:
    (alone,) = run_ranks(uneven_windows, 1, ONE, str(tmp_path), init=False)
    shares = [sum(alone[step : step + 2]) for step in range(0, len(alone), 2)]
    assert any(abs(first - step / 2) > 0.25 * step for first, step in zip(alone[::2], shares)), (
        "shares are far apart"
    )
    for mode in (Mode(sp=2), Mode(sp=2, cp=2)):
        for rank in run_ranks(uneven_windows, mode.world_size, mode, str(tmp_path), init=False):
            assert rank == pytest.approx(alone, rel=1e-12)
    support("trainer", "Trainer", "cp × sp", code=CODE)
