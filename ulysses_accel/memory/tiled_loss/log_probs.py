"""Each token's log-probability from hidden states, with the logits of one tile of tokens at a time:
for losses of preference optimisation and reinforcement learning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ulysses_accel.attention.kernels.base import accumulation_dtype
from ulysses_accel.errors import ConfigError
from ulysses_accel.memory.execution_state import linear_dtype
from ulysses_accel.memory.tiled_loss.head import (
    Head,
    HeadGradients,
    Inputs,
    check_shapes,
    softmax_,
    tokens_per_tile,
)
from ulysses_accel.sequence.labels import IGNORE_INDEX


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    tile_tokens: int | None = None,
    tile_bytes: int | None = None,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns the log-probability of each token's label and, if requested, the entropy of its
    prediction.

    Backward computes the logits again; in between only the inputs are held. It may run several
    times.

    Args:
        hidden: `[.., D]`, hidden states.
        weight: `[V, D]`, the output layer's full weight.
        labels: `[..]`, the token whose log-probability is returned: already shifted.
        bias: `[V]`, the output layer's bias.
        softcap: bound of the logits, `softcap * tanh(logits / softcap)`; None for no bound.
        logit_scale: factor of the logits, before the bound.
        temperature: divisor of the logits, after the bound.
        ignore_index: the label of tokens whose log-probability is 0, without gradient.
        tile_tokens: tokens of a tile.
        tile_bytes: bytes of a tile's logits where `tile_tokens` is None; default 512 MiB, 8,192
            tokens at most.
        entropy: whether to compute the entropy, in nats.

    Returns:
        `[..]` in float32 (float64 for float64), differentiable; and the entropies `[..]` without
        gradient, or None.

    Raises:
        ShapeError: the tensors don't fit.
        ConfigError: a setting is not legal.
    """
    check_shapes(hidden, weight, labels, bias)
    for name, value in (("softcap", softcap), ("temperature", temperature)):
        if value is not None and value <= 0:
            raise ConfigError(f"{name}={value} is not positive. Pass a positive number.")
    call = _Call(
        head=Head(logit_scale, softcap, 1.0 / temperature),
        ignore_index=ignore_index,
        tokens=tokens_per_tile(weight.shape[0], hidden.dtype, tile_tokens, tile_bytes),
        dtype=linear_dtype(hidden),
        entropy=entropy,
    )
    function: Any = _TokenLogProbs
    log_probs, entropies = function.apply(call, labels, hidden, weight, bias)
    return log_probs, entropies if entropy else None


@dataclass(frozen=True)
class _Call:
    """The settings of one call.

    Args:
        head: computes logits from hidden states.
        ignore_index: the label of tokens that are not counted.
        tokens: of a tile.
        dtype: of the matrix products.
        entropy: whether to compute the entropy.
    """

    head: Head
    ignore_index: int
    tokens: int
    dtype: torch.dtype
    entropy: bool

    def inputs(self, tensors: Sequence[Tensor | None], labels: Tensor) -> Inputs:
        """Returns hidden states, weight, bias and labels as rows."""
        return Inputs.of(tensors, labels, self.ignore_index, self.dtype)

    def run(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Returns log-probabilities `[tokens]` and entropies `[tokens]`, or a scalar 0 where no
        entropies are requested.
        """
        log_probs = torch.zeros(
            inputs.labels.shape, dtype=accumulation_dtype(self.dtype), device=inputs.labels.device
        )
        entropies = torch.zeros_like(log_probs) if self.entropy else log_probs.new_zeros(())
        with torch.no_grad(), torch.autocast(inputs.hidden.device.type, enabled=False):
            weight = inputs.product_weight()
            for rows in inputs.tiles(self.tokens):
                tile = inputs.hidden[rows].to(self.dtype)
                logits, bounded = self.head.logits(tile, weight, inputs.bias)
                del tile, bounded
                target = logits.gather(-1, inputs.labels[rows, None])
                log_probs[rows] = (target - softmax_(logits)).squeeze(-1)
                if self.entropy:
                    entropies[rows] = torch.special.entr(logits).sum(-1)
                del logits
        return log_probs, entropies

    def add_gradients(self, inputs: Inputs, gradients: HeadGradients, factors: Tensor) -> None:
        """Adds the gradients of hidden states, weight and bias.

        Args:
            inputs: of the head.
            gradients: to be added to.
            factors: `[tokens]`, the gradient of the log-probabilities.
        """
        with torch.no_grad(), torch.autocast(inputs.hidden.device.type, enabled=False):
            weight = inputs.product_weight()
            for rows in inputs.tiles(self.tokens):
                tile = inputs.hidden[rows].to(self.dtype)
                grad, bounded = self.head.logits(tile, weight, inputs.bias)
                softmax_(grad)
                grad.mul_(factors[rows, None].neg())
                grad.scatter_add_(-1, inputs.labels[rows, None], factors[rows, None])
                gradients.add(rows, tile, self.head.product_gradient_(grad, bounded), weight)
                del grad, bounded


class _TokenLogProbs(torch.autograd.Function):
    """Log-probabilities, and entropies, which are not differentiable."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, labels: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.call = call
        ctx.save_for_backward(labels, *tensors)
        log_probs, entropies = call.run(call.inputs(tensors, labels))
        entropies = entropies.view(labels.shape) if call.entropy else entropies
        ctx.mark_non_differentiable(entropies)
        return log_probs.view(labels.shape), entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factors: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        labels, *tensors = ctx.saved_tensors
        inputs = ctx.call.inputs(tensors, labels)
        gradients = HeadGradients(inputs, ctx.needs_input_grad[2:])
        ctx.call.add_gradients(inputs, gradients, factors.reshape(-1))
        return None, None, *gradients.results(inputs, tensors[0].shape)
