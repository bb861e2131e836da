"""Feed-forward and experts' blocks in tiles of tokens: the wide intermediate exists for one tile at
a time.

Blocks are recognised by their structure, and what they compute is confirmed on a small copy before
anything is installed. The module keeps its class, children and parameter names; only its instance's
`forward` is overridden. The number of tiles follows from shapes alone: it takes no collective and
no device synchronisation.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ulysses_accel import _private_api
from ulysses_accel.errors import ConfigError, UnsupportedModelError
from ulysses_accel.memory.tiling.method import InstalledTiles, Method
from ulysses_accel.memory.tiling.mlp_formula import tile_projections
from ulysses_accel.memory.tiling.probe import has_hooks
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


def tile_mlp(module: nn.Module, *, tile_bytes: int | None = None) -> InstalledTiles:
    """Computes a block tile by tile from now on.

    Args:
        module: a feed-forward block (gated, fused or plain, LoRA-wrapped or not), an experts'
            block, or a layer that has a `feed_forward_chunk`.
        tile_bytes: bytes of one tile's widest intermediate. Default: a twentieth of the input's
            size, 128 MiB at most, and not less than 256 tokens.

    Returns:
        The installation; its `close()` restores the block.

    Raises:
        ConfigError: `tile_bytes` is not positive.
        UnsupportedModelError: the block can't be computed in tiles; the message says why.
    """
    installed = InstalledTiles()
    _tile(installed, module, tile_bytes)
    return installed


def _tile(installed: InstalledTiles, module: nn.Module, tile_bytes: int | None) -> None:
    tiling = Tiling(module, _method_of(module), tile_bytes)
    installed.tile(module, tiling.method, tiling)
    if tiling.method == "forward" and _private_api.ZERO3_LEAF not in vars(module):
        # The tiles don't call the children. DeepSpeed gathers the parameters of a leaf module
        # around the leaf's own forward and backward.
        installed.set(module, _private_api.ZERO3_LEAF, True)


def _method_of(module: nn.Module) -> str:
    if hasattr(module, "chunk_size_feed_forward"):
        return next((name for name in CHUNK_METHODS if hasattr(module, name)), "forward")
    return "forward"


class Tiling:
    """The tiled forward of one block; each call decides from shapes and from the block's present
    children how it is tiled.

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
        """Computes one call, in tiles where its arguments are rows of tokens."""
        inputs = self._inputs(original, module, args, kwargs)
        if inputs is None:
            return original(module, *args, **kwargs)
        self._follow_changes(module, original)
        rows = self.rows(inputs)
        if not torch.is_grad_enabled() and rows >= inputs[0].shape[:-1].numel():
            return original(module, *args, **kwargs)
        return self.compute(functools.partial(original, module), module, inputs, rows)

    def rows(self, inputs: list[Tensor]) -> int:
        """Returns the number of rows in a tile."""
        first, plan = inputs[0], self.plan
        # Each token is computed once for each expert that it is routed to.
        copies = inputs[1].shape[-1] if plan.routed else 1
        size = first.element_size()
        row_bytes = plan.width * copies * size
        return rows_per_tile(
            first.shape[:-1].numel(), row_bytes, first.shape[-1] * size, self.tile_bytes
        )

    def compute(
        self, original: Callable[..., Tensor], module: nn.Module, inputs: list[Tensor], rows: int
    ) -> Tensor:
        """Returns the output: by the block's formula, which has a backward of its own, where one is
        known; otherwise autograd differentiates the block tile by tile.
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
        """Returns the tensors that are split into tiles; None for a call whose arguments are not
        all rows of the same tokens.
        """
        try:
            arguments = inspect.signature(original).bind(module, *args, **kwargs).arguments
        except TypeError:
            return None
        inputs = [arguments.pop(name, None) for name in self.plan.inputs]
        # The first of the others is the module.
        others = list(arguments.values())[1:]
        if any(value is not None and value != {} for value in others):
            return None
        first = inputs[0]
        if not isinstance(first, Tensor) or first.dim() < 2 or first.numel() == 0:
            return None
        tensors: list[Tensor] = []
        for tensor in inputs:
            if not isinstance(tensor, Tensor) or tensor.shape[:-1] != first.shape[:-1]:
                return None
            tensors.append(tensor)
        return tensors

    def _follow_changes(self, module: nn.Module, original: Method) -> None:
        # PEFT may have injected an adapter, or a dropout may have been enabled, since the tiles
        # were installed.
        signature = _signature(module)
        if signature != self.signature:
            self.plan, self.signature = make_plan(module, self.method, original), signature


def _signature(module: nn.Module) -> tuple[Any, ...]:
    """Returns what a block's computation depends on: its children's types, and settings such as a
    dropout's probability.
    """
    entries = []
    for name, child in module.named_modules():
        settings = [
            (key, value)
            for key, value in vars(child).items()
            if type(value) is float and key[0] != "_"
        ]
        entries.append((name, type(child), tuple(settings)))
    return tuple(entries)


def _is_plain(module: nn.Module, formula: Formula) -> bool:
    """Returns whether calling the children would compute nothing but their matrix products: no
    hooks, no replaced forwards, plain weights.
    """
    for name, child in module.named_children():
        if isinstance(child, FSDPModule):
            raise UnsupportedModelError(
                f"{type(module).__name__}.{name} is sharded by FSDP2 on its own, and would be "
                f"gathered once for every tile. Shard the whole {type(module).__name__} or the "
                "layer around it."
            )
        if has_hooks(child) or "forward" in vars(child):
            return False
    weights = [weight for weight in formula.parameters(module) if weight is not None]
    return all(
        type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() for weight in weights
    )


def find_tileable(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Returns the blocks of a model whose intermediates need not exist for the whole sequence.

    Args:
        model: any model, on any device, sharded or not.

    Returns:
        By name, the blocks that `tile_mlp` takes; and, by name, why other blocks that look like
        one can't be tiled.
    """
    tileable: dict[str, nn.Module] = {}
    refused: dict[str, str] = {}
    plans: dict[Any, str] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{other}.") for other in tileable) or not _is_candidate(module):
            continue
        # Equal blocks, of which a model has one in each layer, are probed once.
        shapes = [(key, tuple(value.shape)) for key, value in module.named_parameters()]
        key = (type(module), _signature(module), tuple(shapes))
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
        return f"{name} computes {inner} inside of a forward that takes more than rows of features"
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
        The installation; its `close()` restores the blocks.

    Raises:
        ConfigError: `tile_bytes` is not positive.
        UnsupportedModelError: no block of the model can be tiled; the message says why for each.
    """
    tileable, refused = tileable_mlps(model)
    installed = InstalledTiles(refused)
    for module in tileable.values():
        _tile(installed, module, tile_bytes)
    return installed


def tileable_mlps(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Returns what `find_tileable` does, of a model that has a block to tile.

    Raises:
        UnsupportedModelError: there is none; the message says why for each.
    """
    tileable, refused = find_tileable(model)
    if not tileable:
        reasons = [f"{name}: {reason}" for name, reason in refused.items()]
        raise UnsupportedModelError(
            f"{type(model).__name__} has no feed-forward block to tile. "
            f"{'; '.join(reasons) or 'no block looks like one'}"
        )
    return tileable, refused
