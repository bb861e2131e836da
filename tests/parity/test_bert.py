"""BERT's pre-training model: masked words by token and sentence order by sample, in one loss,
exactly one process's.

Tolerances as in `jobs`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForPreTraining

import ulysses_accel.integrations.attach  # noqa: F401  imported before the fork, so that ranks start warm
from tests.helpers.parity_jobs import (
    EXACT,
    Engine,
    assert_parity,
    compare,
    counted_linear_tokens,
    full_gradients,
    report,
)
from tests.helpers.ranks import run_ranks

ROWS, LENGTH, PAD = 3, 24, 0
LAYOUTS = {"sp": (2, 1), "cp": (1, 2), "cp × sp": (2, 2)}
Batch = dict[str, Tensor]


def build() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForPreTraining(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def make_batch() -> Batch:
    """Returns pairs of segments of uneven lengths, of whose words every third is to be told."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 64, (ROWS, LENGTH), generator=generator)
    lengths = torch.tensor([[LENGTH], [15], [4]])
    mask = (torch.arange(LENGTH) < lengths).long()
    chosen = (torch.rand(ids.shape, generator=generator) < 0.3) & (mask == 1)
    return {
        "input_ids": ids.masked_fill(chosen, 4).masked_fill(mask == 0, PAD),
        "token_type_ids": ((torch.arange(LENGTH) >= lengths // 2) & (mask == 1)).long(),
        "attention_mask": mask,
        "labels": ids.masked_fill(~chosen, -100),
        "next_sentence_label": torch.tensor([1, 0, 1]),
    }


def sharded_job(sp_size: int, cp_size: int, expected: tuple[float, Batch, Tensor]) -> Any:
    accelerator = Engine().accelerator(sp_size, cp_size=cp_size)
    loader = DataLoader([make_batch()], batch_size=1, collate_fn=lambda batches: batches[0])  # type: ignore[list-item]
    model, loader = accelerator.prepare(build(), loader)
    (batch,) = loader
    with counted_linear_tokens(model.module.bert.encoder) as seen:
        output = model(**batch)
    accelerator.backward(output.loss)
    loss, grads, order = expected
    found = compare(float(output.loss.detach()), full_gradients(model), loss, grads)
    distance = float((output.seq_relationship_logits - order).abs().max() / order.abs().max())
    return report(found), distance, output.seq_relationship_logits.detach(), sorted(set(seen))


@pytest.fixture(scope="module")
def expected() -> tuple[float, Batch, Tensor]:
    """One process's loss, gradients and logits of the order `[B, 2]`."""
    model = build()
    output = model(**make_batch())
    output.loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return float(output.loss.detach()), grads, output.seq_relationship_logits.detach()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pretraining(layout: str, expected: Any, support: Any) -> None:
    sp_size, cp_size = LAYOUTS[layout]
    found = run_ranks(sharded_job, sp_size * cp_size, sp_size, cp_size, expected)
    assert_parity([{"pretraining": case} for case, *_ in found])
    for _, distance, order, seen in found:
        assert distance <= EXACT
        assert torch.equal(order, found[0][2])
        assert seen == [ROWS * LENGTH // (sp_size * cp_size)]
    code = "loss = BertForPreTraining(config)(**batch).loss"
    support("model", "BERT, masked words and sentence order", layout, code=code)
