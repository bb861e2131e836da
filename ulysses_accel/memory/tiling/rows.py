"""A function of independent rows in tiles: its intermediates exist for one tile at a time.

Forward saves only the inputs; backward runs the function again on each tile, under autograd.
Gradients of parameters are summed over the tiles in float32 and returned to autograd once, so that
DDP, FSDP2 and DeepSpeed reduce them once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ulysses_accel.attention.kernels.base import accumulation_dtype
from ulysses_accel.memory.execution_state import ExecutionState
from ulysses_accel.memory.skip_output import recomputing, unneeded_output

MAX_TILE_BYTES = 128 * 2**20
# A matrix product of fewer rows is bound by reading the weights.
MIN_TILE_ROWS = 256
# About eight tiles are alive at a time in the backward pass: at a twentieth of the input each, less
# than half an input together.
TILE_SHARE = 20


def rows_per_tile(
    num_rows: int, row_bytes: int, input_row_bytes: int, tile_bytes: int | None = None
) -> int:
    """Returns the number of rows in a tile; all tiles are of nearly equal size.

    Args:
        num_rows: rows of all tiles together.
        row_bytes: bytes of the widest intermediate of one row.
        input_row_bytes: bytes of one row of the input.
        tile_bytes: bytes of one tile's widest intermediate. Default: a twentieth of the input's
            size, 128 MiB at most, and not less than 256 rows.
    """
    if tile_bytes is None:
        target = min(MAX_TILE_BYTES, num_rows * input_row_bytes // TILE_SHARE)
        most = max(MIN_TILE_ROWS, target // row_bytes)
    else:
        most = max(1, tile_bytes // row_bytes)
    num_tiles = -(-num_rows // most)
    return max(1, -(-num_rows // max(1, num_tiles)))


def tiles(num_rows: int, rows: int) -> Iterator[slice]:
    """Yields the rows of each tile."""
    for start in range(0, num_rows, rows):
        yield slice(start, min(start + rows, num_rows))


@dataclass(frozen=True)
class RowCall:
    """A function that is computed in tiles.

    Args:
        function: takes one tile of each input, and treats rows independently.
        rows: rows of a tile.
        num_inputs: how many of the tensors are inputs; the others are the parameters that the
            function reads.
        random: whether the function draws random numbers.
        may_skip: whether to skip the output where `recomputing()`.
    """

    function: Callable[..., Tensor]
    rows: int
    num_inputs: int
    random: bool
    may_skip: bool


def flat_rows(tensor: Tensor) -> Tensor:
    """Returns the tensor as rows: `[.., D] -> [rows, D]`."""
    return tensor.reshape(-1, tensor.shape[-1])


class _TiledRows(torch.autograd.Function):
    """`function(*inputs)` in tiles of rows."""

    @staticmethod
    def forward(ctx: Any, call: RowCall, *tensors: Tensor) -> Tensor:
        ctx.call = call
        ctx.state = ExecutionState.capture(tensors[0].device, random=call.random)
        ctx.save_for_backward(*tensors)
        inputs = _Inputs(tensors[: call.num_inputs])
        if call.may_skip and recomputing() and not call.random:
            # Only a call shows the width and dtype of the output.
            one_row = call.function(*inputs.tile(slice(0, 1)))
            return unneeded_output(one_row.new_empty(()).expand(*inputs.lead, one_row.shape[-1]))
        output: Tensor | None = None
        for tile in tiles(inputs.num_rows, call.rows):
            part = call.function(*inputs.tile(tile))
            if output is None:
                # The tensor itself, not a view: the caller may modify it in place.
                output = part.new_empty(*inputs.lead, part.shape[-1])
            flat_rows(output)[tile] = flat_rows(part)
            del part
        assert output is not None
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call: RowCall = ctx.call
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        inputs, grad_rows = _Inputs(tensors[: call.num_inputs]), flat_rows(grad)
        sums = _GradientSums(tensors, needed, call.num_inputs)
        with ctx.state.same_random_numbers():
            for tile in tiles(inputs.num_rows, call.rows):
                parts = [part.detach() for part in inputs.tile(tile)]
                with ctx.state.same_autocast(), torch.enable_grad():
                    for part, need in zip(parts, needed):
                        part.requires_grad_(need)
                    output = call.function(*parts)
                sums.add(tile, parts, output, grad_rows[tile].view_as(output))
                del output
        return None, *sums.gradients()


class _Inputs:
    """Inputs with the same leading dims, split into tiles with the same number of dims: `[B, S, D]
    -> [1, rows, D]`.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.lead = tensors[0].shape[:-1]
        self.num_rows = self.lead.numel()
        self.flat = [flat_rows(tensor) for tensor in tensors]

    def tile(self, tile: slice) -> list[Tensor]:
        """Returns one tile of each."""
        ones = [1] * (len(self.lead) - 1)
        return [flat[tile].view(*ones, -1, flat.shape[-1]) for flat in self.flat]


class _GradientSums:
    """Gradients of the inputs, written tile by tile, and of the parameters, summed over the
    tiles.
    """

    def __init__(self, tensors: Sequence[Tensor], needed: Sequence[bool], num_inputs: int) -> None:
        self.tensors, self.needed, self.num_inputs = tensors, needed, num_inputs
        self.totals: dict[int, Tensor] = {}
        for i, tensor in enumerate(tensors[:num_inputs]):
            if needed[i]:
                # Contiguous, which empty_like of a transposed input would not be.
                self.totals[i] = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        # Totals that no other tensor shares memory with.
        self.private: set[int] = set()

    def add(self, tile: slice, parts: list[Tensor], output: Tensor, grad: Tensor) -> None:
        """Adds the gradients of one tile.

        Args:
            tile: the tile's rows.
            parts: the tile of each input, which the output was computed from.
            output: of the function.
            grad: of the output.
        """
        sources = [*parts, *self.tensors[self.num_inputs :]]
        indices = [i for i, need in enumerate(self.needed) if need]
        grads = torch.autograd.grad(output, [sources[i] for i in indices], grad, allow_unused=True)
        for i, part in zip(indices, grads):
            if i < self.num_inputs:
                flat_rows(self.totals[i])[tile] = 0 if part is None else flat_rows(part)
            elif part is not None:
                self._add_parameter(i, part)

    def _add_parameter(self, i: int, part: Tensor) -> None:
        if i in self.private:
            self.totals[i].add_(part)
        elif i in self.totals:
            # The first term is autograd's tensor, which may share memory with another gradient.
            self.totals[i] = self.totals[i].to(accumulation_dtype(part.dtype)) + part
            self.private.add(i)
        else:
            self.totals[i] = part

    def gradients(self) -> list[Tensor | None]:
        """Returns one gradient for each tensor that needs one, in the tensor's dtype."""
        result: list[Tensor | None] = []
        for i, (tensor, need) in enumerate(zip(self.tensors, self.needed)):
            if not need:
                result.append(None)
            elif i in self.totals:
                result.append(self.totals[i].to(tensor.dtype))
            else:
                result.append(torch.zeros_like(tensor))
        return result


def tile_rows(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    rows: int,
    *,
    random: bool = False,
    may_skip: bool = True,
) -> Tensor:
    """Returns `function(*inputs)`, computed on `rows` rows at a time.

    Args:
        function: treats rows independently; takes tiles with as many dims as the inputs have.
        inputs: `[.., D]` each, with the same leading dims.
        parameters: every parameter that the function reads.
        rows: rows of a tile, at least 1.
        random: whether the function draws random numbers; backward then draws the same ones.
        may_skip: whether to skip the output where `recomputing()`.

    Returns:
        `[.., D]`.
    """
    call = RowCall(function, rows, len(inputs), random, may_skip)
    output: Tensor = _TiledRows.apply(call, *inputs, *parameters)  # type: ignore[no-untyped-call]
    return output
