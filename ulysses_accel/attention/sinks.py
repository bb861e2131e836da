"""Sinks: one more key of no value in every row, whose score each head has for itself.

Shapes: B = rows, H = query heads, s = tokens of one rank, D = head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log-sum-exp, and in its place output, with one more key of no value in every row,
    score `sinks` `[H]`.
    """
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    return out.mul_((lse - total).exp_().unsqueeze(-1)), total


def sinks_gradient(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Returns the gradient of `sinks` `[H]` from this rank's tokens alone."""
    weight = (sinks.to(lse.dtype)[:, None] - lse).exp()
    taken = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(dim=-1)
    return -(weight * taken).sum(dim=(0, 2)).to(sinks.dtype)
