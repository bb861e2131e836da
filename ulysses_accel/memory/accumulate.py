"""Sums over tiles, kept in a wider dtype than their terms so that nothing is lost however many
tiles there are.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns what a sum over tiles is kept in: float32, or float64 where the terms are."""
    return torch.promote_types(dtype, torch.float32)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left.T @ right`, not rounded on its way into a wider total.

    Args:
        total: `[m, n]`, in `sum_dtype`.
        left: `[rows, m]`.
        right: `[rows, n]`.
    """
    if not total.is_cuda or total.dtype == left.dtype == right.dtype:
        total.addmm_(left.t().to(total.dtype), right.to(total.dtype))
    elif _adds_to_wider(left.dtype):
        torch.ops.aten.addmm.dtype_out(total, left.t(), right, total.dtype, out=total)
    else:
        total.add_(torch.ops.aten.mm.dtype(left.t(), right, total.dtype))


@functools.cache
def _adds_to_wider(dtype: torch.dtype) -> bool:
    """Whether this torch adds products of narrow CUDA matrices to a float32 one; older ones only
    make new ones.
    """
    factor = torch.zeros(16, 16, dtype=dtype, device="cuda")
    total = torch.zeros(16, 16, dtype=torch.float32, device="cuda")
    try:
        torch.ops.aten.addmm.dtype_out(total, factor, factor, total.dtype, out=total)
    except RuntimeError:
        return False
    return True
