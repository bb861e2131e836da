"""Block kernels: attention of some queries to some keys, with its log-sum-exp, to be merged with
other blocks.

torch has one for each device, so that the package flash-attn is never required. The backward takes
the output and the log-sum-exp over all keys, whichever keys the block has.
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
    """The settings of one block.

    Args:
        is_causal: whether query i of a square block sees only keys 0 to i.
        scale: factor on the scores.
        seed: of the dropout mask, the same in forward and backward; not used without dropout.
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
        """Returns the gradients of query, key and value; `out` and `lse` are those over all
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
    """A kernel whose calls are small enough for 32-bit indices: larger ones are split by rows, then
    by heads.

    Args:
        kernel: computes the parts.
        limit: elements of the largest tensor of a call, key/value heads counted once for each query
            head.
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
            for total, index, grad_part in zip(totals, (q, k, k), part):
                total[index] += grad_part
        return totals[0], totals[1], totals[2]


def block_part(block: Block, number: int, heads: slice) -> Block:
    """Returns the settings of a part of a block, with its own dropout mask and biases."""
    alibi = None if block.alibi is None else block.alibi.for_heads(heads)
    return Block(block.is_causal, block.scale, (2 * block.seed + number) % 2**62, alibi)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that sums of many terms are accumulated in: float32, and float64 for
    float64.
    """
    return torch.promote_types(dtype, torch.float32)
