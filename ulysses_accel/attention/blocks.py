"""Block kernels: attention of some queries to some keys with its log-sum-exp, to be merged with other blocks.

torch brings one for each device, so that `flash-attn` is never required. The backward takes the output and the
log-sum-exp of the whole softmax, whatever part of the keys the block has.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from ulysses_accel.attention.tiles import Tile
from ulysses_accel.errors import UnsupportedModelError


class BlockKernel(Protocol):
    """Attention of a block; shapes `[B, H, q, D]`, `[B, K, k, D]`, causal blocks are square."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
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
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of query, key and value, given output and log-sum-exp over all keys."""
        ...


class CPUKernel:
    """torch's flash attention for CPU; float32, float64, bfloat16 and float16, grouped heads included."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, scale=scale
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
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, is_causal, scale=scale
        )
        return grads[0], grads[1], grads[2]


class CUDAKernel:
    """torch's flash attention for CUDA; half precision, grouped heads by expansion."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        groups = query.shape[1] // key.shape[1]
        result = torch.ops.aten._scaled_dot_product_flash_attention(
            query,
            key.repeat_interleave(groups, dim=1),
            value.repeat_interleave(groups, dim=1),
            0.0,
            is_causal,
            False,
            scale=scale,
        )
        return result[0], result[1][..., : query.shape[2]]

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups = query.shape[1] // key.shape[1]
        seed = torch.zeros(2, dtype=torch.uint64, device=query.device)
        grads: Any = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad,
            query,
            key.repeat_interleave(groups, dim=1),
            value.repeat_interleave(groups, dim=1),
            out,
            lse.contiguous(),
            None,
            None,
            query.shape[2],
            key.shape[2],
            0.0,
            is_causal,
            seed,
            seed,
            scale=scale,
        )
        dk, dv = (grad.unflatten(1, (-1, groups)).sum(dim=2) for grad in grads[1:3])
        return grads[0], dk, dv


def kernel_for(tensor: Tensor) -> BlockKernel:
    """Returns the block kernel of a tensor's device.

    Raises:
        UnsupportedModelError: there is none for its dtype.
    """
    if tensor.device.type == "cpu":
        return CPUKernel()
    if tensor.dtype not in (torch.float16, torch.bfloat16):
        raise UnsupportedModelError(
            f"attention in a ring or with a sliding window got {tensor.dtype} on {tensor.device.type}; its kernels "
            f"there take bfloat16 and float16. Use mixed_precision='bf16', or load the model in bfloat16."
        )
    return CUDAKernel()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns what blocks are merged in: float32, and float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def tile_views(tile: Tile, *tensors: Tensor, is_query: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """Returns each tensor's part in a tile, `[B, N, tokens, ...]`; anti-causal tiles turned into causal ones.

    A square in which query i sees the keys behind i is, without its last query and its first key, causal when both are
    read backwards.
    """
    q_start, q_stop, k_start, k_stop = tile.q_start, tile.q_stop, tile.k_start, tile.k_stop
    if tile.shape == "anti_causal":
        q_stop, k_start = q_stop - 1, k_start + 1
    views = [
        tensor[:, :, q_start:q_stop] if query else tensor[:, :, k_start:k_stop]
        for tensor, query in zip(tensors, is_query)
    ]
    return tuple(view.flip(2) for view in views) if tile.shape == "anti_causal" else tuple(views)


def add_tile(total: Tensor, tile: Tile, part: Tensor, is_query: bool) -> None:
    """Adds a tile's gradient `part` to its place in `total`, both `[B, N, tokens, D]`."""
    (place,) = tile_views(tile, total, is_query=(is_query,)) if tile.shape != "anti_causal" else (None,)
    if place is not None:
        place.add_(part)
        return
    start, stop = (tile.q_start, tile.q_stop - 1) if is_query else (tile.k_start + 1, tile.k_stop)
    total[:, :, start:stop].add_(part.flip(2))


def merge_tile(out: Tensor, lse: Tensor, tile: Tile, part: Tensor, part_lse: Tensor) -> None:
    """Merges a tile's output `[B, H, q, D]` and log-sum-exp into the running ones, in place.

    Rows that saw no key yet have a log-sum-exp of minus infinity and an output of zero.
    """
    if tile.shape == "anti_causal":
        part, part_lse = part.flip(2), part_lse.flip(2)
    start, stop = tile.q_start, tile.q_start + part.shape[2]
    running, running_lse = out[:, :, start:stop], lse[:, :, start:stop]
    part_lse = part_lse.to(lse.dtype)
    total = torch.logaddexp(running_lse, part_lse)
    running.mul_((running_lse - total).exp().unsqueeze(-1))
    running.add_(part.to(out.dtype) * (part_lse - total).exp().unsqueeze(-1))
    running_lse.copy_(total)


def empty_accumulators(query: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    """Returns the output and log-sum-exp of no keys at all: `[B, H, q, Dv]` zeros and `[B, H, q]` minus infinity."""
    dtype = accumulation_dtype(query.dtype)
    shape = query.shape[:3]
    return query.new_zeros(*shape, value_dim, dtype=dtype), query.new_full(shape, -math.inf, dtype=dtype)
