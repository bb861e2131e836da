"""Block kernels: attention of some queries to some keys with its log-sum-exp, to be merged with
other blocks.

torch brings one for each device, so that `flash-attn` is never required. The backward takes the
output and the log-sum-exp of the whole softmax, whatever part of the keys the block has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ulysses_accel import _private_api
from ulysses_accel.attention.alibi import Alibi
from ulysses_accel.attention.kernels.limits import MAX_ELEMENTS, halves, num_elements


@dataclass(frozen=True)
class Block:
    """What a block is computed with, apart from its tensors.

    Args:
        is_causal: whether query i of the square sees only keys 0 to i.
        scale: factor on the scores.
        seed: of the dropout mask, the same forward and backward; not used without dropout.
        alibi: biases by distance; None for none.
    """

    is_causal: bool
    scale: float
    seed: int = 0
    alibi: Alibi | None = None


class BlockKernel(Protocol):
    """Attention of a block; shapes `[B, H, q, D]`, `[B, K, k, D]`, causal blocks are square."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, block: Block
    ) -> tuple[Tensor, Tensor]:
        """Returns the output `[B, H, q, D]` and its log-sum-exp `[B, H, q]`."""
        ...

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        block: Block,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of query, key and value, given output and log-sum-exp over all
        keys.
        """
        ...


class CPUKernel:
    """torch's flash attention for CPU; float32, float64, bfloat16 and float16, grouped heads
    included.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, block: Block
    ) -> tuple[Tensor, Tensor]:
        out, lse = _private_api.attention_operator("cpu_flash")(
            query, key, value, 0.0, block.is_causal, scale=block.scale
        )
        return out, lse

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        block: Block,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads: Any = _private_api.attention_operator("cpu_flash_backward")(
            grad, query, key, value, out, lse, 0.0, block.is_causal, scale=block.scale
        )
        return grads[0], grads[1], grads[2]


@dataclass(frozen=True)
class BoundedKernel:
    """A kernel whose calls stay small enough for 32-bit indices: larger ones are cut by rows, then
    by heads.

    Args:
        kernel: computes the parts.
        limit: elements of the largest tensor of a call, key/value heads counted as often as they
            are read.
    """

    kernel: BlockKernel
    limit: int = MAX_ELEMENTS

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, block: Block
    ) -> tuple[Tensor, Tensor]:
        """As the kernel's."""
        parts = halves(query, key) if num_elements(query, key) > self.limit else ()
        if not parts:
            return self.kernel.forward(query, key, value, block)
        out, lse = query.new_empty(0), query.new_empty(0)
        for number, (rows, heads, key_heads) in enumerate(parts):
            part = self.forward(
                query[rows, heads],
                key[rows, key_heads],
                value[rows, key_heads],
                block_part(block, number, heads),
            )
            if number == 0:
                out, lse = (t.new_empty(*query.shape[:2], *t.shape[2:]) for t in part)
            out[rows, heads], lse[rows, heads] = part
        return out, lse

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        block: Block,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As the kernel's."""
        parts = halves(query, key) if num_elements(query, key) > self.limit else ()
        if not parts:
            return self.kernel.backward(grad, query, key, value, out, lse, block)
        totals = tuple(torch.zeros_like(tensor) for tensor in (query, key, value))
        for number, (rows, heads, key_heads) in enumerate(parts):
            q, k = (rows, heads), (rows, key_heads)
            part = self.backward(
                grad[q],
                query[q],
                key[k],
                value[k],
                out[q],
                lse[q],
                block_part(block, number, heads),
            )
            for total, place, found in zip(totals, (q, k, k), part):
                total[place] += found
        return totals[0], totals[1], totals[2]


def block_part(block: Block, number: int, heads: slice) -> Block:
    """Returns what a part of a block is computed with: parts have dropout masks and biases of their
    own.
    """
    alibi = None if block.alibi is None else block.alibi.for_heads(heads)
    return Block(block.is_causal, block.scale, (2 * block.seed + number) % 2**62, alibi)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns what blocks are merged in: float32, and float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
