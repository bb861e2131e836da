"""A Trainer's own losses on sharded sequences: `compute_loss_func`, label smoothing, averages by
device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM

from tests.helpers.engine_jobs import error_of
from tests.helpers.models import CONFIGS, VOCAB, build
from tests.helpers.ranks import run_ranks
from tests.helpers.trainer_jobs import ONE, Mode, Recorder, Samples, pad, run_of, samples

TRAIN = samples(12, (16, 11, 14, 9))
CLASSES = 5
OPTIONS = {"max_steps": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}


def focal(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Shifts by itself, as a causal model's loss does; each token's loss is weighed by how wrong it
    was.
    """
    logits, targets = outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
    return ((1 - (-losses).exp()) * losses).sum() / num_items_in_batch


def masked(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Compares each token with its own label."""
    logits = outputs.logits.flatten(0, 1)
    return (
        2
        * F.cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=-100)
        / num_items_in_batch
    )


def bert() -> BertForMaskedLM:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
    }
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**sizes, **without, num_attention_heads=4)).double()


def classifier() -> Any:
    torch.manual_seed(0)
    config = CONFIGS["gpt2"]()
    config.num_labels = CLASSES
    return AutoModelForSequenceClassification.from_config(config).double()


def with_classes(batch: Samples) -> dict[str, Tensor]:
    padded = pad(batch)
    return {**padded, "labels": padded["input_ids"][:, 1] % CLASSES}


def trained(
    mode: Mode, folder: str, model: Any, function: Any = None, collate: Any = pad, **options: Any
) -> dict[str, Any]:
    arguments = mode.arguments(folder, 4, **{**OPTIONS, **options})
    trainer = Recorder(model, arguments, collate, TRAIN, compute_loss_func=function)
    trainer.train()
    return run_of(trainer)


def job(mode: Mode, folder: str) -> dict[str, Any]:
    return {
        "compute_loss_func": trained(mode, folder, build("llama"), focal),
        "label smoothing": trained(mode, folder, build("llama"), label_smoothing_factor=0.2),
        "compute_loss_func, own tokens": trained(mode, folder, bert(), masked),
        "label smoothing, own tokens": trained(mode, folder, bert(), label_smoothing_factor=0.2),
        # Alone, this model's loss is not divided over accumulated batches: it takes no
        # num_items_in_batch.
        "samples": trained(
            mode, folder, classifier(), collate=with_classes, gradient_accumulation_steps=1
        ),
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process's results."""
    found: dict[str, Any] = run_ranks(
        job, 1, ONE, str(tmp_path_factory.mktemp("alone")), init=False
    )[0]
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any], loss: float = 1e-12) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=loss)
    for name, value in expected["parameters"].items():
        torch.testing.assert_close(found["parameters"][name], value, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("mode", "name"), [(Mode(sp=2), "sp"), (Mode(cp=2), "cp")], ids=["sp", "cp"]
)
def test_own_losses(
    mode: Mode, name: str, alone: dict[str, Any], tmp_path: Path, support: Any
) -> None:
    for rank in run_ranks(job, mode.world_size, mode, str(tmp_path), init=False):
        assert rank.keys() == alone.keys()
        for case, expected in alone.items():
            assert max(rank[case]["tokens"]) <= max(expected["tokens"]) // 2
            # Stock smoothing sums over the vocabulary in float32, for the value alone.
            assert_same(rank[case], expected, 1e-7 if "smoothing" in case else 1e-12)
    support(
        "loss",
        "Trainer(compute_loss_func=...)",
        name,
        code="Trainer(model, args, compute_loss_func=function)",
    )
    support(
        "loss", "label smoothing", name, code="TrainingArguments(label_smoothing_factor=0.1, ...)"
    )


def by_device(mode: Mode, folder: str) -> dict[str, Any]:
    return trained(mode, folder, build("llama"), focal, average_tokens_across_devices=False)


def test_averages_by_device_are_those_of_data_parallel_ranks(tmp_path: Path, support: Any) -> None:
    expected = run_ranks(by_device, 2, Mode(dp=2), str(tmp_path), init=False)
    ranks = run_ranks(by_device, 4, Mode(sp=2, dp=2), str(tmp_path), init=False)
    assert expected[0]["losses"] != expected[1]["losses"]
    mean = {
        **expected[0],
        "losses": [sum(pair) / 2 for pair in zip(expected[0]["losses"], expected[1]["losses"])],
    }
    for rank in ranks:
        assert_same(rank, mean)
    code = "TrainingArguments(average_tokens_across_devices=False, ...)"
    support("loss", "Trainer, averages by device", "dp × sp", code=code)


def unshifted(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Counts on labels that were shifted by the collator."""
    logits = outputs["logits"].flatten(0, 1)
    return (
        F.cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=-100)
        / num_items_in_batch
    )


def refusals(folder: str) -> list[str]:
    mode = Mode(sp=2)
    found = [error_of(trained, mode, folder, build("llama"), unshifted)]
    arguments = {"train_sampling_strategy": "batch_rebalance"}
    return [*found, error_of(trained, mode, folder, build("llama"), **arguments)]


def test_refusals(tmp_path: Path, support: Any) -> None:
    ranks = run_ranks(refusals, 2, str(tmp_path), init=False)
    assert ranks[0] == ranks[1]
    shifting, sampling = ranks[0]
    assert "compute_loss_func unshifted uses the last token's logits" in shifting
    assert "logits[:, :-1] with labels[:, 1:]" in shifting
    assert "train_sampling_strategy='batch_rebalance'" in sampling
    support.refused(
        "loss", "Trainer(compute_loss_func=...) that does not shift", "sp", "labels at shards' ends"
    )
    support.refused("trainer", "Trainer, batch_rebalance", "sp", "deals other samples to each rank")
