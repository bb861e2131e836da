"""Attention sinks: a learned per-head logit in the softmax denominator.

Shapes: B = rows, H = query heads, s = tokens of one rank, D = head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Returns output and log-sum-exp with the sinks in the softmax denominator.

    Args:
        out: `[B, H, s, D]`; changed in place.
        lse: `[B, H, s]`, its log-sum-exp.
        sinks: `[H]` logits.
    """
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    return out.mul_((lse - total).exp_().unsqueeze(-1)), total


def sinks_gradient(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Returns the gradient of `sinks` `[H]` from this rank's tokens alone.

    Args:
        grad: `[B, H, s, D]`, of the output.
        out: `[B, H, s, D]`, with the sinks.
        lse: `[B, H, s]`, with the sinks.
        sinks: `[H]` logits.
    """
    weight = (sinks.to(lse.dtype)[:, None] - lse).exp()
    taken = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(dim=-1)
    return -(weight * taken).sum(dim=(0, 2)).to(sinks.dtype)
