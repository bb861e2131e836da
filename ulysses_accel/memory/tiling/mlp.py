"""Feed-forward and experts' blocks in tiles of tokens: what is wide about them exists for one tile
at a time.

A block is found by its structure, and what it computes is confirmed on a small copy before anything
is installed. The module stays what it is, with its children and parameter names; only its
instance's `forward` is another, until `uninstall`. How many tiles there are is arithmetic on
shapes: no collective, and nothing is read back from a device.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ulysses_accel import _private_api
from ulysses_accel.errors import ConfigError, UnsupportedModelError
from ulysses_accel.memory.tiling.mlp_formula import tile_projections
from ulysses_accel.memory.tiling.probe import has_hooks, own_method
from ulysses_accel.memory.tiling.rows import rows_per_tile, tile_rows
from ulysses_accel.memory.tiling.structure import (
    CHUNK_METHODS,
    Formula,
    input_names,
    is_experts,
    linear_children,
    looks_like_mlp,
    make_plan,
)

Method = Callable[..., Any]


class InstalledTiles:
    """Methods of module instances that are computed in tiles; `uninstall` gives back the ones they
    had.

    Args:
        originals: module, name of the method, and the instance's own attribute of that name, if it
            had one.
    """

    def __init__(self, originals: list[tuple[nn.Module, str, Method | None]]) -> None:
        self._originals = originals

    def add(self, other: InstalledTiles) -> None:
        """Takes another's methods over, to be given back with these."""
        self._originals += other._originals

    def uninstall(self) -> None:
        """Takes the tiles away again; may be called twice."""
        while self._originals:
            module, method, original = self._originals.pop()
            if original is None:
                vars(module).pop(method, None)
            else:
                setattr(module, method, original)


def install_method(module: nn.Module, method: str, tiled: Callable[..., Any]) -> InstalledTiles:
    """Replaces a method of one module.

    Args:
        module: the instance; its class and other instances stay as they are.
        method: name of the method.
        tiled: called as `tiled(original, module, *args, **kwargs)`, where `original` takes the
            module first.

    Raises:
        UnsupportedModelError: the instance's own method is tied to another object, and can't be
            called for a copy.
    """
    own, original = vars(module).get(method), own_method(module, method)

    @functools.wraps(original)
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return tiled(original, self, *args, **kwargs)

    # Bound to the module it is an attribute of, also when that is a deep copy of this one.
    setattr(module, method, MethodType(forward, module))
    return InstalledTiles([(module, method, own)])


def tile_mlp(module: nn.Module, *, tile_bytes: int | None = None) -> InstalledTiles:
    """Computes a block tile by tile from now on.

    Args:
        module: a feed-forward block (gated, fused or plain, LoRA-wrapped or not), an experts'
            block, or a layer that has a `feed_forward_chunk`.
        tile_bytes: bytes of one tile's widest intermediate. Default: a twentieth of the input's
            size, 128 MiB at most, and not less than 256 tokens.

    Returns:
        What `uninstall` is called on.

    Raises:
        ConfigError: `tile_bytes` is not positive.
        UnsupportedModelError: the block can't be computed in tiles; the message says why.
    """
    tiling = Tiling(module, _method_of(module), tile_bytes)
    installed = install_method(module, tiling.method, tiling)
    if tiling.method == "forward" and _private_api.ZERO3_LEAF not in vars(module):
        # The children are not called; DeepSpeed gathers a leaf's parameters around the leaf's own
        # forward and backward.
        vars(module)[_private_api.ZERO3_LEAF] = True
        installed.add(InstalledTiles([(module, _private_api.ZERO3_LEAF, None)]))
    return installed


def _method_of(module: nn.Module) -> str:
    if hasattr(module, "chunk_size_feed_forward"):
        return next((name for name in CHUNK_METHODS if hasattr(module, name)), "forward")
    return "forward"


class Tiling:
    """One block's tiles: decides at each call, from shapes and from what the block's children are
    by then.

    Args:
        module: the block.
        method: the method that is computed in tiles.
        tile_bytes: as for `tile_mlp`.
    """

    def __init__(self, module: nn.Module, method: str, tile_bytes: int | None) -> None:
        if tile_bytes is not None and tile_bytes < 1:
            raise ConfigError(
                f"tile_bytes={tile_bytes} is not a positive number of bytes. Use some megabytes, "
                "or None."
            )
        self.method, self.tile_bytes = method, tile_bytes
        self.plan = make_plan(module, method)
        self.signature = _signature(module)

    def __call__(self, original: Method, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Computes one call, in tiles where it has rows."""
        inputs = self._inputs(original, module, args, kwargs)
        if inputs is None:
            return original(module, *args, **kwargs)
        self._follow_changes(module, original)
        rows = self.rows(inputs)
        if not torch.is_grad_enabled() and rows >= inputs[0].shape[:-1].numel():
            return original(module, *args, **kwargs)
        return self.compute(functools.partial(original, module), module, inputs, rows)

    def rows(self, inputs: list[Tensor]) -> int:
        """Returns how many rows a tile has."""
        first, plan = inputs[0], self.plan
        copies = inputs[1].shape[-1] if plan.routed else 1
        size = first.element_size()
        row_bytes = plan.width * copies * size
        return rows_per_tile(
            first.shape[:-1].numel(), row_bytes, first.shape[-1] * size, self.tile_bytes
        )

    def compute(
        self, original: Callable[..., Tensor], module: nn.Module, inputs: list[Tensor], rows: int
    ) -> Tensor:
        """Returns the output, by the block's formula where it has one and autograd's help
        elsewhere.
        """
        formula = self.plan.formula
        if formula is not None and _is_plain(module, formula):
            return tile_projections(
                formula.call(module, rows), inputs[0], formula.parameters(module)
            )
        parameters = [module.get_parameter(name) for name in self.plan.parameters]
        return tile_rows(original, inputs, parameters, rows, random=self.plan.random)

    def _inputs(
        self, original: Method, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Tensor] | None:
        """The tensors to cut into rows; None for a call that has no rows, or arguments beside
        them.
        """
        try:
            given = inspect.signature(original).bind(module, *args, **kwargs).arguments
        except TypeError:
            return None
        inputs = [given.pop(name, None) for name in self.plan.inputs]
        extra = [value for value in list(given.values())[1:] if value is not None and value != {}]
        first = inputs[0]
        if extra or not isinstance(first, Tensor) or first.dim() < 2 or first.numel() == 0:
            return None
        lead = first.shape[:-1]
        tensors = [
            it
            for it in inputs
            if isinstance(it, Tensor) and it.dim() == first.dim() and it.shape[:-1] == lead
        ]
        return tensors if len(tensors) == len(inputs) else None

    def _follow_changes(self, module: nn.Module, original: Method) -> None:
        # An adapter may have been injected, or a dropout switched on, since the tiles were
        # installed.
        signature = _signature(module)
        if signature != self.signature:
            self.plan, self.signature = make_plan(module, self.method, original), signature


def _signature(module: nn.Module) -> tuple[Any, ...]:
    """What a block's code depends on: its children's types, and settings such as a dropout's
    probability.
    """
    return tuple(
        (
            name,
            type(child),
            tuple(
                (key, value)
                for key, value in vars(child).items()
                if type(value) is float and key[0] != "_"
            ),
        )
        for name, child in module.named_modules()
    )


def _is_plain(module: nn.Module, formula: Formula) -> bool:
    """True where calling the children would do nothing but their products."""
    for name, child in module.named_children():
        if isinstance(child, FSDPModule):
            raise UnsupportedModelError(
                f"{type(module).__name__}.{name} is sharded by FSDP2 on its own, and would be "
                "gathered once for every "
                f"tile. Shard the whole {type(module).__name__} or the layer around it."
            )
        if has_hooks(child) or "forward" in vars(child):
            return False
    weights = [weight for weight in formula.parameters(module) if weight is not None]
    return all(
        type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() for weight in weights
    )


def find_tileable(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Finds the blocks of a model whose intermediates need not exist for the whole sequence.

    Args:
        model: any model, on any device, whole or in pieces.

    Returns:
        The blocks to give to `tile_mlp`, by name; and, by name, why others that look like one can't
        be tiled.
    """
    tileable: dict[str, nn.Module] = {}
    refused: dict[str, str] = {}
    plans: dict[Any, str] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{other}.") for other in tileable) or not _is_candidate(module):
            continue
        key = (
            type(module),
            _signature(module),
            tuple((n, tuple(p.shape)) for n, p in module.named_parameters()),
        )
        if key not in plans:
            plans[key] = _why_not(module)
        if plans[key]:
            refused[name] = plans[key]
        else:
            tileable[name] = module
    return tileable, refused


def _is_candidate(module: nn.Module) -> bool:
    return _method_of(module) != "forward" or is_experts(module) or looks_like_mlp(module)


def _why_not(module: nn.Module) -> str:
    method = _method_of(module)
    if method == "forward" and not input_names(module):
        inner = ", ".join(linear_children(module)) or "its experts"
        name = type(module).__name__
        return f"{name} computes {inner} inside a forward that takes more than rows of features"
    try:
        make_plan(module, method)
    except UnsupportedModelError as error:
        return str(error)
    return ""


def tile_mlps(model: nn.Module, *, tile_bytes: int | None = None) -> InstalledTiles:
    """Computes every block of a model that can be tiled tile by tile from now on.

    Args:
        model: any model.
        tile_bytes: as for `tile_mlp`.

    Returns:
        What `uninstall` is called on.

    Raises:
        ConfigError: `tile_bytes` is not positive.
        UnsupportedModelError: no block of the model can be tiled; the message says why for each.
    """
    tileable, refused = find_tileable(model)
    if not tileable:
        reasons = (
            "; ".join(f"{name}: {reason}" for name, reason in refused.items())
            or "no block looks like one"
        )
        raise UnsupportedModelError(
            f"{type(model).__name__} has no feed-forward block to tile. {reasons}"
        )
    installed = InstalledTiles([])
    for module in tileable.values():
        installed.add(tile_mlp(module, tile_bytes=tile_bytes))
    return installed
