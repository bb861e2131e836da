"""The block kernel in plain torch: every dtype and device, soft caps, ALiBi, dropout; a bounded
number of scores at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ulysses_accel.attention.kernels.base import Block, accumulation_dtype

MAX_SCORES = 2**24


@dataclass(frozen=True)
class ChunkedKernel:
    """Attention of a block in chunks of its queries, in float32 or float64.

    Dropout affects only the output, not the log-sum-exp.

    Args:
        softcap: bound of the scores through tanh; None for no bound.
        dropout: probability of dropping an attention weight.
        max_scores: scores in memory at a time, or those of one query in all rows and heads, if they
            are more.
    """

    softcap: float | None = None
    dropout: float = 0.0
    max_scores: int = MAX_SCORES

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, block: Block
    ) -> tuple[Tensor, Tensor]:
        """Returns output `[B, H, q, D]` and log-sum-exp `[B, H, q]`, both in the accumulation
        dtype.
        """
        dtype = accumulation_dtype(query.dtype)
        key, value = key.to(dtype), value.to(dtype)
        out = query.new_empty(*query.shape[:3], value.shape[3], dtype=dtype)
        lse = query.new_empty(query.shape[:3], dtype=dtype)
        generator = self._generator(query.device, block)
        for chunk in self._chunks(query, key):
            scores, _ = self._scores(query[:, :, chunk].to(dtype), key, chunk, block)
            lse[:, :, chunk] = scores.logsumexp(dim=-1)
            weights = scores.sub_(lse[:, :, chunk, None]).exp_()
            kept = self._kept(weights, generator)
            out[:, :, chunk] = _by_group(weights if kept is None else weights.mul_(kept), value)
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
        """Returns the gradients of query, key and value in the accumulation dtype."""
        dtype = accumulation_dtype(query.dtype)
        key, value = key.to(dtype), value.to(dtype)
        grad_query = torch.empty_like(query, dtype=dtype)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        generator = self._generator(query.device, block)
        for chunk in self._chunks(query, key):
            q, g = query[:, :, chunk].to(dtype), grad[:, :, chunk].to(dtype)
            scores, slope = self._scores(q, key, chunk, block)
            weights = scores.sub_(lse[:, :, chunk, None]).exp_()
            grad_weights = _by_group(g, value.transpose(2, 3))
            kept = self._kept(weights, generator)
            grad_value += _over_group(weights if kept is None else weights * kept, g, key.shape[1])
            if kept is not None:
                grad_weights.mul_(kept)
            # The softmax is over the keys of all blocks: its correction term needs the full output.
            delta = (g * out[:, :, chunk].to(dtype)).sum(dim=-1, keepdim=True)
            grad_scores = grad_weights.sub_(delta).mul_(weights).mul_(block.scale)
            if slope is not None:
                grad_scores.mul_(slope)
            grad_query[:, :, chunk] = _by_group(grad_scores, key)
            grad_key += _over_group(grad_scores, q, key.shape[1])
        return grad_query, grad_key, grad_value

    def _chunks(self, query: Tensor, key: Tensor) -> Iterator[slice]:
        batch, heads, length, _ = query.shape
        rows = max(1, self.max_scores // (batch * heads * key.shape[2]))
        for start in range(0, length, rows):
            yield slice(start, min(start + rows, length))

    def _scores(
        self, query: Tensor, key: Tensor, chunk: slice, block: Block
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the chunk's scores `[B, H, c, k]`, and the derivative of the soft cap; None for
        no soft cap.
        """
        scores = _by_group(query, key.transpose(2, 3)).mul_(block.scale)
        slope = None
        if self.softcap is not None:
            bounded = torch.tanh(scores / self.softcap)
            slope = 1 - bounded.square()
            scores = bounded.mul_(self.softcap)
        if block.alibi is not None:
            scores.add_(block.alibi.bias(chunk, scores.dtype))
        if block.is_causal:
            indices = torch.arange(key.shape[2], device=key.device)
            later = indices[None, :] > indices[chunk, None]
            scores.masked_fill_(later, -torch.inf)
        return scores, slope

    def _generator(self, device: torch.device, block: Block) -> torch.Generator | None:
        return torch.Generator(device).manual_seed(block.seed) if self.dropout else None

    def _kept(self, weights: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """Returns the dropout factor of each weight, 0 or 1 / (1 - dropout), the same in forward
        and backward; None without dropout.
        """
        if generator is None:
            return None
        draws = torch.rand(weights.shape, generator=generator, device=weights.device)
        kept = (draws >= self.dropout).to(weights.dtype)
        return kept.div_(1 - self.dropout) if self.dropout < 1 else kept


def _by_group(left: Tensor, right: Tensor) -> Tensor:
    """Returns the product `[B, H, c, m]` of `[B, H, c, n]` and each group's `[B, K, n, m]`, without
    repeating the latter.
    """
    batch, heads, rows, _ = left.shape
    return (left.reshape(batch, right.shape[1], -1, left.shape[3]) @ right).view(
        batch, heads, rows, right.shape[3]
    )


def _over_group(left: Tensor, right: Tensor, num_key_heads: int) -> Tensor:
    """Returns the product of `[B, H, c, k]`, transposed, and `[B, H, c, D]`, summed over each
    group's heads: `[B, K, k, D]`.
    """
    batch = left.shape[0]
    left = left.reshape(batch, num_key_heads, -1, left.shape[3])
    return left.transpose(2, 3) @ right.reshape(batch, num_key_heads, -1, right.shape[3])
