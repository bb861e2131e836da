"""What a Trainer keeps of being attached, and evaluations that need more than a causal loss."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from tests.helpers.engine_jobs import error_of
from tests.helpers.models import build
from tests.helpers.ranks import run_ranks
from tests.helpers.trainer_jobs import ONE, Mode, Recorder, pad, samples
from ulysses_accel import ParallelismConfig, SequenceParallelTrainerMixin, attach_trainer
from ulysses_accel.integrations import attach as attach_point

DATA = samples(6, (16, 13), seed=1)


class OwnLoader(Recorder):
    """Makes its evaluation loader by itself, as users' classes do."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        loader: DataLoader[Any] = self.accelerator.prepare(
            DataLoader(DATA, batch_size=2, collate_fn=pad)
        )  # type: ignore[arg-type]
        return loader


def unlabelled(batch: Any) -> dict[str, Tensor]:
    return {name: value for name, value in pad(batch).items() if name != "labels"}


def counts(prediction: Any) -> dict[str, float]:
    """Returns sums that tell whether inputs, labels and guesses are whole and in order."""
    places = range(1, prediction.inputs.shape[1] + 1)
    found = {
        "inputs": prediction.inputs,
        "labels": prediction.label_ids,
        "guesses": prediction.predictions,
    }
    return {name: float((values.clip(0) * list(places)).sum()) for name, values in found.items()}


def guess(logits: Tensor, labels: Tensor) -> Tensor:
    # Padding is not what one process computes there: only tokens before a labelled one are looked
    # at.
    return torch.where(labels == -100, 0, logits.argmax(-1))


def evaluations(mode: Mode, folder: str) -> dict[str, Any]:
    make = partial(Recorder, build("llama"))
    options = {"include_for_metrics": ["inputs"], "dataloader_num_workers": 1}
    metrics = make(
        mode.arguments(folder, 2, **options),
        pad,
        DATA,
        DATA,
        compute_metrics=counts,
        preprocess_logits_for_metrics=guess,
    ).evaluate()
    plain = make(mode.arguments(folder, 2), unlabelled).predict(DATA)  # type: ignore[arg-type]
    own = OwnLoader(
        build("llama"), mode.arguments(folder, 2), pad, compute_metrics=lambda _: {"own": 1.0}
    ).evaluate()
    return {
        "metrics": {
            name: float(metrics[f"eval_{name}"]) for name in ("loss", "inputs", "labels", "guesses")
        },
        "logits": torch.from_numpy(plain.predictions),
        "loss only": float(make(mode.arguments(folder, 2), pad).evaluate(DATA)["eval_loss"]),  # type: ignore[arg-type]
        "own loader": float(own["eval_loss"]),
    }


def test_other_evaluations(tmp_path: Path, support: Any) -> None:
    (alone,) = run_ranks(evaluations, 1, ONE, str(tmp_path), init=False)
    for rank in run_ranks(evaluations, 2, Mode(cp=2), str(tmp_path), init=False):
        for name in ("metrics", "loss only", "own loader"):
            assert rank[name] == pytest.approx(alone[name], rel=1e-6), name
        for row, sample in enumerate(DATA):
            length = len(sample["input_ids"])
            torch.testing.assert_close(
                rank["logits"][row, :length], alone["logits"][row, :length], rtol=0, atol=1e-12
            )
    code = "Trainer(model, args, preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1), ...)"
    support("trainer", "Trainer, preprocess_logits_for_metrics", "cp", code=code)


def attachments(folder: str) -> dict[str, Any]:
    before = dict(vars(Trainer))
    arguments = Mode(sp=2).arguments(folder, 2)
    trainer = Trainer(build("llama"), arguments, pad, DATA)  # type: ignore[arg-type]
    found: dict[str, Any] = {"same": attach_trainer(trainer) is trainer.sequence_parallel}
    overridden = {name for name in vars(type(trainer)) if hasattr(Trainer, name)}
    step = partial(trainer.evaluate, DATA)
    trainer.compute_metrics = lambda _: {}
    trainer.preprocess_logits_for_metrics = lambda logits, _: logits.mean(1)
    found["no tokens"] = error_of(step)
    trainer.preprocess_logits_for_metrics = None
    arguments.eval_use_gather_object = True
    found["pickles"] = error_of(step)
    found["generate"] = error_of(_generating, folder)
    found["objects"] = error_of(trainer.accelerator.gather_for_metrics, ["a", "b"])
    trainer.sequence_parallel.close()
    found["left"] = sorted({"sequence_parallel", "ulysses_accel"} & set(vars(trainer)))
    found["is stock"] = type(trainer) is Trainer
    found["overridden"] = len(overridden)
    found["micro_steps"] = "micro_steps" in vars(trainer.accelerator.sequence_parallel)
    other = Trainer(build("llama"), ONE.arguments(folder, 2), pad, DATA)  # type: ignore[arg-type]
    found["other"] = hasattr(other, "sequence_parallel") or attach_trainer(other) is not None
    found["class"] = dict(vars(Trainer)) == before
    return found


def _generating(folder: str) -> None:
    arguments = Mode(sp=2).arguments(folder, 2)
    arguments.predict_with_generate = True  # type: ignore[attr-defined]
    Trainer(build("llama"), arguments, pad, DATA)  # type: ignore[arg-type]


def test_only_the_instance_is_changed_and_that_is_undone(tmp_path: Path, support: Any) -> None:
    ranks = run_ranks(attachments, 2, str(tmp_path), init=False)
    assert ranks[0] == ranks[1]
    found = ranks[0]
    assert found["same"]
    assert found["overridden"] >= 10
    assert found["is stock"]
    assert found["left"] == []
    assert not found["micro_steps"]
    assert not found["other"]
    assert found["class"]
    assert (
        "what preprocess_logits_for_metrics returns: a tensor of shape [2, 64]"
        in found["no tokens"]
    )
    assert "eval_use_gather_object=True" in found["pickles"]
    assert "predict_with_generate=True" in found["generate"]
    assert "something other than tensors" in found["objects"]
    support.refused(
        "trainer", "Seq2SeqTrainer, predict_with_generate", "sp", "a rank has a part of the prompt"
    )


class Mixed(SequenceParallelTrainerMixin, Recorder):
    """A Trainer that names itself."""


def named(folder: str) -> dict[str, Any]:
    """Returns the losses of Trainers that no frame leads to, and what they are attached by."""
    attach_point.calling_trainer = lambda _: None
    arguments = Mode(sp=2).arguments(folder, 2)
    lost = Recorder(build("llama"), arguments, pad, DATA)
    found: dict[str, Any] = {"lost": hasattr(lost, "sequence_parallel")}
    found["by hand"] = attach_trainer(lost) is lost.sequence_parallel
    found["losses"] = {}
    for name, trainer in (
        ("attach_trainer", lost),
        ("mixin", Mixed(build("llama"), Mode(sp=2).arguments(folder, 2), pad, DATA)),
    ):
        trainer.train()
        found["losses"][name] = trainer.losses
    return found


def losses_alone(folder: str) -> list[float]:
    trainer = Recorder(build("llama"), ONE.arguments(folder, 2), pad, DATA)
    trainer.train()
    return trainer.losses


def test_a_trainer_can_be_named(tmp_path: Path) -> None:
    (expected,) = run_ranks(losses_alone, 1, str(tmp_path), init=False)
    for found in run_ranks(named, 2, str(tmp_path), init=False):
        assert not found["lost"]
        assert found["by hand"]
        assert len(expected) > 0
        for losses in found["losses"].values():
            assert losses == pytest.approx(expected, rel=1e-12)


def test_one_process_is_left_alone() -> None:
    assert ParallelismConfig(sp_size=1).sequence_parallel_size == 1
    trainer = type("Plain", (), {"accelerator": object()})()
    assert attach_trainer(trainer) is None
