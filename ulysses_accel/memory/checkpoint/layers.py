"""Activation checkpointing of a transformers model's layers, with their inputs put away on the
host.

A layer keeps nothing but its input, of which every n-th stays or leaves for a slab of host memory
of exactly the right size; it comes back one layer ahead. Layers are driven through the attributes
that transformers' own checkpointing uses, so module hooks (FSDP2's, DeepSpeed's) stay outside, and
`uninstall` leaves the model as it was.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ulysses_accel import _private_api
from ulysses_accel.attention.saved_results import Part
from ulysses_accel.errors import ConfigError, UnsupportedModelError
from ulysses_accel.memory.checkpoint.host_slab import HostSlab, Mover, mover_for
from ulysses_accel.memory.checkpoint.record import FromLayer, LayerRecord, is_running_again
from ulysses_accel.memory.checkpoint.saved_results import Keeper
from ulysses_accel.memory.checkpoint.storage import OnDevice, OnHost, Source
from ulysses_accel.memory.skip_output import skip_unneeded_outputs

_ATTRIBUTES = ("gradient_checkpointing", _private_api.CHECKPOINT_FUNCTION)


@dataclass
class _Before:
    """The layer run that came last in a forward pass."""

    record: weakref.ref[LayerRecord]
    index: int
    output: Callable[[], Tensor | None]
    path: int | str | None


@dataclass(frozen=True)
class CheckpointOptions:
    """What is kept of a forward pass, and where.

    Args:
        every_n_layers: how many layers share one kept input. The inputs in between are computed
            again, which costs (n - 1) / n of a forward pass and keeps 1 / n of the memory.
        offload: put the inputs away on the host, in a slab of exactly their size, pinned where the
            model is on a GPU.
        keep_last: how many of the last kept inputs stay on the device: they are wanted at once.
        skip_outputs: leave out, in a recompute, the products that make only the output of a tiled
            block, for layers where the first recompute proves that nobody reads it.
        save_attention: keep attention's output and log-sum-exp, so that attention is never computed
            twice: `no`, on the `device` or on the `host`.
        save_exchange: with `save_attention`, keep too what the exchanges delivered, so that none is
            repeated.
        save_attention_bytes: how much `save_attention` may take on a rank, in whole layers from the
            last one on; all layers when None.
        max_inflight: copies to the host that may be under way before the computation waits.

    Raises:
        ConfigError: a value is not legal.
    """

    every_n_layers: int = 1
    offload: bool = False
    keep_last: int = 1
    skip_outputs: bool = True
    save_attention: Literal["no", "device", "host"] = "no"
    save_exchange: bool = False
    save_attention_bytes: int | None = None
    max_inflight: int = 2

    def __post_init__(self) -> None:
        for name, least in (("every_n_layers", 1), ("keep_last", 0), ("max_inflight", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"{name}={getattr(self, name)} is not legal. Use {least} or more."
                )
        if self.save_attention not in ("no", "device", "host"):
            raise ConfigError(
                f"save_attention={self.save_attention!r} is not known. Use 'no', 'device' or "
                "'host'."
            )

    @property
    def parts(self) -> frozenset[Part]:
        """What is kept besides inputs."""
        if self.save_attention == "no":
            return frozenset()
        return (
            frozenset(("attention", "exchange"))
            if self.save_exchange
            else frozenset(("attention",))
        )


@dataclass
class CheckpointedLayers:
    """One model's checkpointing, and the way to take it off.

    Args:
        layers: in the order of the model.
        options: what is kept, and where.
        slab: the host memory of inputs.
        attention_slab: the host memory of attention's results.
        attention_bytes: of one token's results in one layer.
        num_recomputed: layer runs that were computed again so far.
    """

    layers: list[nn.Module]
    options: CheckpointOptions
    slab: HostSlab
    attention_slab: HostSlab
    attention_bytes: int
    num_recomputed: int = 0
    _index: dict[int, int] = field(default_factory=dict)
    _before: _Before | None = None
    _movers: dict[torch.device, Mover] = field(default_factory=dict)
    _may_skip: dict[int, bool] = field(default_factory=dict)
    _originals: list[tuple[nn.Module, dict[str, Any]]] = field(default_factory=list)
    _hook: Any = None

    def run(self, function: partial[Any], *args: Any) -> Any:
        """Stands in for torch's checkpoint function: runs a layer's forward and keeps its input
        alone.
        """
        position, hidden = _find_input(function, args)
        if not torch.is_grad_enabled() or is_running_again() or hidden is None:
            return function(*args)
        layer = function.args[0]
        index = self._index[id(layer)]
        record = LayerRecord(
            function,
            position,
            hidden,
            args,
            self._source(hidden, index),
            layer,
            self._recompute,
            self._before.record if self._before is not None else None,
            self._keeper(hidden, index),
        )
        with record.leaving_out():
            output = function(*args)
        tensor, path = _first_tensor(output)
        if tensor is not None:
            self._before = _Before(weakref.ref(record), index, weakref.ref(tensor), path)
        return output

    def _source(self, hidden: Tensor, index: int) -> Source:
        before, every = self._before, self.options.every_n_layers
        follows = before is not None and before.index == index - 1 and before.output() is hidden
        record = before.record() if before is not None else None
        if index % every and follows and record is not None:
            return FromLayer(record, before.path if before is not None else None)
        num_kept = -(-len(self.layers) // every)
        if not self.options.offload or index // every >= num_kept - self.options.keep_last:
            return OnDevice(hidden)
        return OnHost(hidden, self.slab, self._mover(hidden.device))

    def _keeper(self, hidden: Tensor, index: int) -> Keeper | None:
        options, num_layers = self.options, len(self.layers)
        if options.save_attention_bytes is not None:
            # From the shard's size alone, which is every rank's: all must repeat the same
            # collectives.
            each = hidden.numel() // hidden.shape[-1] * self.attention_bytes
            num_layers = min(num_layers, options.save_attention_bytes // each)
        if not options.parts or index < len(self.layers) - num_layers:
            return None
        if options.save_attention == "device":
            return Keeper(options.parts, OnDevice)
        return Keeper(
            options.parts,
            lambda result: OnHost(result, self.attention_slab, self._mover(result.device)),
        )

    def _mover(self, device: torch.device) -> Mover:
        if device not in self._movers:
            self._movers[device] = mover_for(device, self.options.max_inflight)
        return self._movers[device]

    def _recompute(self, record: LayerRecord) -> None:
        """Runs a layer again, while what the layer before needs is on its way."""
        self.num_recomputed += 1
        previous = record.previous() if record.previous is not None else None
        record.fetch()
        if previous is not None:
            previous.fetch()
        layer = id(record.layer)
        if not self.options.skip_outputs:
            record.recompute()
            return
        if layer not in self._may_skip:
            self._may_skip[layer] = _outputs_are_unneeded(record)
        record.recompute(inside=skip_unneeded_outputs if self._may_skip[layer] else nullcontext)

    def reinstall(self, *_: Any) -> None:
        """Points the layers at this engine, also after `gradient_checkpointing_enable` pointed them
        elsewhere.
        """
        for layer in self.layers:
            layer.gradient_checkpointing = True  # type: ignore[assignment]
            setattr(layer, _private_api.CHECKPOINT_FUNCTION, self.run)
        self._before = None

    def uninstall(self) -> None:
        """Gives the layers their own checkpointing back, whatever it was, and frees the host
        memory.
        """
        for layer, attributes in self._originals:
            for name in _ATTRIBUTES:
                vars(layer).pop(name, None)
            vars(layer).update(attributes)
        self._hook.remove()
        self.slab.clear()
        self.attention_slab.clear()
        self._movers.clear()


def checkpoint_layers(
    model: nn.Module, options: CheckpointOptions | None = None, **changes: Any
) -> CheckpointedLayers:
    """Makes a model's layers keep only their inputs for the backward pass.

    Gradients are those of the plain model, dropout included; layers must be the same function the
    second time.

    Args:
        model: a transformers model, or a module that holds one; changed in place, reversibly.
        options: what is kept, and where; `CheckpointOptions()` when None.
        changes: fields of `CheckpointOptions` that differ from `options`.

    Returns:
        The installation; its `uninstall()` restores the model.

    Raises:
        ConfigError: a number is not legal.
        UnsupportedModelError: the model has no layers that can be checkpointed.

    Source: gradient checkpointing (arXiv 1604.06174); ALST (arXiv 2506.13996).
    """
    options = replace(options or CheckpointOptions(), **changes)
    layers = find_layers(model)
    is_pinned = next(model.parameters()).is_cuda
    num_kept = max(-(-len(layers) // options.every_n_layers) - options.keep_last, 1)
    slabs = HostSlab(num_kept, is_pinned), HostSlab(len(layers), is_pinned)
    engine = CheckpointedLayers(layers, options, *slabs, _attention_bytes(model, options))
    engine._index = {id(layer): index for index, layer in enumerate(layers)}
    engine._originals = [
        (layer, {name: vars(layer)[name] for name in _ATTRIBUTES if name in vars(layer)})
        for layer in layers
    ]
    engine._hook = model.register_forward_pre_hook(engine.reinstall)
    engine.reinstall()
    return engine


def _attention_bytes(model: nn.Module, options: CheckpointOptions) -> int:
    """Returns what attention of one layer keeps of a token: output, log-sum-exp, and what exchanges
    deliver.
    """
    configs = (getattr(module, "config", None) for module in model.modules())
    config = next((found for found in configs if hasattr(found, "get_text_config")), None)
    text = config.get_text_config() if config is not None else None
    heads = int(getattr(text, "num_attention_heads", None) or 1)
    size = int(getattr(text, "head_dim", None) or getattr(text, "hidden_size", heads) // heads)
    groups = int(getattr(text, "num_key_value_heads", None) or heads)
    element = next(model.parameters()).element_size()
    # The output once more in the order of tokens, and query, key and value in the order of heads.
    delivered = (2 * heads + 2 * groups) * size * element if options.save_exchange else 0
    return heads * size * element + 4 * heads + delivered


def find_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the layers that transformers can checkpoint, in order.

    Raises:
        UnsupportedModelError: there are none.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[nn.Module] = [
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no layers of transformers' GradientCheckpointingLayer, "
            "which checkpointing is "
            "installed into. Use a model of transformers 5, or its own "
            "gradient_checkpointing_enable."
        )
    return layers


def _find_input(function: partial[Any], args: tuple[Any, ...]) -> tuple[int | str, Tensor | None]:
    """Returns where a layer's input stands among its arguments, and the input; None where it has no
    tensor.
    """
    if isinstance(function.keywords.get("hidden_states"), Tensor):
        return "hidden_states", function.keywords["hidden_states"]
    return 0, args[0] if args and isinstance(args[0], Tensor) else None


def _first_tensor(output: Any) -> tuple[Tensor | None, int | str | None]:
    """Returns the tensor of a layer's output that goes to the next layer, and where it is."""
    if isinstance(output, Tensor):
        return output, None
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return output[0], 0
    return None, None


def _outputs_are_unneeded(record: LayerRecord) -> bool:
    """Returns whether a layer's saved tensors stay the same, to the bit, when unneeded outputs are
    NaN.

    Every saved tensor is compared by a checksum, so that two recomputes are never held at once.
    """

    def checksums(probe: bool) -> list[int]:
        found: list[Tensor] = []

        def keep(tensor: Tensor) -> None:
            found.append(_checksum(tensor.detach()))

        record.recompute(keep, partial(skip_unneeded_outputs, probe=True) if probe else nullcontext)
        return torch.stack(found).tolist() if found else []

    return checksums(probe=True) == checksums(probe=False)


def _checksum(tensor: Tensor) -> Tensor:
    """Returns the sum of a tensor's elements, read as whole numbers."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(whole).sum(dtype=torch.int64)
