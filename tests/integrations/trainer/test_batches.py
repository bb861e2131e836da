"""Batches and options that a Trainer takes: packing collators, samplers, datasets without a length,
checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import DataCollatorWithFlattening

from tests.helpers.models import build
from tests.helpers.ranks import run_ranks
from tests.helpers.trainer_jobs import FIRST_ID, ONE, Mode, Recorder, Samples, pad, run_of, samples
from ulysses_accel import MemoryConfig

BATCH = 4
LENGTHS = (16, 11, 14, 9, 5, 12)
TRAIN = samples(12, LENGTHS)
OPTIONS = {"max_steps": 3, "learning_rate": 1e-2}


class Endless(IterableDataset[Any]):
    """Yields the samples over and over; has no length."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from TRAIN


def lists(data: Samples) -> list[dict[str, list[int]]]:
    """Returns samples as tokenizers give them."""
    return [{name: values.tolist() for name, values in sample.items()} for sample in data]


def trained(
    mode: Mode, folder: str, collate: Callable[..., Any] = pad, data: Any = TRAIN, **options: Any
) -> Any:
    arguments = mode.arguments(folder, options.pop("batch_size", BATCH), **{**OPTIONS, **options})
    trainer = Recorder(build("llama"), arguments, collate, data, samples(4, seed=1))
    trainer.train()
    state, installed = trainer.state, getattr(trainer.accelerator, "memory", None)
    found = {"best": state.best_global_step, "seen": state.num_input_tokens_seen}
    found["features"] = trainer.model.is_gradient_checkpointing + len(
        installed.installed if installed else ()
    )
    return {**run_of(trainer), **found}


def job(mode: Mode, folder: str) -> dict[str, Any]:
    """Trains with each kind of batch; one process is given the plain form of it."""
    flat = {
        "return_flash_attn_kwargs": mode != ONE,
        "return_position_ids": mode == ONE,
        "return_seq_idx": mode != ONE,
    }
    best = {"eval_strategy": "steps", "save_strategy": "best", "load_best_model_at_end": True}
    best.update(eval_steps=1, metric_for_best_model="eval_loss", greater_is_better=True)
    memory = MemoryConfig(tiled_loss=True, tiled_loss_tokens=4)
    return {
        "packed": trained(mode, folder, DataCollatorWithFlattening(), lists(TRAIN)),
        "packed, cu_seq_lens": trained(
            mode, folder, DataCollatorWithFlattening(**flat), lists(TRAIN)
        ),
        "no length": trained(
            mode, folder, data=Endless(), include_num_input_tokens_seen="non_padding"
        ),
        "checkpointing": trained(
            mode, folder, gradient_checkpointing=mode != ONE, memory_config=memory
        ),
        "best": trained(mode, folder, **best),
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process's results."""
    found: dict[str, Any] = run_ranks(
        job, 1, ONE, str(tmp_path_factory.mktemp("alone")), init=False
    )[0]
    return found


CODES = {
    "packed": (
        "batch",
        "DataCollatorWithFlattening()",
        "Trainer(model, args, DataCollatorWithFlattening(), data)",
    ),
    "packed, cu_seq_lens": (
        "batch",
        "DataCollatorWithFlattening(return_flash_attn_kwargs=True)",
        "Trainer(model, args, DataCollatorWithFlattening(return_flash_attn_kwargs=True), data)",
    ),
    "no length": ("batch", "IterableDataset, max_steps", "TrainingArguments(max_steps=1000, ...)"),
    "checkpointing": (
        "trainer",
        "Trainer, gradient_checkpointing and tiled loss",
        "ParallelismConfig(sp_size=2, memory_config=MemoryConfig(tiled_loss=True))",
    ),
    "best": (
        "trainer",
        "Trainer, load_best_model_at_end",
        "TrainingArguments(load_best_model_at_end=True, ...)",
    ),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mode], list[dict[str, Any]]]:
    """Returns all ranks' results of a mode, which is run once."""
    found: dict[Mode, list[dict[str, Any]]] = {}

    def result(mode: Mode) -> list[dict[str, Any]]:
        if mode not in found:
            found[mode] = run_ranks(job, 2, mode, str(tmp_path_factory.mktemp("ranks")), init=False)
        return found[mode]

    return result


@pytest.mark.parametrize(
    ("mode", "name"), [(Mode(sp=2), "sp"), (Mode(cp=2), "cp")], ids=["sp", "cp"]
)
def test_batches(mode: Mode, name: str, alone: dict[str, Any], results: Any, support: Any) -> None:
    ranks = results(mode)
    assert alone["packed"]["losses"] == pytest.approx(
        alone["packed, cu_seq_lens"]["losses"], rel=1e-12
    )
    # The "best" loss here is the largest, so that its step is not the last one and its parameters
    # are taken back.
    assert alone["best"]["best"] < alone["best"]["steps"]
    for case, expected in alone.items():
        for rank in ranks:
            found = rank[case]
            # Each rank has its half of the longest row, padded to what the layout asks for.
            assert max(found["tokens"]) in range(
                max(expected["tokens"]) // 2, max(expected["tokens"]) // 2 + 3
            ), case
            assert found["losses"] == pytest.approx(expected["losses"], rel=1e-11), case
            assert found["best"] == expected["best"]
            assert found["features"] == (2 if case == "checkpointing" else 0)
            assert case != "no length" or found["seen"] == expected["seen"] > 0
            for parameter, value in expected["parameters"].items():
                torch.testing.assert_close(
                    found["parameters"][parameter], value, rtol=0, atol=1e-11, msg=case
                )
        area, subject, code = CODES[case]
        support(area, subject, name, code=code)


def test_b10_packing_does_not_crash(alone: dict[str, Any], results: Any) -> None:
    for rank in results(Mode(sp=2)):
        assert rank["packed, cu_seq_lens"]["losses"] == pytest.approx(
            alone["packed"]["losses"], rel=1e-11
        )


def grouped(folder: str) -> list[list[int]]:
    """Returns the samples of each batch that this rank's collator was given, over two epochs."""
    drawn: list[list[int]] = []

    def collate(batch: Samples) -> Any:
        drawn.append([int(sample["input_ids"][0]) - FIRST_ID for sample in batch])
        return pad(batch)

    options = {"train_sampling_strategy": "group_by_length", "max_steps": -1, "num_train_epochs": 2}
    trained(Mode(sp=2, dp=2), folder, collate, samples(16, LENGTHS), batch_size=4, **options)
    return drawn


def test_group_by_length(tmp_path: Path, support: Any) -> None:
    ranks = run_ranks(grouped, 4, str(tmp_path), init=False)
    assert ranks[0] == ranks[1] != ranks[2] == ranks[3]
    for epoch in (slice(0, 4), slice(4, 8)):
        batches = [*ranks[0][epoch], *ranks[2][epoch]]
        assert sorted(index for batch in batches for index in batch) == list(range(16))
        # The sampler sorts runs of the batch's size times 50 or a quarter of the samples.
        lengths = [[LENGTHS[index % len(LENGTHS)] for index in batch] for batch in batches]
        assert all(abs(long - short) <= 7 for long, short in lengths)
    assert ranks[0][:4] != ranks[0][4:]
    code = "TrainingArguments(train_sampling_strategy='group_by_length', ...)"
    support("trainer", "Trainer, group_by_length", "dp × sp", code=code)
