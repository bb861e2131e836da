"""Which blocks can be tiled, and by which formula: suggested by their structure, confirmed by
running a small copy.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ulysses_accel.errors import UnsupportedModelError
from ulysses_accel.memory.tiling.method import unbound_method
from ulysses_accel.memory.tiling.mlp_formula import MlpCall, Projection, tile_projections
from ulysses_accel.memory.tiling.probe import (
    draws_random_numbers,
    inputs_like,
    shape_of,
    small_copy,
    treats_rows_alone,
    used_parameters,
)

# In float64; the formula computes the same products as the module, and may sum the two projections
# in another order.
SAME_FORMULA = 1e-12
# The methods that transformers 5 passes to apply_chunking_to_forward.
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
    """`down(act(gate(x)) * up(x))`, by the names of a module's children.

    Args:
        linears: names of the linear layers.
        gate: the projection that the activation is applied to.
        up: the projection that multiplies the activation; None for a block without gate.
        down: the projection back to the hidden size.
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
        result: list[Tensor | None] = []
        for name in self.linears:
            child = module.get_submodule(name)
            result += [getattr(child, "weight", None), getattr(child, "bias", None)]
        return result

    def width(self, module: nn.Module) -> int:
        """Returns the number of input features of the last projection."""
        rows, columns = shape_of(module.get_submodule(self.linears[-1]).get_parameter("weight"))
        return rows if self.down.in_by_out else columns


@dataclass(frozen=True)
class Plan:
    """How a block is tiled.

    Args:
        method: the method that is computed in tiles.
        inputs: names of its tensor arguments, which have one row per token.
        formula: the block's formula; None where autograd differentiates it tile by tile.
        random: whether it draws random numbers in training.
        parameters: names of the parameters that it reads.
        width: features of its widest intermediate, per token and expert.
        routed: whether its second input says which experts compute each token.
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
        original: the method's function, where the instance's method is tiled already.

    Raises:
        UnsupportedModelError: it can't be computed in tiles; the message says why.
    """
    inputs = input_names(module, method)
    if not inputs:
        raise _refusal(
            module, f"its {method} takes other arguments than one row of features per token"
        )
    try:
        return _probed_plan(module, method, inputs, original or unbound_method(module, method))
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
    # torch's grouped matrix products don't take float64.
    twin = small_copy(module, torch.float32 if routed else torch.float64)
    function = functools.partial(original, twin)
    setattr(twin, method, function)
    arguments = _probe_arguments(twin, function, len(inputs), routed)
    random = draws_random_numbers(function, arguments)
    twin.train(not random)
    why_not = treats_rows_alone(function, arguments, 0 if routed else 1)
    if why_not:
        raise _refusal(module, why_not)
    formula = None
    if not random and len(inputs) == 1 and method == "forward":
        formula = _find_formula(twin, arguments[0])
    parameters = used_parameters(twin, function, arguments)
    width = formula.width(module) if formula is not None else _widest(module, parameters)
    return Plan(method, inputs, formula, random, parameters, width, routed)


def _refusal(module: nn.Module, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(module).__name__} can't be computed in tiles of tokens: {reason}. Leave it as it "
        "is: its memory grows with the sequence, its results are right."
    )


def input_names(module: nn.Module, method: str = "forward") -> tuple[str, ...]:
    """Returns the names of the arguments that have one row per token; none where the method takes
    other arguments than a block does.
    """
    plain = []
    for parameter in inspect.signature(getattr(module, method)).parameters.values():
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            plain.append(parameter)
    if is_experts(module):
        return tuple(parameter.name for parameter in plain) if len(plain) == 3 else ()
    required = [parameter.name for parameter in plain if parameter.default is parameter.empty]
    num_optional = len(plain) - len(required)
    return tuple(required) if 1 <= len(required) <= 2 and num_optional <= 2 else ()


def _probe_arguments(
    twin: nn.Module, function: Callable[..., Any], num_inputs: int, routed: bool
) -> list[Tensor]:
    """Returns a few rows that the copy accepts, of the first width that fits."""
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
    """Returns the widths that a block's input may have: those of its projections, then those of
    its norms and biases.
    """
    projected: set[int] = set()
    if routed:
        for parameter in twin.parameters(recurse=False):
            if parameter.dim() == 3:
                projected.update(parameter.shape[1:])
    else:
        for sizes in linear_children(twin).values():
            projected.update(sizes)
    normed = {parameter.shape[0] for parameter in twin.parameters() if parameter.dim() == 1}
    return [*sorted(projected), *sorted(normed - projected)]


def _widest(module: nn.Module, names: tuple[str, ...]) -> int:
    shapes = [shape_of(module.get_parameter(name)) for name in names]
    matrices = [shape[-2:] for shape in shapes if len(shape) > 1]
    return max(max(shape) for shape in matrices or shapes)


def is_experts(module: nn.Module) -> bool:
    """Returns whether a module stacks the weights of several experts in parameters of three
    dims.
    """
    parameters = module.parameters(recurse=False)
    return sum(len(shape_of(parameter)) == 3 for parameter in parameters) > 1


def linear_children(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Returns the sizes of a module's linear children by name, wrapped ones (LoRA, quantised)
    included.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for name, child in module.named_children():
        num_in, num_out = getattr(child, "in_features", None), getattr(child, "out_features", None)
        weight = getattr(child, "weight", None)
        if isinstance(num_in, int) and isinstance(num_out, int):
            sizes[name] = num_in, num_out
        elif isinstance(weight, Tensor) and not isinstance(child, nn.Embedding):
            shape = shape_of(weight)
            if len(shape) == 2:
                sizes[name] = shape[0], shape[1]
    return sizes


def looks_like_mlp(module: nn.Module) -> bool:
    """Returns whether a module has two or three linear children that widen, or narrow, and return
    to the same width.
    """
    sizes = [(min(pair), max(pair)) for pair in linear_children(module).values()]
    if len(sizes) not in (2, 3) or all(pair == (sizes[0][0],) * 2 for pair in sizes):
        return False
    if all(pair == sizes[0] for pair in sizes):
        return True
    return len(sizes) == 2 and (_is_fused_with(*sizes) or _is_fused_with(*reversed(sizes)))


def _is_fused_with(down: tuple[int, int], fused: tuple[int, int]) -> bool:
    """Returns whether the sizes of two linear layers are those of a down projection and of gate and
    up in one: equal hidden size, twice the intermediate size.
    """
    for hidden in set(down) & set(fused):
        inner, fused_inner = sum(down) - hidden, sum(fused) - hidden
        if {2 * inner, hidden} == {fused_inner, hidden}:
            return True
    return False


def _find_formula(twin: nn.Module, hidden: Tensor) -> Formula | None:
    """Returns the formula whose output on `hidden` is the copy's; None where there is none."""
    with torch.no_grad():
        expected = twin(hidden)
        for formula in _candidates(twin):
            try:
                output = tile_projections(formula.call(twin, 4), hidden, formula.parameters(twin))
            except (RuntimeError, TypeError, AttributeError):
                continue
            if output.shape != expected.shape or output.dtype != expected.dtype:
                continue
            if (output - expected).abs().max() <= SAME_FORMULA * expected.abs().max():
                return formula
    return None


def _candidates(twin: nn.Module) -> Iterator[Formula]:
    """Yields every assignment of a block's linear layers and activations to the formula."""
    orientations: dict[str, bool] = {}
    for name, child in twin.named_children():
        is_in_by_out = _is_in_by_out(child)
        if is_in_by_out is not None:
            orientations[name] = is_in_by_out
    if len(orientations) != len(linear_children(twin)) or len(orientations) not in (2, 3):
        return
    for names in itertools.permutations(orientations):
        parts = [Projection(2 * i, orientations[name]) for i, name in enumerate(names)]
        for activation in _activations(twin):
            if len(names) == 3:
                yield Formula(names, parts[0], parts[1], parts[2], activation)
            else:
                yield Formula(names, parts[0], None, parts[1], activation)
                # Gate and up in one weight, in either order.
                first, second = (Projection(0, parts[0].in_by_out, half) for half in (0, 1))
                yield Formula(names, first, second, parts[1], activation)
                yield Formula(names, second, first, parts[1], activation)


def _is_in_by_out(child: nn.Module) -> bool | None:
    """Returns whether a linear layer stores its weight `[in, out]`; None for anything else."""
    weight, bias = getattr(child, "weight", None), getattr(child, "bias", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    expected = {id(tensor) for tensor in (weight, bias) if tensor is not None}
    if {id(parameter) for parameter in child.parameters()} != expected:
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
    """Returns the names of what may be a block's activation: children without parameters, callable
    attributes, and the functions that a forward may call directly.
    """
    children = [
        name
        for name, child in twin.named_children()
        if next(child.parameters(), None) is None and not isinstance(child, nn.Dropout)
    ]
    attributes = [
        name for name, value in vars(twin).items() if callable(value) and not name.startswith("_")
    ]
    return [*children, *attributes, *FUNCTIONS]
