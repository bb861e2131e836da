"""A stock Trainer with a collator that masks words at random: the ranks of a sequence see the same
masks.

Tolerance: losses in float64 to 1e-10 after some AdamW steps, as in
`tests.examples.test_bert_example`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    set_seed,
)

import ulysses_accel.integrations.attach  # noqa: F401  imported before the fork, so that ranks start warm
from tests.helpers.engine_jobs import error_of
from tests.helpers.parity_jobs import Engine
from tests.helpers.ranks import run_ranks
from tests.helpers.trainer_jobs import ONE, Mode

STEPS, ROWS, LENGTH = 4, 2, 16
CURVE_EXACT = 1e-10
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(43))]
# How the collator comes to its random numbers: from the process's own generator, its own one, or a
# worker's.
RANDOM = {"the process": {}, "its own": {"seed": 7}, "a worker": {"workers": 1}}
Losses = dict[str, list[float]]


class Recorder(Trainer):
    """A stock Trainer that remembers its losses, and how many tokens the model saw of a row."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.losses: list[float] = []
        self.tokens: set[int] = set()
        super().__init__(*args, **kwargs)
        self.model.bert.encoder.register_forward_pre_hook(
            lambda _, args: self.tokens.add(args[0].shape[1])
        )

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        return loss


def collator(seed: int | None = None) -> DataCollatorForLanguageModeling:
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})
    return DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3, seed=seed)


def samples(count: int) -> list[dict[str, Tensor]]:
    """Returns rows of uneven lengths: the collator pads them."""
    generator = torch.Generator().manual_seed(0)
    lengths = [LENGTH if index % 2 else LENGTH - 5 for index in range(count)]
    return [
        {"input_ids": torch.randint(5, len(WORDS), (length,), generator=generator)}
        for length in lengths
    ]


def build(dropout: float = 0.0) -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    torch.manual_seed(0)
    return BertForMaskedLM(config).double()


def train(
    mode: Mode, folder: str, dropout: float = 0.0, workers: int = 0, seed: int | None = None
) -> Recorder:
    options = {"max_steps": STEPS, "learning_rate": 1e-2, "dataloader_num_workers": workers}
    arguments = mode.arguments(folder, ROWS * mode.dp, **options)
    trainer = Recorder(build(dropout), arguments, collator(seed), samples(STEPS * ROWS))
    trainer.train()
    return trainer


def train_job(mode: Mode, folder: str) -> tuple[Losses, list[int]]:
    """Returns the losses of a job for each source of random numbers, and the tokens that the model
    saw of a row.
    """
    trained = {name: train(mode, folder, **options) for name, options in RANDOM.items()}  # type: ignore[arg-type]
    tokens = set().union(*(trainer.tokens for trainer in trained.values()))
    return {name: trainer.losses for name, trainer in trained.items()}, sorted(tokens)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """One process's losses."""
    (found,) = run_ranks(train_job, 1, ONE, str(tmp_path_factory.mktemp("alone")), init=False)
    losses, tokens = found
    assert tokens == [LENGTH]
    assert len({tuple(curve) for curve in losses.values()}) == len(RANDOM)
    return losses


@pytest.mark.parametrize("mode", [Mode(sp=2), Mode(cp=2)], ids=["sp", "cp"])
def test_masked_words(mode: Mode, alone: Losses, tmp_path: Path, support: Any) -> None:
    for losses, tokens in run_ranks(train_job, 2, mode, str(tmp_path), init=False):
        assert tokens == [LENGTH // 2]
        for name, expected in alone.items():
            assert len(expected) == STEPS
            assert losses[name] == pytest.approx(expected, rel=CURVE_EXACT), name
    name = "sp" if mode.sp > 1 else "cp"
    support("trainer", "Trainer, DataCollatorForLanguageModeling", name, code=CODE)


CODE = "Trainer(model, args, DataCollatorForLanguageModeling(tokenizer), data)"


def dropout_job(folder: str) -> list[float]:
    return train(Mode(sp=2), folder, dropout=0.1).losses


def test_dropout_does_not_set_the_masks_of_the_ranks_apart(tmp_path: Path) -> None:
    """Dropout draws from the generator that the collator draws from; each rank as many numbers."""
    first, second = run_ranks(dropout_job, 2, str(tmp_path), init=False)
    assert len(first) == STEPS
    assert first == second


def with_order(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Collates rows whose tokens are the same on all ranks, and draws what belongs to a row as a
    whole.
    """
    batch = collator(seed=7)(rows)
    return {**batch, "next_sentence_label": torch.randint(2, (len(rows),))}


def seeds_job() -> list[str]:
    """Returns how batches are refused of which the ranks drew something from different seeds."""
    errors = []
    for collate in (collator(), with_order):
        accelerator = Engine().accelerator(2)
        loader = DataLoader(samples(16), batch_size=16, collate_fn=collate)  # type: ignore[arg-type]
        _, loader = accelerator.prepare(build(), loader)
        set_seed(accelerator.process_index)
        errors.append(error_of(list, loader))
    return errors


def test_random_numbers_of_different_seeds_are_refused() -> None:
    first, second = run_ranks(seeds_job, 2)
    assert first == second
    for error in first:
        assert "drew different batches" in error
        assert "seed its sampler and collate function alike" in error
