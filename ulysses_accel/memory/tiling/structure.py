"""Which blocks can be tiled and by which formula: told by their structure, confirmed by what they
compute.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ulysses_accel import _private_api
from ulysses_accel.errors import UnsupportedModelError
from ulysses_accel.memory.tiling.mlp_formula import MlpCall, Projection, tile_projections
from ulysses_accel.memory.tiling.probe import (
    draws_random_numbers,
    inputs_like,
    own_method,
    shape_of,
    small_copy,
    treats_rows_alone,
    used_parameters,
)

# float64, the same products in the same order but for the sum over two projections.
SAME_FORMULA = 1e-12
# transformers names the part of a layer that it can compute in chunks of tokens itself.
CHUNK_METHODS = ("feed_forward_chunk", "ff_chunk")
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda tensor: F.gelu(tensor, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda tensor: F.relu(tensor).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class Formula:
    """`down(act(gate(x)) * up(x))` in names.

    Args:
        linears: names of the linear layers.
        gate: the projection under the activation.
        up: the projection that multiplies it, if there is one.
        down: the last one.
        activation: an attribute of the module, or a key of `FUNCTIONS`.
    """

    linears: tuple[str, ...]
    gate: Projection
    up: Projection | None
    down: Projection
    activation: str

    def call(self, module: nn.Module, rows: int) -> MlpCall:
        """Returns what `tile_projections` takes for this module."""
        activation = getattr(module, self.activation, None) or FUNCTIONS[self.activation]
        return MlpCall(activation, self.gate, self.up, self.down, rows)

    def parameters(self, module: nn.Module) -> list[Tensor | None]:
        """Returns weight and bias of each linear layer, as this module has them now."""
        children = [module.get_submodule(name) for name in self.linears]
        return [getattr(child, name, None) for child in children for name in ("weight", "bias")]

    def width(self, module: nn.Module) -> int:
        """Returns how many features go into the last projection."""
        rows, columns = shape_of(module.get_submodule(self.linears[-1]).get_parameter("weight"))
        return rows if self.down.in_by_out else columns


@dataclass(frozen=True)
class Plan:
    """How a block is tiled.

    Args:
        method: the method that is computed in tiles.
        inputs: names of its tensor arguments, which have one row per token.
        formula: the block's formula; None where autograd reruns it tile by tile.
        random: it draws random numbers in training.
        parameters: names of the parameters that it reads.
        width: features of its widest intermediate, counted per token and expert.
        routed: it computes tokens by the experts that the second input names.
    """

    method: str
    inputs: tuple[str, ...]
    formula: Formula | None
    random: bool
    parameters: tuple[str, ...]
    width: int
    routed: bool


def make_plan(
    module: nn.Module, method: str = "forward", original: Callable[..., Any] | None = None
) -> Plan:
    """Returns how the block is tiled.

    Args:
        module: a feed-forward block, an experts' block, or a layer that has a chunk method.
        method: what to compute in tiles.
        original: the function behind the method, where the module's own is in tiles already.

    Raises:
        UnsupportedModelError: it can't be computed in tiles; the message says why.
    """
    inputs = input_names(module, method)
    if not inputs:
        raise _refusal(
            module, f"its {method} takes other arguments than one row of features per token"
        )
    try:
        return _probed_plan(module, method, inputs, original or own_method(module, method))
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise _refusal(
            module, f"a small copy of it could not be run ({type(error).__name__}: {error})"
        ) from error


def _probed_plan(
    module: nn.Module, method: str, inputs: tuple[str, ...], original: Callable[..., Any]
) -> Plan:
    routed = is_experts(module)
    # Grouped products are not made in float64.
    twin = small_copy(module, torch.float32 if routed else torch.float64)
    function = functools.partial(original, twin)
    setattr(twin, method, function)
    arguments = _probe_arguments(twin, function, len(inputs), routed)
    random = draws_random_numbers(function, arguments)
    twin.train(not random)
    why_not = treats_rows_alone(function, arguments, 0 if routed else 1)
    if why_not:
        raise _refusal(module, why_not)
    formula = (
        None
        if random or len(inputs) > 1 or method != "forward"
        else _find_formula(twin, arguments[0])
    )
    parameters = used_parameters(twin, function, arguments)
    width = formula.width(module) if formula is not None else _widest(module, parameters)
    return Plan(method, inputs, formula, random, parameters, width, routed)


def _refusal(module: nn.Module, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(module).__name__} can't be computed in tiles of tokens: {reason}. Leave it as it "
        "is: its memory grows "
        f"with the sequence, its results are right."
    )


def input_names(module: nn.Module, method: str = "forward") -> tuple[str, ...]:
    """Returns the arguments that have one row per token; nothing where the method takes more than a
    block would.
    """
    named = inspect.signature(getattr(module, method)).parameters.values()
    plain = [it for it in named if it.kind not in (it.VAR_POSITIONAL, it.VAR_KEYWORD)]
    if is_experts(module):
        return tuple(it.name for it in plain) if len(plain) == 3 else ()
    required = [it.name for it in plain if it.default is it.empty]
    return tuple(required) if 1 <= len(required) <= 2 and len(plain) - len(required) <= 2 else ()


def _probe_arguments(
    twin: nn.Module, function: Callable[..., Any], num_inputs: int, routed: bool
) -> list[Tensor]:
    """A few rows that the copy takes; of the widths that a block may have, the first that fits."""
    problem: Exception | None = None
    for width in _hidden_widths(twin, routed):
        arguments = _routed_arguments(twin, width) if routed else _rows(num_inputs, width)
        try:
            with torch.no_grad():
                function(*arguments)
            return arguments
        except Exception as error:
            problem = problem or error
    raise problem or ValueError("it has no linear layer")


def _rows(num_inputs: int, width: int) -> list[Tensor]:
    return inputs_like([width] * num_inputs, torch.float64)


def _routed_arguments(twin: nn.Module, width: int) -> list[Tensor]:
    num_experts = next(
        parameter.shape[0] for parameter in twin.parameters(recurse=False) if parameter.dim() == 3
    )
    chosen = min(2, num_experts)
    hidden, scores = (tensor[0] for tensor in inputs_like([width, chosen], torch.float32))
    index = torch.stack(
        [torch.arange(row, row + chosen) % num_experts for row in range(hidden.shape[0])]
    )
    return [hidden, index, scores]


def _hidden_widths(twin: nn.Module, routed: bool) -> list[int]:
    """Widths that a block's input may have: those that all of its projections have, or its
    norms'.
    """
    if routed:
        weights = [
            parameter for parameter in twin.parameters(recurse=False) if parameter.dim() == 3
        ]
        sizes: Sequence[set[int]] = [set(weight.shape[1:]) for weight in weights]
    else:
        sizes = [set(dims) for dims in linear_children(twin).values()]
    common = set.union(*sizes) if sizes else set()
    normed = {parameter.shape[0] for parameter in twin.parameters() if parameter.dim() == 1}
    return [*sorted(common), *sorted(normed - common)]


def _widest(module: nn.Module, names: tuple[str, ...]) -> int:
    shapes = [shape_of(module.get_parameter(name)) for name in names]
    return max(
        (max(shape[-2:]) for shape in shapes if len(shape) > 1),
        default=max(max(shape) for shape in shapes),
    )


def is_experts(module: nn.Module) -> bool:
    """Returns True for a module that holds the matrices of several experts in one parameter
    each.
    """
    return (
        sum(
            len(shape_of(parameter)) == 3
            for parameter in _private_api.module_parameters(module).values()
            if parameter is not None
        )
        > 1
    )


def linear_children(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Returns the sizes of the linear layers right below a module, wrapped ones (LoRA, quantised)
    included.
    """
    found = {}
    for name, child in module.named_children():
        sizes = (getattr(child, "in_features", None), getattr(child, "out_features", None))
        weight = getattr(child, "weight", None)
        if isinstance(sizes[0], int) and isinstance(sizes[1], int):
            found[name] = (sizes[0], sizes[1])
        elif (
            isinstance(weight, Tensor)
            and len(shape_of(weight)) == 2
            and not isinstance(child, nn.Embedding)
        ):
            rows, columns = shape_of(weight)
            found[name] = (rows, columns)
    return found


def looks_like_mlp(module: nn.Module) -> bool:
    """Returns True for two or three linear layers that widen, or narrow, and come back to the same
    width.
    """
    sizes = [tuple(sorted(dims)) for dims in linear_children(module).values()]
    if (
        len(sizes) not in (2, 3)
        or len({min(dims) for dims in sizes} | {max(dims) for dims in sizes}) == 1
    ):
        return False
    first, *others = sizes
    if all(dims == first for dims in others):
        return True
    shared = set(first) & set(others[-1])
    # What makes gate and up at once is twice as wide as what comes behind it.
    return len(sizes) == 2 and any(
        {2 * (sum(a) - width), width} == {sum(b) - width, width}
        for a, b in (sizes, sizes[::-1])
        for width in shared
        if width in a and width in b
    )


def _find_formula(twin: nn.Module, hidden: Tensor) -> Formula | None:
    """The formula that gives what the copy gives on `hidden`, if one does."""
    with torch.no_grad():
        expected = twin(hidden)
        for formula in _candidates(twin):
            try:
                output = tile_projections(formula.call(twin, 4), hidden, formula.parameters(twin))
            except (RuntimeError, TypeError, AttributeError):
                continue
            same_shape = output.shape == expected.shape and output.dtype == expected.dtype
            if (
                same_shape
                and (output - expected).abs().max() <= SAME_FORMULA * expected.abs().max()
            ):
                return formula
    return None


def _candidates(twin: nn.Module) -> Iterator[Formula]:
    orientations = {
        name: stored
        for name, child in twin.named_children()
        if (stored := _is_in_by_out(child)) is not None
    }
    if len(orientations) != sum(1 for _ in linear_children(twin)) or len(orientations) not in (
        2,
        3,
    ):
        return
    for names in itertools.permutations(orientations):
        parts = [Projection(2 * i, orientations[name]) for i, name in enumerate(names)]
        for activation in _activations(twin):
            if len(names) == 3:
                yield Formula(names, parts[0], parts[1], parts[2], activation)
            else:
                yield Formula(names, parts[0], None, parts[1], activation)
                for half in (0, 1):
                    halves = [
                        Projection(0, parts[0].in_by_out, which) for which in (half, 1 - half)
                    ]
                    yield Formula(names, halves[0], halves[1], parts[1], activation)


def _is_in_by_out(child: nn.Module) -> bool | None:
    """How a linear layer stores its weight; None for anything else."""
    weight, bias = getattr(child, "weight", None), getattr(child, "bias", None)
    own = {id(parameter) for parameter in child.parameters()}
    if (
        not isinstance(weight, Tensor)
        or weight.dim() != 2
        or own != {id(it) for it in (weight, bias) if it is not None}
    ):
        return None
    for in_by_out in (False, True):
        matrix = weight if in_by_out else weight.t()
        (rows,) = inputs_like([matrix.shape[0]], torch.float64)
        try:
            difference: Any = child(rows) - (rows @ matrix + (0 if bias is None else bias))
        except (RuntimeError, TypeError):
            continue
        if difference.abs().max() <= SAME_FORMULA * rows.shape[-1]:
            return in_by_out
    return None


def _activations(twin: nn.Module) -> list[str]:
    children = [
        name
        for name, child in twin.named_children()
        if not any(True for _ in child.parameters()) and not isinstance(child, nn.Dropout)
    ]
    attributes = [
        name for name, value in vars(twin).items() if callable(value) and not name.startswith("_")
    ]
    return [*children, *attributes, *FUNCTIONS]
