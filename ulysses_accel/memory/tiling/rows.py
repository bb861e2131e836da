"""A function of rows in tiles of rows: what treats each token alone needs its intermediates for one
tile only.

Forward saves the inputs and nothing else; backward runs the function once more on each tile, under
autograd. Gradients of parameters are summed over the tiles in float32 and handed to autograd once,
so that an engine reduces them once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ulysses_accel.memory.accumulate import sum_dtype
from ulysses_accel.memory.skip_output import recomputing, unneeded_output

MAX_TILE_BYTES = 128 * 2**20
# A product of fewer rows spends its time reading the weights.
MIN_TILE_ROWS = 256
# In the backward pass some eight tiles are alive at a time: with a twentieth each, they are less
# than half an input.
TILE_SHARE = 20


def rows_per_tile(
    num_rows: int, row_bytes: int, input_row_bytes: int, tile_bytes: int | None = None
) -> int:
    """Returns how many rows a tile has, tiles being as equal as they can.

    Args:
        num_rows: rows in all.
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
class Autocast:
    """The autocast state of a forward, for its backward, which autograd runs outside of it."""

    device_type: str
    dtype: torch.dtype
    enabled: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Autocast:
        """Returns the state that an operation on this tensor would see now."""
        kind = tensor.device.type
        return cls(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def again(self) -> Any:
        """Returns a context with this state."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled)


@dataclass(frozen=True)
class RandomState:
    """The state of the generators that dropout draws from, before a forward."""

    host: Tensor
    device: Tensor | None

    @classmethod
    def now(cls, tensor: Tensor) -> RandomState:
        """Returns the state on the host and on this tensor's device."""
        return cls(
            torch.get_rng_state(),
            torch.cuda.get_rng_state(tensor.device) if tensor.is_cuda else None,
        )

    @contextmanager
    def again(self, tensor: Tensor) -> Iterator[None]:
        """Draws the same numbers inside; the generators go on afterwards as if nothing had been
        drawn.
        """
        with torch.random.fork_rng(devices=[tensor.device] if tensor.is_cuda else []):
            torch.set_rng_state(self.host)
            if self.device is not None:
                torch.cuda.set_rng_state(self.device, tensor.device)
            yield


@dataclass(frozen=True)
class RowCall:
    """A call in tiles.

    Args:
        function: takes one tile of each input, and treats each row alone.
        rows: rows of a tile.
        num_inputs: how many of the tensors are inputs; the others are the parameters that the
            function reads.
        random: whether the function draws random numbers.
        may_skip: whether to leave the output out where `recomputing()` says so.
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
        ctx.autocast = Autocast.of(tensors[0])
        ctx.random = RandomState.now(tensors[0]) if call.random else None
        ctx.save_for_backward(*tensors)
        inputs = _Inputs(tensors[: call.num_inputs])
        if call.may_skip and recomputing() and not call.random:
            # Only a call says how wide the output is, and of which dtype.
            one_row = call.function(*inputs.tile(slice(0, 1)))
            return unneeded_output(one_row.new_empty(()).expand(*inputs.lead, one_row.shape[-1]))
        output: Tensor | None = None
        for tile in tiles(inputs.num_rows, call.rows):
            part = call.function(*inputs.tile(tile))
            if output is None:
                # Not a view of what is filled: the caller may go on in place.
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
        with ctx.random.again(grad) if ctx.random else nullcontext():
            for tile in tiles(inputs.num_rows, call.rows):
                parts = [part.detach() for part in inputs.tile(tile)]
                with ctx.autocast.again(), torch.enable_grad():
                    for part, need in zip(parts, needed):
                        part.requires_grad_(need)
                    output = call.function(*parts)
                sums.add(tile, parts, output, grad_rows[tile].view_as(output))
                del output
        return None, *sums.gradients()


class _Inputs:
    """Inputs with the same leading dims, cut into tiles that have as many dims: `[B, S, D] -> [1,
    rows, D]`.
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
        self.totals: dict[int, Tensor] = {
            i: torch.empty(tensors[i].shape, dtype=tensors[i].dtype, device=tensors[i].device)
            for i in range(num_inputs)
            if needed[i]
        }
        self.ours: set[int] = set()

    def add(self, tile: slice, parts: list[Tensor], output: Tensor, grad: Tensor) -> None:
        """Adds what one tile gives."""
        sources = [*parts, *self.tensors[self.num_inputs :]]
        asked = [i for i, need in enumerate(self.needed) if need]
        grads = torch.autograd.grad(output, [sources[i] for i in asked], grad, allow_unused=True)
        for i, part in zip(asked, grads):
            if i < self.num_inputs:
                flat_rows(self.totals[i])[tile] = 0 if part is None else flat_rows(part)
            elif part is not None:
                self._add_parameter(i, part)

    def _add_parameter(self, i: int, part: Tensor) -> None:
        if i in self.ours:
            self.totals[i].add_(part)
        elif i in self.totals:
            # The first term is autograd's own tensor, which other terms may share.
            self.totals[i] = self.totals[i].to(sum_dtype(part.dtype)) + part
            self.ours.add(i)
        else:
            self.totals[i] = part

    def gradients(self) -> list[Tensor | None]:
        """Returns one gradient for each tensor that needs one, in the tensor's dtype."""
        return [
            None
            if not need
            else self.totals[i].to(tensor.dtype)
            if i in self.totals
            else torch.zeros_like(tensor)
            for i, (tensor, need) in enumerate(zip(self.tensors, self.needed))
        ]


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
        function: treats each row alone; takes tiles with as many dims as the inputs have.
        inputs: `[.., D]` each, with the same leading dims.
        parameters: every parameter that the function reads.
        rows: rows of a tile, at least 1.
        random: whether the function draws random numbers; backward then draws the same ones.
        may_skip: whether to leave the output out where `recomputing()` says so.

    Returns:
        `[.., D]`.
    """
    call = RowCall(function, rows, len(inputs), random, may_skip)
    output: Tensor = _TiledRows.apply(call, *inputs, *parameters)  # type: ignore[no-untyped-call]
    return output
