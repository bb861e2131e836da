"""torch's own ring attention (`torch.distributed.tensor.experimental`) as a function of this rank's
tokens.

Its dispatch knows the GPU kernels only, while its ring takes any: here torch's CPU kernel, the same
as ours.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.tensor.experimental._context_parallel._attention as context_parallel
from torch import Tensor

_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class TorchRing(torch.autograd.Function):
    """Causal `[B, H, s, D]`, `[B, K, s, D]`, `[B, K, s, D]` -> `[B, H, s, D]` over the ranks of a
    group.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup
    ) -> Tensor:
        out, lse, *_ = context_parallel._templated_ring_attention(
            group, 2, _KERNEL, query, key, value, is_causal=True
        )
        ctx.group = group
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        def kernel(
            *, grad_out: Tensor, logsumexp: Tensor, is_causal: bool, **tensors: Tensor
        ) -> Any:
            places = [tensors[name] for name in ("query", "key", "value", "out")]
            return _BACKWARD(grad_out, *places, logsumexp, 0.0, is_causal)

        grads = context_parallel._templated_ring_attention_backward(
            ctx.group, 2, kernel, grad.contiguous(), "grad_out", *ctx.saved_tensors, is_causal=True
        )
        return *grads[:3], None


def torch_ring(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: dist.ProcessGroup,
    *,
    zigzag: bool,
    gathers: bool,
) -> Tensor:
    """Computes causal attention by torch's ring.

    Args:
        query: `[B, H, s, D]`.
        key: `[B, K, s, D]`.
        value: `[B, K, s, D]`.
        group: the ranks.
        zigzag: whether tokens are dealt from the front and the back (torch: load balanced), else
            contiguously.
        gathers: whether keys are gathered at once, else rotated by all-to-alls.

    Returns:
        `[B, H, s, D]`.
    """
    methods = context_parallel._RotateMethod
    context_parallel._cp_options.enable_load_balance = zigzag
    context_parallel._cp_options.rotate_method = (
        methods.ALL_GATHER if gathers else methods.ALL_TO_ALL
    )
    output: Tensor = TorchRing.apply(query, key, value, group)
    return output
