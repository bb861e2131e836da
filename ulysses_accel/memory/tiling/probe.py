"""What a block computes, found out by running a small copy: a few features wide, in float64, with
random weights.

The copy runs the block's own forward on weights of its own, so that the answer is the same for a
model on the meta device or sharded over ranks, and costs next to nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ulysses_accel import _private_api
from ulysses_accel.memory.tiling.method import unbound_method

# Smaller sizes are counts (one output of a gate, experts per token), not widths.
SMALLEST_WIDTH = 4
ROWS = 6
# A block that computes in float32 inside rounds at 1e-7; rows that depend on each other differ by
# much more.
SAME_ROWS = 1e-5


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """Returns a parameter's full shape, also where DeepSpeed's ZeRO-3 has sharded it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def small_copy(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Returns a copy with narrow random weights on the CPU, in training mode and without hooks.

    Widths keep ratios of two, so that a fused gate and up projection stays twice as wide as the
    down projection's input.

    Args:
        module: stays as it is.
        dtype: of the copy.
    """
    widths = _narrow(
        sorted({size for parameter in module.parameters() for size in shape_of(parameter)})
    )
    return _copy(module, _Weights(widths, dtype, torch.Generator().manual_seed(0)), {})


def _narrow(sizes: Sequence[int]) -> dict[int, int]:
    widths: dict[int, int] = {}
    for size in sizes:
        if size > SMALLEST_WIDTH:
            if size % 2 == 0 and size // 2 in widths:
                widths[size] = 2 * widths[size // 2]
            else:
                # Odd multiples of eight: no two widths are equal or twice each other by chance.
                widths[size] = 8 * (2 * len(widths) + 1)
    return widths


@dataclass(frozen=True)
class _Weights:
    """Makes narrow random tensors for a copy's parameters and buffers."""

    widths: dict[int, int]
    dtype: torch.dtype
    generator: torch.Generator

    def like(self, tensor: Tensor) -> Tensor:
        shape = [self.widths.get(size, size) for size in shape_of(tensor)]
        if not tensor.is_floating_point():
            return torch.zeros(shape, dtype=tensor.dtype)
        return torch.randn(shape, generator=self.generator, dtype=self.dtype)


def _copy(module: nn.Module, weights: _Weights, seen: dict[int, nn.Module]) -> nn.Module:
    if id(module) in seen:
        return seen[id(module)]
    # Not by its constructor: FSDP2 changes a module's class to one that can't be constructed.
    twin: nn.Module = object.__new__(type(module))
    seen[id(module)] = twin
    values = dict(vars(module))
    if "forward" in values:
        values["forward"] = MethodType(unbound_method(module, "forward"), twin)
    for name, value in values.items():
        if type(value) is int:
            values[name] = weights.widths.get(value, value)
        elif type(value) is tuple and all(type(size) is int for size in value):
            values[name] = tuple(weights.widths.get(size, size) for size in value)
    values.update({name: OrderedDict() for name in values if name.endswith("_hooks")})
    values["training"] = True
    values[_private_api.MODULE_PARAMETERS] = {
        name: None if parameter is None else nn.Parameter(weights.like(parameter))
        for name, parameter in _private_api.module_parameters(module).items()
    }
    values[_private_api.MODULE_BUFFERS] = {
        name: None if buffer is None else weights.like(buffer)
        for name, buffer in _private_api.module_buffers(module).items()
    }
    values[_private_api.MODULE_CHILDREN] = {
        name: None if child is None else _copy(child, weights, seen)
        for name, child in _private_api.module_children(module).items()
    }
    vars(twin).update(values)
    return twin


def inputs_like(widths: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """Returns a few random rows of each width."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, ROWS, width, generator=generator, dtype=dtype) for width in widths]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draws random numbers from `seed`; the process's generator continues afterwards as if nothing
    had been drawn.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def draws_random_numbers(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> bool:
    """Returns whether two calls with different seeds have different results."""
    results: list[Any] = []
    for seed in (0, 1):
        with _seeded(seed), torch.no_grad():
            results.append(function(*[tensor.clone() for tensor in inputs]))
    return all(isinstance(result, Tensor) for result in results) and not torch.equal(*results)


def treats_rows_alone(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], row_dim: int
) -> str:
    """Returns why the function can't be computed in tiles of rows; an empty string where it can.

    Args:
        function: draws no random numbers.
        inputs: with equal sizes up to `row_dim`.
        row_dim: the dim of tokens.
    """
    arguments = [tensor.clone() for tensor in inputs]
    with torch.no_grad():
        whole: Any = function(*arguments)
        if not isinstance(whole, Tensor):
            return f"it returns {type(whole).__name__}, not one tensor"
        if whole.shape[: row_dim + 1] != inputs[0].shape[: row_dim + 1]:
            return (
                f"its output has shape {list(whole.shape)} for an input of {list(inputs[0].shape)}"
            )
        if any(not torch.equal(tensor, before) for tensor, before in zip(arguments, inputs)):
            return "it changes its input in place"
        first = function(*[tensor.narrow(row_dim, 0, 2) for tensor in inputs])
        rest = function(*[tensor.narrow(row_dim, 2, ROWS - 2) for tensor in inputs])
    difference = (torch.cat([first, rest], row_dim) - whole).abs().max()
    if difference > SAME_ROWS * whole.abs().max():
        return "its output for a token depends on other tokens"
    return ""


def used_parameters(
    module: nn.Module, function: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> tuple[str, ...]:
    """Returns the names of the parameters of `module` that the function reads."""
    parameters = {
        name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad
    }
    with torch.enable_grad():
        grads = torch.autograd.grad(
            function(*inputs).sum(), list(parameters.values()), allow_unused=True
        )
    return tuple(name for name, grad in zip(parameters, grads) if grad is not None)


def has_hooks(module: nn.Module) -> bool:
    """Returns whether a module has hooks, apart from those with which DeepSpeed's ZeRO-3 gathers
    its parameters.
    """
    hooks = [hook for kind in _private_api.MODULE_HOOKS for hook in getattr(module, kind).values()]
    return any(not getattr(hook, "__module__", "").startswith("deepspeed.") for hook in hooks)
