"""Sizes of the GPU cases, and what is measured around them: the real sizes are those of Llama 3
8B's layers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Scale:
    """Sizes.

    Args:
        device: where to run.
        dtype: of weights and activations.
        hidden: hidden size; the MLP is 3.5 times as wide.
        heads: query heads.
        key_heads: key/value heads.
        vocabulary: rows of the head.
        large: tokens with which a hidden-sized tensor has more than 2^31 elements.
        loss_tile: tokens of a tile of logits, None for the default.
        unit: a sequence of 1,024 tokens in the real size; others are multiples.
        limit: seconds that a case may take.
    """

    device: torch.device
    dtype: torch.dtype
    hidden: int
    heads: int
    key_heads: int
    vocabulary: int
    large: int
    loss_tile: int | None
    unit: int
    limit: float

    @classmethod
    def of(cls, dry: bool, limit: float) -> Scale:
        """Returns the real sizes, or tiny ones for a CPU."""
        if dry:
            return cls(torch.device("cpu"), torch.float32, 64, 4, 2, 512, 1029, 128, 1, limit)
        # Not a multiple of anything, and past 2^31 by more than the largest tile.
        large = 2**31 // 4096 + 8192 + 5
        return cls(
            torch.device("cuda"), torch.bfloat16, 4096, 32, 8, 128_256, large, None, 1024, limit
        )

    def config(self, layers: int, tokens: int) -> Any:
        """Returns the configuration of a Llama of this width."""
        from transformers import LlamaConfig

        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 7 // 2,
            num_hidden_layers=layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=tokens,
            use_cache=False,
        )
        config._attn_implementation = "sdpa"
        return config


def synchronize(scale: Scale) -> None:
    """Waits for the device."""
    if scale.device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def measured(scale: Scale) -> Iterator[dict[str, Any]]:
    """Yields a row that gets the seconds and the allocator's peak of what runs inside."""
    row: dict[str, Any] = {}
    is_cuda = scale.device.type == "cuda"
    synchronize(scale)
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    yield row
    synchronize(scale)
    row["seconds"] = time.perf_counter() - start
    if is_cuda:
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
        row["reserved_bytes"] = torch.cuda.max_memory_reserved()
