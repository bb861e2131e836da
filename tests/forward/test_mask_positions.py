"""Models that count positions by the attention mask get those of the whole row, whichever side is
padded.
"""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import OPTConfig, OPTForCausalLM

from tests.helpers.ranks import run_ranks
from ulysses_accel import ParallelismConfig

TOKENS = torch.arange(24).reshape(2, 12) % 60 + 2
LEFT = torch.ones(2, 12, dtype=torch.long)
LEFT[1, :5] = 0
HOLE = torch.ones(2, 12, dtype=torch.long)
HOLE[0, 4:7] = 0


def build() -> OPTForCausalLM:
    torch.manual_seed(0)
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
    return OPTForCausalLM(config).double()


def forward(batch: dict[str, Tensor]) -> Tensor:
    accelerator = Accelerator(cpu=True, parallelism_config=ParallelismConfig(sp_size=2))
    loader = DataLoader([0], batch_size=1, collate_fn=lambda _: dict(batch))
    model, loader = accelerator.prepare(build(), loader)
    (sharded,) = list(loader)
    return model(**sharded).logits.detach()


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": TOKENS, "attention_mask": LEFT},
        {"input_ids": TOKENS, "attention_mask": LEFT.flip(1)},
        {"input_ids": TOKENS, "attention_mask": HOLE},
        {
            "input_ids": TOKENS,
            "attention_mask": LEFT,
            "position_ids": (LEFT.cumsum(1) - 1).clamp(min=0),
        },
    ],
    ids=["left", "right", "hole", "given"],
)
def test_logits_are_those_of_one_process(batch: dict[str, Tensor]) -> None:
    expected = build()(**batch).logits.detach()
    logits = torch.cat(run_ranks(lambda: forward(batch), 2, init=False), dim=1)
    counted = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[counted], expected[counted], rtol=1e-12, atol=1e-12)
