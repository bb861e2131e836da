"""Liger's patched forward on sharded sequences, without its kernels, which need a GPU.

What counts is the contract of the forward that Liger binds to a model: it takes `shift_labels`,
makes the loss of hidden states and the head's weight, and returns no logits in training. Here it
computes the same with torch.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

import ulysses_accel
from tests.helpers.batches import CASES, loader
from tests.helpers.models import build, cross_entropy
from tests.helpers.parity_jobs import (
    Engine,
    Report,
    assert_parity,
    compare,
    full_gradients,
    plain_step,
    report,
    zero_gradients,
)
from tests.helpers.ranks import run_ranks
from ulysses_accel.errors import UnsupportedModelError
from ulysses_accel.memory.apply import apply_memory

KINDS = ("plain", "packed", "padded right", "prompt masked")


def fused_forward(
    self: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
    skip_logits: bool | None = None,
    **kwargs: Any,
) -> CausalLMOutputWithPast:
    """Computes what Liger's forward of a Llama does, in its order of arguments."""
    shifted, num_items = kwargs.pop("shift_labels", None), kwargs.pop("num_items_in_batch", None)
    hidden = self.model(
        input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
    )[0]
    skip = (self.training and labels is not None) if skip_logits is None else skip_logits
    logits = hidden @ self.lm_head.weight.T
    loss = (
        cross_entropy(logits, labels, logits.shape[-1], num_items, shifted)
        if labels is not None
        else None
    )
    return CausalLMOutputWithPast(loss=loss, logits=None if skip else logits)


def patched() -> Any:
    """Returns a model with the forward bound to the instance, as `apply_liger_kernel(model=model)`
    leaves it.
    """
    model = build("llama")
    model.forward = MethodType(fused_forward, model)
    return model


def steps(expected: dict[str, Any]) -> Report:
    accelerator = Engine().accelerator(2)
    samples = [CASES[kind](0) for kind in KINDS]
    model, batches = accelerator.prepare(patched(), loader(samples))
    found = {}
    for kind, batch in zip(KINDS, batches, strict=True):
        zero_gradients(model)
        output = model(**batch)
        assert output.logits is None
        accelerator.backward(output.loss)
        losses, grads = expected[kind]
        found[kind] = report(
            compare(float(output.loss.detach()), full_gradients(model), losses[0], grads)
        )
    return found


def test_a_fused_forward_is_aggregated() -> None:
    model = build("llama")
    expected = {kind: plain_step(model, [CASES[kind](0)]) for kind in KINDS}
    assert_parity(run_ranks(steps, 2, expected, init=False), count=len(KINDS))


def test_it_is_not_tiled_a_second_time() -> None:
    model = patched()
    apply_memory(model, ulysses_accel.MemoryConfig(tiled_loss=True))
    ids = torch.arange(3, 19)[None]
    with pytest.raises(
        UnsupportedModelError, match="computed its loss without its output layer's forward"
    ):
        model(input_ids=ids, labels=ids)
