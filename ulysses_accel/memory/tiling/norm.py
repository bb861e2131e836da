"""Norms in tiles of rows: transformers computes them in float32, and only a tile of that needs to
exist at a time.

RMS norms of the usual kinds have a backward of their own, in one pass over the rows; others are
rerun by autograd tile by tile. What they give is to the last bit what the module gives. torch's own
`nn.LayerNorm` and `nn.RMSNorm` make no float32 copies and are left alone. A residual sum can't join
in from outside: the sum is part of a layer's own forward.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ulysses_accel import _private_api
from ulysses_accel.errors import UnsupportedModelError
from ulysses_accel.memory.tiling.mlp import InstalledTiles, Tiling, install_method
from ulysses_accel.memory.tiling.probe import inputs_like, shape_of, small_copy
from ulysses_accel.memory.tiling.rows import flat_rows, rows_per_tile, tile_rows, tiles
from ulysses_accel.memory.tiling.structure import input_names

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class RmsFormula:
    """`weight * x / sqrt(mean(x^2) + eps)` in float32.

    Args:
        eps: name of the module's attribute.
        offset: 1 where the weight counts from one, as Gemma's.
        rounds_first: the normalised rows are rounded to their own dtype before the weight, as
            Llama's.
    """

    eps: str
    offset: int
    rounds_first: bool

    def weight(self, weight: Tensor) -> Tensor:
        """Returns what the normalised rows are multiplied by."""
        return weight.float() + 1.0 if self.offset else weight

    def output(self, rows: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
        """Returns normalised rows, from float32 maths: `[rows, D] -> [rows, D]`."""
        normed = rows.float() * rstd
        if self.rounds_first:
            return self.weight(weight) * normed.to(rows.dtype)
        return (self.weight(weight) * normed).to(rows.dtype)


def _rstd(rows: Tensor, eps: float) -> Tensor:
    """`[rows, D] -> [rows, 1]`."""
    return torch.rsqrt(rows.float().pow(2).mean(-1, keepdim=True) + eps)


class _TiledRmsNorm(torch.autograd.Function):
    """The norm of `hidden [.., D]`; saves it, and one float32 per row."""

    @staticmethod
    def forward(
        ctx: Any, formula: RmsFormula, eps: float, num_rows: int, hidden: Tensor, weight: Tensor
    ) -> Tensor:
        rows = flat_rows(hidden)
        dtype = formula.output(rows[:0], rows[:0].float(), weight).dtype
        output = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
        output_rows, rstd = flat_rows(output), rows.new_empty(rows.shape[0], 1, dtype=torch.float32)
        for tile in tiles(rows.shape[0], num_rows):
            rstd[tile] = _rstd(rows[tile], eps)
            output_rows[tile] = formula.output(rows[tile], rstd[tile], weight)
        ctx.save_for_backward(hidden, weight, rstd)
        ctx.formula, ctx.num_rows = formula, num_rows
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, rstd = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[3:]
        rows, grads = flat_rows(hidden), flat_rows(grad)
        grad_hidden = (
            torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
            if needs_hidden
            else None
        )
        total = (
            torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            if needs_weight
            else None
        )
        factor = ctx.formula.weight(weight).float()
        for tile in tiles(rows.shape[0], ctx.num_rows):
            normed, part = rows[tile].float() * rstd[tile], grads[tile].float()
            if total is not None:
                total += (part * normed).sum(0)
            if grad_hidden is not None:
                part = part * factor
                part -= normed * (part * normed).mean(-1, keepdim=True)
                flat_rows(grad_hidden)[tile] = part.mul_(rstd[tile])
        return None, None, None, grad_hidden, None if total is None else total.to(weight.dtype)


class _NormTiling(Tiling):
    """One norm's tiles."""

    def __init__(self, module: nn.Module, tile_bytes: int | None) -> None:
        super().__init__(module, "forward", tile_bytes)
        self.rms = find_rms_formula(module)

    def rows(self, inputs: list[Tensor]) -> int:
        first = inputs[0]
        width, num_rows = first.shape[-1], first.shape[:-1].numel()
        return rows_per_tile(
            num_rows, width * torch.float32.itemsize, width * first.element_size(), self.tile_bytes
        )

    def compute(
        self, original: Callable[..., Tensor], module: nn.Module, inputs: list[Tensor], rows: int
    ) -> Tensor:
        weight = getattr(module, "weight", None)
        # In float64 the module's own float32 is the reference, down to autograd's roundings.
        if (
            self.rms is not None
            and type(weight) in (Tensor, nn.Parameter)
            and inputs[0].dtype in _DTYPES
        ):
            eps = getattr(module, self.rms.eps)
            output: Tensor = _TiledRmsNorm.apply(self.rms, eps, rows, inputs[0], weight)  # type: ignore[no-untyped-call]
            return output
        parameters = [module.get_parameter(name) for name in self.plan.parameters]
        return tile_rows(original, inputs, parameters, rows, may_skip=False)


def find_rms_formula(module: nn.Module) -> RmsFormula | None:
    """Returns the formula that gives the very numbers of a norm in every mixture of dtypes, if one
    does.

    Args:
        module: a norm; its code is run on a small copy.
    """
    eps_names = [name for name, value in vars(module).items() if type(value) is float]
    if set(_private_api.module_parameters(module)) != {"weight"} or len(input_names(module)) != 1:
        return None
    for eps, offset, rounds_first in itertools.product(eps_names, (0, 1), (True, False)):
        formula = RmsFormula(eps, offset, rounds_first)
        if all(_agrees(formula, module, *dtypes) for dtypes in itertools.product(_DTYPES, _DTYPES)):
            return formula
    return None


def _agrees(
    formula: RmsFormula, module: nn.Module, weight_dtype: torch.dtype, dtype: torch.dtype
) -> bool:
    twin = small_copy(module, weight_dtype)
    weight = twin.get_parameter("weight")
    (hidden,) = inputs_like([weight.shape[0]], dtype)
    with torch.no_grad():
        expected: Tensor = twin(hidden)
        found = formula.output(hidden, _rstd(hidden, getattr(twin, formula.eps)), weight)
    return found.dtype == expected.dtype and torch.equal(found, expected)


def is_norm(module: nn.Module) -> bool:
    """Returns True for what looks like a norm written in Python: a weight for each feature, and a
    small number.
    """
    own = list(module.parameters(recurse=False))
    native = isinstance(module, nn.LayerNorm | nn.RMSNorm) and type(module).forward in (
        nn.LayerNorm.forward,
        nn.RMSNorm.forward,
    )
    small = any(type(value) is float and 0 < value < 0.1 for value in vars(module).values())
    return (
        bool(own)
        and all(len(shape_of(parameter)) == 1 for parameter in own)
        and not any(True for _ in module.children())
        and small
        and not native
        and 1 <= len(input_names(module)) <= 2
    )


def tile_norm(module: nn.Module, *, tile_bytes: int | None = None) -> InstalledTiles:
    """Computes a norm tile by tile from now on.

    Args:
        module: a norm over the last dim.
        tile_bytes: bytes of one tile in float32. Default: a twentieth of the input's size, 128 MiB
            at most, and not less than 256 rows.

    Returns:
        What `uninstall` is called on.

    Raises:
        ConfigError: `tile_bytes` is not positive.
        UnsupportedModelError: the module can't be computed in tiles; the message says why.
    """
    return install_method(module, "forward", _NormTiling(module, tile_bytes))


def tile_norms(
    model: nn.Module, *, tile_bytes: int | None = None
) -> tuple[InstalledTiles, dict[str, str]]:
    """Computes every norm of a model that makes float32 copies tile by tile from now on.

    Args:
        model: any model; norms that make no copies are left alone.
        tile_bytes: as for `tile_norm`.

    Returns:
        What `uninstall` is called on; and, by name, why a norm is left as it is.
    """
    installed, refused = InstalledTiles([]), {}
    for name, module in model.named_modules():
        if is_norm(module):
            try:
                installed.add(tile_norm(module, tile_bytes=tile_bytes))
            except UnsupportedModelError as error:
                refused[name] = str(error)
    return installed, refused
