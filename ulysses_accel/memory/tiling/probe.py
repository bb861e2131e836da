"""What a block's code computes, seen on a small copy of it: a few features wide, float64, with
weights of its own.

The copy runs the block's own forward and none of its parameters, so that it says the same of a
model on the meta device or in pieces on many ranks, and costs nothing.
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
from ulysses_accel.errors import UnsupportedModelError

# Smaller sizes are counts (of a gate's one output, of experts per token), not widths.
SMALLEST_WIDTH = 4
ROWS = 6
# float32 somewhere inside a block rounds at 1e-7; rows that see each other differ by much more.
SAME_ROWS = 1e-5


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """Returns a parameter's whole shape, also where DeepSpeed holds a piece of it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def small_copy(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Returns a copy with narrow random weights on the CPU, in training mode and without hooks.

    Widths keep ratios of two: what makes gate and up at once stays twice as wide as what comes
        behind it.

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
            # Odd multiples of eight, so that no two widths are equal or twice each other by chance.
            own = 8 * (2 * len(widths) + 1)
            widths[size] = 2 * widths[size // 2] if size % 2 == 0 and size // 2 in widths else own
    return widths


@dataclass(frozen=True)
class _Weights:
    """Narrow random tensors in place of a module's."""

    widths: dict[int, int]
    dtype: torch.dtype
    generator: torch.Generator

    def like(self, tensor: Tensor) -> Tensor:
        shape = [self.widths.get(size, size) for size in shape_of(tensor)]
        if not tensor.is_floating_point():
            return torch.zeros(shape, dtype=tensor.dtype)
        return torch.randn(shape, generator=self.generator, dtype=self.dtype)


def own_method(module: nn.Module, name: str) -> Callable[..., Any]:
    """Returns the function behind an instance's method, which takes the module first.

    Raises:
        UnsupportedModelError: the instance has one that is tied to another object, and can't be
            called for a copy.
    """
    own = vars(module).get(name)
    if own is None:
        found: Callable[..., Any] = getattr(type(module), name)
        return found
    if getattr(own, "__self__", None) is not module:
        raise UnsupportedModelError(
            f"{type(module).__name__}.{name} was replaced by {own!r}, which is not bound to the "
            "module. Install the "
            f"tiles before whatever replaced it."
        )
    bound: Callable[..., Any] = own.__func__
    return bound


def _copy(module: nn.Module, weights: _Weights, seen: dict[int, nn.Module]) -> nn.Module:
    if id(module) in seen:
        return seen[id(module)]
    # The class may have been changed to one whose constructor does something else, as FSDP2 does
    # it.
    twin: nn.Module = object.__new__(type(module))
    seen[id(module)] = twin
    values = dict(vars(module))
    if "forward" in values:
        values["forward"] = MethodType(own_method(module, "forward"), twin)
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
def own_random_numbers(seed: int) -> Iterator[None]:
    """Draws from generators that start at `seed`; the process's go on afterwards as if nothing had
    been drawn.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def draws_random_numbers(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> bool:
    """Returns True when two calls that differ only in their random numbers differ in their
    result.
    """
    results: list[Any] = []
    for seed in (0, 1):
        with own_random_numbers(seed), torch.no_grad():
            results.append(function(*[tensor.clone() for tensor in inputs]))
    return all(isinstance(result, Tensor) for result in results) and not torch.equal(*results)


def treats_rows_alone(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], row_dim: int
) -> str:
    """Returns why the function can't be computed in tiles of rows, or nothing where it can.

    Args:
        function: draws no random numbers.
        inputs: alike in `row_dim` and the dims before it.
        row_dim: the dim of tokens.
    """
    given = [tensor.clone() for tensor in inputs]
    with torch.no_grad():
        whole: Any = function(*given)
        if not isinstance(whole, Tensor):
            return f"it returns {type(whole).__name__}, not one tensor"
        if whole.shape[: row_dim + 1] != inputs[0].shape[: row_dim + 1]:
            return (
                f"its output has shape {list(whole.shape)} for an input of {list(inputs[0].shape)}"
            )
        if any(not torch.equal(tensor, old) for tensor, old in zip(given, inputs)):
            return "it changes its input in place"
        parts = [
            function(*[tensor.narrow(row_dim, *part) for tensor in inputs])
            for part in ((0, 2), (2, ROWS - 2))
        ]
    difference = (torch.cat(parts, row_dim) - whole).abs().max()
    return (
        ""
        if difference <= SAME_ROWS * whole.abs().max()
        else "what it makes of a token depends on other tokens"
    )


def used_parameters(
    module: nn.Module, function: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> tuple[str, ...]:
    """Returns the names of the parameters that the function reads, those of `module` being
    asked.
    """
    named = dict(module.named_parameters())
    asked = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    with torch.enable_grad():
        grads = torch.autograd.grad(
            function(*inputs).sum(), list(asked.values()), allow_unused=True
        )
    return tuple(name for name, grad in zip(asked, grads) if grad is not None)


def has_hooks(module: nn.Module) -> bool:
    """Returns True when something watches a module's calls; DeepSpeed's parameter gathering is no
    such thing.
    """
    return any(
        not getattr(hook, "__module__", "").startswith("deepspeed.")
        for kind in _private_api.MODULE_HOOKS
        for hook in getattr(module, kind).values()
    )
