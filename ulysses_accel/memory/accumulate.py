"""Matrix products added to a total in a wider dtype: a sum over many tiles loses nothing."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Computes `total += left.T @ right`, without rounding the product to its factors' dtype.

    Args:
        total: `[m, n]`, in their `accumulation_dtype`.
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
    """Returns whether this torch can add the product of half-precision CUDA matrices to a float32
    matrix in place; older releases only return a new one.
    """
    factor = torch.zeros(16, 16, dtype=dtype, device="cuda")
    total = torch.zeros(16, 16, dtype=torch.float32, device="cuda")
    try:
        torch.ops.aten.addmm.dtype_out(total, factor, factor, total.dtype, out=total)
    except RuntimeError:
        return False
    return True
