"""Models that attend by themselves, by code of their own: adapted, given back, refused where they
are strange.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.compat.xtuner.test_dispatch import own_grads, refused, tokens_and_labels, worst
from tests.helpers.own_attention import (
    BaichuanAlibiForCausalLM,
    BaichuanConfig,
    BaichuanForCausalLM,
    ChatGLMConfig,
    ChatGLMForConditionalGeneration,
)
from tests.helpers.parity_jobs import EXACT
from tests.helpers.ranks import run_ranks
from ulysses_accel.compat.xtuner import (
    dispatch_modules,
    init_sequence_parallel,
    split_for_sequence_parallel,
)

OWN_CODE: list[Callable[[], Any]] = [
    lambda: BaichuanForCausalLM(BaichuanConfig()),
    lambda: BaichuanAlibiForCausalLM(BaichuanConfig(alibi=True)),
    lambda: ChatGLMForConditionalGeneration(ChatGLMConfig()),
]


def set_checkpointing(model: nn.Module, on: bool) -> None:
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = on


def own_code(number: int) -> tuple[list[float], str, list[str]]:
    """Models with attention of their own: errors, a recompute that lost its batch, and what is left
    behind.
    """
    init_sequence_parallel(2)
    tokens, labels = tokens_and_labels()
    torch.manual_seed(0)
    model = OWN_CODE[number]().double()
    expected = model(tokens, labels=labels)
    expected.loss.backward()
    grads = {key: value.grad.clone() for key, value in model.named_parameters()}
    done = dispatch_modules(model)
    ids, own, _ = split_for_sequence_parallel(tokens, labels)
    outputs = [model(input_ids=ids, labels=own, return_dict=form) for form in (True, False)]
    losses = [outputs[0].loss, outputs[0][0], outputs[1][0]]
    model.zero_grad()
    set_checkpointing(model, True)
    first = model(input_ids=ids, labels=own).loss
    # The last batch is not the one that is recomputed.
    model(input_ids=split_for_sequence_parallel(tokens.flip(1)[:, :12], 1), labels=own[:, :6])  # type: ignore[index]
    first.backward()
    found = [worst(own_grads(model), grads)]
    set_checkpointing(model, False)
    losses += [first, model.eval()(tokens, labels=labels).loss]
    # The model's forward is overridden too; modules() begins with the model.
    _, attention, *_ = (part for part in model.train().modules() if "forward" in vars(part))
    ours = attention.forward
    attention.forward = maskless(ours)
    lost = refused(model(input_ids=ids, labels=own).loss.backward)
    attention.forward = ours
    done.close()
    names = ("forward", "_prepare_decoder_attention_mask")
    left = [name for module in model.modules() for name in names if name in vars(module)]
    return [*found, *(float((loss - expected.loss).abs().detach()) for loss in losses)], lost, left


def maskless(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Attention as in a model whose checkpointed part is given no mask."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        kept = {key: value for key, value in kwargs.items() if key != "attention_mask"}
        tensors = [value for value in args if isinstance(value, Tensor)]
        return checkpoint(lambda *inner: attend(*inner, **kept), *tensors, use_reentrant=False)

    return forward


@pytest.mark.parametrize("number", range(len(OWN_CODE)))
def test_own_attention_is_adapted_and_given_back(number: int) -> None:
    for errors, lost, left in run_ranks(own_code, 2, number):
        assert max(errors) <= EXACT
        assert "is recomputed in the backward pass, where its batch is not known" in lost
        assert left == []


def strange_biases() -> Any:
    """A model like Baichuan's larger one, whose biases are not ALiBi's."""
    model = BaichuanAlibiForCausalLM(BaichuanConfig(alibi=True))
    usual = model.model.get_alibi_mask
    model.model.get_alibi_mask = lambda *args: 2 * usual(*args)
    return model


def mixed_layers() -> Any:
    model = BaichuanForCausalLM(BaichuanConfig())
    del model.model.layers[0].self_attn.rotary_emb
    return model


def unknown_rotation() -> Any:
    model = BaichuanForCausalLM(BaichuanConfig())
    for layer in model.model.layers:
        layer.self_attn.__class__ = OtherAttention
    return model


class OtherAttention(nn.Module):
    """Takes no positions."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


def strange() -> list[str]:
    init_sequence_parallel(2)
    found = []
    for make in (strange_biases, mixed_layers, unknown_rotation):
        model = make()
        found.append(refused(lambda model=model: dispatch_modules(model)))  # type: ignore[misc]
        # A refused model is as it was.
        assert not hasattr(model, "xtuner_dispatch")
        assert not model._forward_pre_hooks
        assert model.config._attn_implementation != "ulysses_accel_sdpa"
    return found


def test_what_is_not_known_to_be_exact_is_refused() -> None:
    for biases, layers, rotation in run_ranks(strange, 2):
        assert "its biases by distance are not ALiBi's for 4 heads" in biases
        assert "has layers with and layers without rotary positions" in layers
        assert "takes no position_ids or does not use apply_rotary_pos_emb" in rotation
