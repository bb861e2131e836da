"""Tiny models that compute in float64 throughout, so that parity is measured and not the rounding
of a norm.

transformers computes RMS norms and the loss in float32 whatever the model's dtype; both are
replaced, in the sharded model and in its reference alike, by the same formula in the model's own
dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTBigCodeConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.integrations import unset_hf_deepspeed_config

VOCAB = 64
HIDDEN = 32
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_LEARNED = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "qwen2": lambda: Qwen2Config(**_GROUPED),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=8),
    "gpt2": lambda: GPT2Config(**_LEARNED),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=None),
    # Shorter than a document, so that it cuts; longer than a shard of four, so that it reaches over
    # one.
    "mistral_window": lambda: MistralConfig(**_GROUPED, sliding_window=6),
    "gemma": lambda: GemmaConfig(**{**_GROUPED, "num_key_value_heads": 1}, head_dim=16),
    # One key/value head, and a config that has no num_key_value_heads.
    "gpt_bigcode": lambda: GPTBigCodeConfig(**_LEARNED, multi_query=True),
    "phi": lambda: PhiConfig(**_GROUPED),
    "opt": lambda: OPTConfig(
        **{key: value for key, value in _SIZES.items() if key != "intermediate_size"},
        ffn_dim=48,
        word_embed_proj_dim=HIDDEN,
        dropout=0.0,
        attention_dropout=0.0,
    ),
}


class ExactNorm(nn.Module):
    """RMS norm in its input's own dtype; Gemma's weight counts from one."""

    def __init__(self, weight: nn.Parameter, eps: float, offset: float) -> None:
        super().__init__()
        self.weight, self.eps, self.offset = weight, eps, offset

    def forward(self, hidden: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.offset + self.weight) * hidden * scale


def cross_entropy(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """transformers' causal loss, without its cast to float32."""
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(
        logits.reshape(-1, vocab_size), shift_labels.reshape(-1), reduction=reduction
    )
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def build(name: str, dtype: torch.dtype = torch.float64, config: Any = None, seed: int = 0) -> Any:
    """Returns a model in training mode; the same call gives the same weights, in every process and
    dtype.
    """
    # A DeepSpeed engine of this process would have it built in pieces, before it has its weights.
    unset_hf_deepspeed_config()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config or CONFIGS[name](), attn_implementation="sdpa"
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than transformers draws them, so that attention is far from uniform; biases and
            # norms too.
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                eps = getattr(child, "variance_epsilon", None) or child.eps
                offset = 1.0 if type(child).__name__.startswith("Gemma") else 0.0
                setattr(parent, child_name, ExactNorm(child.weight, eps, offset))
    model.loss_function = cross_entropy
    return model.train().to(dtype)
