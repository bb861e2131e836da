"""Models that count positions from the attention mask are not given other ones in silence."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import OPTConfig, OPTForCausalLM

from tests.ranks import run_ranks
from ulysses_accel import ParallelismConfig
from ulysses_accel.errors import BatchError

TOKENS = torch.arange(24).reshape(2, 12) % 60 + 2
MASK = torch.ones(2, 12, dtype=torch.long)
MASK[1, :5] = 0


def forward(batch: dict[str, Tensor]) -> Tensor:
    accelerator = Accelerator(cpu=True, parallelism_config=ParallelismConfig(sp_size=2))
    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=32,
        dropout=0.0,
    )
    model = OPTForCausalLM(config)
    loader = DataLoader([0], batch_size=1, collate_fn=lambda _: dict(batch))
    model, _, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    (sharded,) = list(loader)
    return model(**sharded).logits.detach()


def test_left_padding_without_positions_is_refused() -> None:
    def body() -> None:
        with pytest.raises(BatchError, match="embed_positions would count from the first real token on"):
            forward({"input_ids": TOKENS, "attention_mask": MASK})

    run_ranks(body, 2, init=False)


def test_given_positions_and_right_padding_are_computed() -> None:
    given = {"input_ids": TOKENS, "attention_mask": MASK, "position_ids": (MASK.cumsum(1) - 1).clamp(min=0)}
    right = {"input_ids": TOKENS, "attention_mask": MASK.flip(1)}
    for batch in (given, right):
        assert all(logits.shape == (2, 6, 64) for logits in run_ranks(lambda b=batch: forward(b), 2, init=False))
