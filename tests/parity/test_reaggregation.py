"""A loss that the model has aggregated may be aggregated again by the documented loop, as users of
fused losses do.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed.nn.functional
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.ranks import run_ranks
from ulysses_accel import ParallelismConfig

TOKENS = torch.arange(40).reshape(2, 20) * 7 % 64
LABELS = TOKENS.masked_fill(torch.arange(20) < 13, -100)


def double_cross_entropy(
    logits: Tensor, labels: Tensor, vocab_size: int, shift_labels: Tensor | None = None, **_: object
) -> Tensor:
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    return torch.nn.functional.cross_entropy(logits.view(-1, vocab_size), shift_labels.reshape(-1))


def build() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).double()
    model.loss_function = double_cross_entropy
    return model


def gradients() -> tuple[float, dict[str, Tensor]]:
    accelerator = Accelerator(cpu=True, parallelism_config=ParallelismConfig(sp_size=2))
    model = build()
    loader = DataLoader(
        [0], batch_size=1, collate_fn=lambda _: {"input_ids": TOKENS, "labels": LABELS}
    )
    model, _, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loader
    )
    (batch,) = list(loader)
    group = accelerator.torch_device_mesh["sp"].get_group()
    losses = torch.distributed.nn.functional.all_gather(model(**batch).loss, group=group)
    counts = torch.distributed.nn.functional.all_gather(
        (batch["shift_labels"] != -100).sum(), group=group
    )
    loss = sum(loss * count for loss, count in zip(losses, counts) if count > 0) / sum(counts)
    accelerator.backward(loss)
    named = accelerator.unwrap_model(model).named_parameters()
    return float(loss), {name: parameter.grad for name, parameter in named}


def test_aggregating_twice_changes_nothing() -> None:
    expected = build()
    loss = expected(input_ids=TOKENS, labels=LABELS).loss
    loss.backward()
    for value, grads in run_ranks(gradients, 2, init=False):
        assert value == pytest.approx(float(loss), rel=1e-12)
        for name, parameter in expected.named_parameters():
            # float64 with sums in another order.
            assert (grads[name] - parameter.grad).norm() <= 1e-12 * parameter.grad.norm(), name
