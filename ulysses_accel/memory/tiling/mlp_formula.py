"""The feed-forward formula, `down(act(gate(x)) * up(x))` or `down(act(up(x)))`, in tiles, with its
own backward.

Forward saves only x. Backward recomputes a tile's first projections but not the last one: eight
matrix products where six are the minimum, and nine when autograd runs the block again. Weight
gradients are summed over the tiles in float32 and returned to autograd once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ulysses_accel.attention.kernels.base import accumulation_dtype
from ulysses_accel.memory.accumulate import add_product
from ulysses_accel.memory.execution_state import ExecutionState, linear_dtype
from ulysses_accel.memory.skip_output import recomputing, unneeded_output
from ulysses_accel.memory.tiling.rows import flat_rows, tiles


@dataclass(frozen=True)
class Projection:
    """Where a projection's weight and bias are.

    Args:
        parameters: index of its weight among the parameters; its bias is the next one.
        in_by_out: whether the weight is stored `[in, out]`; otherwise `[out, in]`.
        half: 0 or 1 where the projection is the first or second half of a fused weight's output
            features; None for a whole weight.
    """

    parameters: int
    in_by_out: bool
    half: int | None = None

    def of_output(self, tensor: Tensor, dim: int) -> Tensor:
        """Returns this projection's slice of a tensor along its dim of output features."""
        return tensor if self.half is None else tensor.chunk(2, dim)[self.half]


@dataclass(frozen=True)
class MlpCall:
    """A feed-forward block.

    Args:
        activation: elementwise function.
        gate: the projection that the activation is applied to.
        up: the projection that multiplies the activation; None for a block without gate.
        down: the projection back to the hidden size.
        rows: rows of a tile.
    """

    activation: Callable[[Tensor], Tensor]
    gate: Projection
    up: Projection | None
    down: Projection
    rows: int


class _Weights:
    """Matrices `[in, out]` and biases in the dtype that the products are computed in."""

    def __init__(self, parameters: Sequence[Tensor | None], dtype: torch.dtype) -> None:
        # A fused weight holds two projections: it is cast once.
        self.parameters = [
            None if parameter is None else parameter.to(dtype) for parameter in parameters
        ]

    def matrix(self, projection: Projection) -> Tensor:
        weight = self.parameters[projection.parameters]
        assert weight is not None
        return projection.of_output(weight if projection.in_by_out else weight.t(), 1)

    def project(self, rows: Tensor, projection: Projection, out: Tensor | None = None) -> Tensor:
        """Returns the projection of rows: `[rows, in] -> [rows, out]`."""
        bias = self.parameters[projection.parameters + 1]
        if bias is None:
            return torch.mm(rows, self.matrix(projection), out=out)
        return torch.addmm(projection.of_output(bias, 0), rows, self.matrix(projection), out=out)


class _WeightGradients:
    """Gradients of weights and biases, summed over the tiles in float32 (float64 for float64)."""

    def __init__(self, parameters: Sequence[Tensor | None], needed: Sequence[bool]) -> None:
        self.parameters = parameters
        self.totals = [
            torch.zeros(
                parameter.shape, dtype=accumulation_dtype(parameter.dtype), device=parameter.device
            )
            if parameter is not None and need
            else None
            for parameter, need in zip(parameters, needed)
        ]

    def needs(self, projection: Projection) -> bool:
        return any(
            total is not None
            for total in self.totals[projection.parameters : projection.parameters + 2]
        )

    def add(self, projection: Projection, rows: Tensor, grad: Tensor) -> None:
        """Adds one tile's part: `rows` `[rows, in]` is the projection's input, `grad` `[rows, out]`
        the gradient of its output.
        """
        weight, bias = self.totals[projection.parameters : projection.parameters + 2]
        if weight is not None:
            if projection.in_by_out:
                add_product(projection.of_output(weight, 1), rows, grad)
            else:
                add_product(projection.of_output(weight, 0), grad, rows)
        if bias is not None:
            projection.of_output(bias, 0).add_(grad.sum(0, dtype=bias.dtype))

    def gradients(self) -> list[Tensor | None]:
        """Returns one gradient per parameter, in its dtype, and frees the sums one by one."""
        result: list[Tensor | None] = []
        for i, parameter in enumerate(self.parameters):
            total, self.totals[i] = self.totals[i], None
            result.append(None if total is None or parameter is None else total.to(parameter.dtype))
        return result


class _TiledMlp(torch.autograd.Function):
    """The block applied to `hidden` `[.., in]`; `parameters` are weight and bias (or None) of each
    linear layer.
    """

    @staticmethod
    def forward(ctx: Any, call: MlpCall, hidden: Tensor, *parameters: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, *parameters)
        ctx.call, ctx.dtype = call, linear_dtype(hidden)
        ctx.state = ExecutionState.capture(hidden.device, random=False)
        dtype = ctx.dtype
        weights, rows = _Weights(parameters, dtype), flat_rows(hidden)
        width = weights.matrix(call.down).shape[1]
        if recomputing():
            return unneeded_output(
                rows.new_empty((), dtype=dtype).expand(*hidden.shape[:-1], width)
            )
        # The tensor itself, not a view: the caller may modify it in place.
        output = rows.new_empty(*hidden.shape[:-1], width, dtype=dtype)
        output_rows = flat_rows(output)
        for tile in tiles(rows.shape[0], call.rows):
            inner = _intermediate(call, weights, rows[tile].to(dtype))
            weights.project(inner, call.down, out=output_rows[tile])
            del inner
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *parameters = ctx.saved_tensors
        call: MlpCall = ctx.call
        dtype: torch.dtype = ctx.dtype
        backward = _Backward(
            call,
            _Weights(parameters, dtype),
            _WeightGradients(parameters, ctx.needs_input_grad[2:]),
        )
        rows, grad_rows = flat_rows(hidden), flat_rows(grad)
        grad_hidden = (
            torch.empty(rows.shape, dtype=hidden.dtype, device=hidden.device)
            if ctx.needs_input_grad[1]
            else None
        )
        with ctx.state.same_autocast():
            for tile in tiles(rows.shape[0], call.rows):
                part = None if grad_hidden is None else grad_hidden[tile]
                backward.tile(rows[tile].to(dtype), grad_rows[tile].to(dtype), part)
        whole = None if grad_hidden is None else grad_hidden.view(hidden.shape)
        return None, whole, *backward.sums.gradients()


def _intermediate(call: MlpCall, weights: _Weights, rows: Tensor) -> Tensor:
    """Returns the input of the last projection, without a graph: `[rows, in] -> [rows,
    intermediate]`.
    """
    inner = call.activation(weights.project(rows, call.gate))
    if call.up is not None:
        inner.mul_(weights.project(rows, call.up))
    return inner.to(rows.dtype)


@dataclass
class _Backward:
    """The backward pass, tile by tile."""

    call: MlpCall
    weights: _Weights
    sums: _WeightGradients

    def tile(self, rows: Tensor, grad: Tensor, grad_rows: Tensor | None) -> None:
        """Adds a tile's weight gradients, and writes its input's gradient into `grad_rows`."""
        gate, up = self.weights.project(rows, self.call.gate), None
        with torch.enable_grad():
            activated = self.call.activation(gate.requires_grad_())
        if self.call.up is not None:
            up = self.weights.project(rows, self.call.up)
        if self.sums.needs(self.call.down):
            inner = activated.detach() if up is None else activated.detach() * up
            self.sums.add(self.call.down, inner.to(grad.dtype), grad)
            del inner
        first_projections = (
            [self.call.gate] if self.call.up is None else [self.call.gate, self.call.up]
        )
        if grad_rows is None and not any(map(self.sums.needs, first_projections)):
            return
        grad_inner = torch.mm(grad, self.weights.matrix(self.call.down).t()).to(activated.dtype)
        if up is not None and self.call.up is not None:
            grad_up = (grad_inner * activated.detach()).to(up.dtype)
            grad_inner.mul_(up)
            del up
            self._project_back(self.call.up, rows, grad_up, grad_rows, first=True)
            del grad_up
        (grad_gate,) = torch.autograd.grad(activated, gate, grad_inner)
        del activated, grad_inner
        self._project_back(self.call.gate, rows, grad_gate, grad_rows, first=self.call.up is None)

    def _project_back(
        self,
        projection: Projection,
        rows: Tensor,
        grad: Tensor,
        grad_rows: Tensor | None,
        *,
        first: bool,
    ) -> None:
        self.sums.add(projection, rows, grad)
        if grad_rows is None:
            return
        matrix = self.weights.matrix(projection).t()
        if grad_rows.dtype != grad.dtype:
            # Under autocast the input is float32 and the products are in half precision.
            product = torch.mm(grad, matrix)
            grad_rows.copy_(product) if first else grad_rows.add_(product)
        elif first:
            torch.mm(grad, matrix, out=grad_rows)
        else:
            grad_rows.addmm_(grad, matrix)


def tile_projections(call: MlpCall, hidden: Tensor, parameters: Sequence[Tensor | None]) -> Tensor:
    """Returns the block's output on `hidden`.

    Args:
        call: the block.
        hidden: `[.., in]`.
        parameters: weight and bias, or None, of each linear layer, as the projections count them.

    Returns:
        `[.., out]`, in the dtype of the products.
    """
    output: Tensor = _TiledMlp.apply(call, hidden, *parameters)  # type: ignore[no-untyped-call]
    return output
