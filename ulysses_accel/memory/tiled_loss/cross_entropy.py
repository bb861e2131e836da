"""Cross-entropy from hidden states, with the logits of one tile of tokens at a time.

Gradients are computed in forward, while a tile's logits exist, and all of them are multiplied in
backward by the gradient of the loss, so that they are right however the loss is scaled, weighted or
accumulated afterwards. That takes one matrix product for the logits and two for the gradients. With
`recompute`, backward computes the logits again, and no gradients are held in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ulysses_accel.attention.kernels.base import accumulation_dtype
from ulysses_accel.errors import ConfigError, UlyssesAccelError
from ulysses_accel.memory.execution_state import linear_dtype
from ulysses_accel.memory.tiled_loss.head import (
    Head,
    HeadGradients,
    Inputs,
    check_shapes,
    scale_,
    softmax_,
    tokens_per_tile,
)
from ulysses_accel.sequence.labels import IGNORE_INDEX


def tiled_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weights: Tensor | None = None,
    tile_tokens: int | None = None,
    tile_bytes: int | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns the sum of the tokens' cross-entropies and the number of counted tokens.

    The logits are `logit_scale * (hidden @ weight.T + bias)`, bounded by `softcap * tanh(logits /
    softcap)`. Losses and the weight's gradient are accumulated in float32 (float64 for float64).
    Between forward and backward, one tensor of the hidden states' size and dtype and a float32
    tensor of the weight's size are held.

    Args:
        hidden: `[.., D]`, hidden states.
        weight: `[V, D]`, the output layer's full weight.
        labels: `[..]`, each token's label: already shifted where the model predicts the next token.
        bias: `[V]`, the output layer's bias.
        softcap: bound of the logits; None for no bound.
        logit_scale: factor of the logits.
        ignore_index: the label of tokens that are not counted.
        label_smoothing: share of each label's weight that is spread over the whole vocabulary.
        z_loss: weight of the squared log-sum-exp of each token's logits, added to its loss.
        token_weights: `[..]`, a factor for each token's loss; constants.
        tile_tokens: tokens of a tile.
        tile_bytes: bytes of a tile's logits where `tile_tokens` is None; default 512 MiB, 8,192
            tokens at most.
        recompute: whether backward computes the logits again, so that only the inputs are held in
            between.

    Returns:
        The sum, scalar, and the number of counted tokens, an integer scalar. Where no token is
        counted both are 0, and the gradients are zero.

    Raises:
        ShapeError: the tensors don't fit.
        ConfigError: a setting is not legal.

    Source:
        Label smoothing as `torch.nn.functional.cross_entropy` defines it; z-loss of PaLM, arXiv
        2204.02311, section 5.
    """
    check_shapes(hidden, weight, labels, bias)
    _check_options(softcap, label_smoothing, token_weights, labels)
    call = _Call(
        head=Head(logit_scale, softcap),
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        ignore_index=ignore_index,
        tokens=tokens_per_tile(weight.shape[0], hidden.dtype, tile_tokens, tile_bytes),
        dtype=linear_dtype(hidden),
    )
    count = (labels != ignore_index).sum()
    needed = any(tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias))
    if not (needed and torch.is_grad_enabled()):
        return call.run((hidden, weight, bias), labels, token_weights), count
    function: Any = _RecomputedLoss if recompute else _TiledLoss
    return function.apply(call, labels, token_weights, hidden, weight, bias), count


def _check_options(
    softcap: float | None, smoothing: float, token_weights: Tensor | None, labels: Tensor
) -> None:
    if softcap is not None and softcap <= 0:
        raise ConfigError(
            f"softcap={softcap} bounds nothing. Pass a positive number, or None for no bound."
        )
    if not 0.0 <= smoothing <= 1.0:
        raise ConfigError(f"label_smoothing={smoothing} is not a share. Pass a number from 0 to 1.")
    if token_weights is not None and token_weights.requires_grad:
        raise ConfigError(
            "token_weights require a gradient, which is not computed. Pass token_weights.detach()."
        )
    if token_weights is not None and token_weights.shape != labels.shape:
        raise ConfigError(
            f"token_weights {tuple(token_weights.shape)} don't fit labels {tuple(labels.shape)}. "
            "Pass one per label."
        )


@dataclass(frozen=True)
class _Call:
    """The settings of one tiled loss.

    Args:
        head: computes logits from hidden states.
        label_smoothing: as for `tiled_cross_entropy`.
        z_loss: as for `tiled_cross_entropy`.
        ignore_index: the label of tokens that are not counted.
        tokens: of a tile.
        dtype: of the matrix products.
    """

    head: Head
    label_smoothing: float
    z_loss: float
    ignore_index: int
    tokens: int
    dtype: torch.dtype

    def run(
        self,
        tensors: Sequence[Tensor | None],
        labels: Tensor,
        token_weights: Tensor | None,
        gradients: HeadGradients | None = None,
        factor: Tensor | None = None,
    ) -> Tensor:
        """Returns the sum of the losses.

        Args:
            tensors: hidden states, weight and bias.
            labels: `[..]`.
            token_weights: `[..]`.
            gradients: accumulates the tensors' gradients; None for none.
            factor: scalar, of the gradients; 1 when None.
        """
        inputs = self.inputs(tensors, labels)
        weights = None if token_weights is None else token_weights.reshape(-1, 1)
        total = torch.zeros((), dtype=accumulation_dtype(self.dtype), device=labels.device)
        with torch.no_grad(), torch.autocast(labels.device.type, enabled=False):
            product_weight = inputs.product_weight()
            for rows in inputs.tiles(self.tokens):
                tile = inputs.hidden[rows].to(self.dtype)
                logits, bounded = self.head.logits(tile, product_weight, inputs.bias)
                tile_weights = None if weights is None else weights[rows]
                losses, log_sum = self._losses_(logits, inputs.labels[rows, None], tile_weights)
                total += losses.sum()
                if gradients is not None:
                    grad = self._logit_gradient_(
                        logits, log_sum, inputs.labels[rows, None], tile_weights, factor
                    )
                    gradients.add(
                        rows, tile, self.head.product_gradient_(grad, bounded), product_weight
                    )
                    del grad
                # Freed before the next tile's logits are computed.
                del logits, bounded
        return total

    def inputs(self, tensors: Sequence[Tensor | None], labels: Tensor) -> Inputs:
        """Returns hidden states, weight, bias and labels as rows."""
        return Inputs.of(tensors, labels, self.ignore_index, self.dtype)

    def _losses_(
        self, logits: Tensor, labels: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the tokens' losses and log-sum-exp `[tokens, 1]`, and turns the logits into
        probabilities.
        """
        smoothing = self.label_smoothing
        target = logits.gather(-1, labels)
        if smoothing:
            target = target * (1 - smoothing) + logits.mean(-1, keepdim=True) * smoothing
        log_sum = softmax_(logits)
        losses = log_sum - target
        if self.z_loss:
            losses += self.z_loss * log_sum.square()
        return losses if weights is None else losses * weights, log_sum

    def _logit_gradient_(
        self,
        grad: Tensor,
        log_sum: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        factor: Tensor | None,
    ) -> Tensor:
        """Turns probabilities into the gradient of the logits, in place."""
        if self.z_loss:
            grad.mul_(log_sum.mul(2 * self.z_loss).add_(1.0))
        grad.scatter_add_(-1, labels, torch.full_like(log_sum, self.label_smoothing - 1))
        if self.label_smoothing:
            grad.sub_(self.label_smoothing / grad.shape[-1])
        if weights is not None:
            grad.mul_(weights)
        return grad if factor is None else grad.mul_(factor)


class _TiledLoss(torch.autograd.Function):
    """The sum of the losses; forward computes the gradients, too."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, labels: Tensor, token_weights: Tensor | None, *tensors: Tensor | None
    ) -> Tensor:
        inputs = call.inputs(tensors, labels)
        gradients = HeadGradients(inputs, ctx.needs_input_grad[3:])
        loss = call.run(tensors, labels, token_weights, gradients)
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        ctx.tokens, ctx.shapes = call.tokens, [None if x is None else x.shape for x in tensors]
        ctx.dtypes = [None if x is None else x.dtype for x in tensors]
        # Where no token is counted, the gradient of a mean is 0 / 0, and gradients stay zero.
        ctx.is_zero, ctx.is_used = gradients.is_zero, False
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.is_used:
            raise UlyssesAccelError(
                "backward ran a second time through a tiled loss, whose gradients the first run "
                "has scaled in place. Pass recompute=True to run it several times."
            )
        ctx.is_used = True
        results: list[Tensor | None] = []
        for grad, dtype, shape in zip(ctx.saved_tensors, ctx.dtypes, ctx.shapes, strict=True):
            if grad is None:
                results.append(None)
                continue
            scaled = grad if ctx.is_zero else scale_(grad, factor, ctx.tokens)
            results.append(scaled.to(dtype).view(shape))
        return None, None, None, *results


class _RecomputedLoss(torch.autograd.Function):
    """The sum of the losses; backward computes the logits again, and then the gradients."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, labels: Tensor, token_weights: Tensor | None, *tensors: Tensor | None
    ) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(labels, token_weights, *tensors)
        return call.run(tensors, labels, token_weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        labels, token_weights, *tensors = ctx.saved_tensors
        inputs = ctx.call.inputs(tensors, labels)
        gradients = HeadGradients(inputs, ctx.needs_input_grad[3:])
        ctx.call.run(tensors, labels, token_weights, gradients, factor)
        return None, None, None, *gradients.results(inputs, tensors[0].shape)
