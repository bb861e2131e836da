"""What is refused by structure: each trait in a tiny model of its own, beside the same model
without it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    DogeConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ulysses_accel.attention import SequenceAttention, describe_forward, install
from ulysses_accel.attention.huggingface.masks import DescribedMask
from ulysses_accel.errors import UnsupportedModelError
from ulysses_accel.introspection.layers import own_mask
from ulysses_accel.introspection.profile import check_model
from ulysses_accel.introspection.routing import check_heads
from ulysses_accel.sequence.description import SequenceDescription

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def refusal(model: nn.Module, sp_size: int = 2) -> str:
    """The findings about a model; empty when it is taken."""
    try:
        check_model(model, sp_size)
    except UnsupportedModelError as error:
        return str(error)
    return ""


def build(config: Any) -> Any:
    return AutoModelForCausalLM.from_config(config)


def test_a_plain_model_is_taken() -> None:
    assert refusal(build(LlamaConfig(**SIZES))) == ""


def test_a_mask_made_from_the_tokens() -> None:
    found = refusal(build(DogeConfig(**SIZES)))
    assert (
        "model.layers.0.self_attn (DogeAttention) attends with a mask that it makes from its own "
        "tokens" in found
    )
    # Told once, not for each layer.
    assert found.count("DogeAttention") == 1


class LabelsCut(LlamaForCausalLM):  # type: ignore[misc]
    def forward(
        self, input_ids: Any = None, position_ids: Any = None, labels: Any = None, **kwargs: Any
    ) -> Any:
        logits = super().forward(input_ids, position_ids=position_ids, **kwargs).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class LossWithoutKeywords(LlamaForCausalLM):  # type: ignore[misc]
    def forward(
        self, input_ids: Any = None, position_ids: Any = None, labels: Any = None, **kwargs: Any
    ) -> Any:
        logits = super().forward(input_ids, position_ids=position_ids, **kwargs).logits
        return self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)


def test_a_loss_that_shifts_by_itself() -> None:
    assert "cuts the labels by itself (labels[:, 1:])" in refusal(LabelsCut(LlamaConfig(**SIZES)))


def test_a_loss_that_shift_labels_can_not_reach() -> None:
    found = refusal(LossWithoutKeywords(LlamaConfig(**SIZES)))
    assert "shift_labels can't reach it" in found


class Heterogeneous:
    """As transformers' configs whose layers differ: the value of all layers together is refused."""

    per_layer_config = (
        SimpleNamespace(num_attention_heads=4),
        SimpleNamespace(num_attention_heads=2),
    )

    @property
    def num_attention_heads(self) -> int:
        raise RuntimeError("'num_attention_heads' is a per-layer attribute")


def test_heads_that_differ_between_layers() -> None:
    assert list(check_heads(Heterogeneous(), 2)) == []
    (found,) = check_heads(Heterogeneous(), 3)
    assert "sp_size=3 is more than num_attention_heads=2" in str(found)


class Attends(nn.Module):
    """Calls attention as transformers' models do; `indexer` is the part that makes a mask."""

    def __init__(self, indexer: nn.Module | None = None) -> None:
        super().__init__()
        self.indexer = indexer

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        encoder_mask: Tensor | None = None,
    ) -> Any:
        interface: Any = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
        if self.indexer is not None:
            attention_mask = self.indexer(hidden)
        if encoder_mask is not None:
            attention_mask = encoder_mask
        return interface(self, hidden, hidden, hidden, attention_mask)


class AddsToItsMask(nn.Module):
    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Any:
        interface = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
        attention_mask += hidden.sum()
        return interface(self, hidden, hidden, hidden, attention_mask=attention_mask)


class WithoutMask(nn.Module):
    def forward(self, hidden: Tensor) -> Any:
        interface = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
        return interface(self, hidden, hidden, hidden, attention_mask=None, is_causal=False)


@pytest.mark.parametrize(
    ("module", "made"),
    [
        (Attends(), None),
        (Attends(nn.Identity()), "self.indexer(hidden)"),
        (AddsToItsMask(), "hidden.sum()"),
        (WithoutMask(), None),
        (nn.Linear(1, 1), None),
    ],
)
def test_whose_mask_attention_gets(module: nn.Module, made: str | None) -> None:
    assert own_mask(module) == made


def test_a_mask_beside_the_description_is_refused_when_it_comes() -> None:
    model = build(LlamaConfig(**SIZES))
    installed = install(model, SequenceAttention(None))
    layer = model.model.layers[0].self_attn
    attention = ALL_ATTENTION_FUNCTIONS[layer.config._attn_implementation]
    query, key = torch.zeros(1, 4, 8, 4), torch.zeros(1, 2, 8, 4)
    description = SequenceDescription(8, 1, (((0, 8),),))
    with describe_forward(description):
        out, _ = attention(layer, query, key, key, None)
        assert out.shape == (1, 8, 4, 4)
        assert out.is_contiguous()
        with pytest.raises(UnsupportedModelError, match="a mask that its model made by itself"):
            attention(layer, query, key, key, torch.zeros(1, 1, 8, 8))
    installed.close()
    assert installed.num_calls == 1


def test_a_mask_is_cut_only_where_nothing_is_lost() -> None:
    mask = DescribedMask(SequenceDescription(8, 1, (((0, 8),),)))
    assert mask[:, :, slice(-0, None), :] is mask
    with pytest.raises(UnsupportedModelError, match="logits_to_keep"):
        mask[:, :, -1:, :]


def test_a_bidirectional_decoder_is_refused() -> None:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    encoder = BertConfig(vocab_size=40, **sizes)
    for is_decoder in (True, False):
        decoder = BertConfig(
            vocab_size=40, is_decoder=is_decoder, add_cross_attention=is_decoder, **sizes
        )
        both = EncoderDecoderConfig(encoder=encoder.to_dict(), decoder=decoder.to_dict())
        both.decoder_start_token_id = both.pad_token_id = 0
        assert ("is_causal=False" in refusal(EncoderDecoderModel(both))) is not is_decoder
