"""Activation checkpointing of a transformers model's layers, with their inputs offloaded to the
host.

Of every n-th layer the input is saved, on the device or in a slab of host memory of exactly the
right size, from which it is fetched one layer ahead. The layers' checkpoint function is set through
the attributes that transformers' own checkpointing uses, so that module hooks (FSDP2's,
DeepSpeed's) run outside of it.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ulysses_accel import _private_api
from ulysses_accel.attention.saved_results import Part
from ulysses_accel.errors import ConfigError, UnsupportedModelError
from ulysses_accel.installation import Installation
from ulysses_accel.memory.checkpoint.host_slab import HostSlab, Mover, mover_for
from ulysses_accel.memory.checkpoint.record import FromLayer, LayerRecord, is_running_again
from ulysses_accel.memory.checkpoint.saved_results import SavedResults
from ulysses_accel.memory.checkpoint.storage import OnDevice, OnHost, Source
from ulysses_accel.memory.skip_output import skip_unneeded_outputs


@dataclass
class _PreviousRun:
    """The last layer run so far in a forward pass.

    Args:
        record: of the run.
        index: of the layer.
        output: reference to the tensor that goes to the next layer.
        path: index of that tensor in the layer's output; None for the output itself.
    """

    record: weakref.ref[LayerRecord]
    index: int
    output: Callable[[], Tensor | None]
    path: int | str | None


@dataclass(frozen=True)
class CheckpointOptions:
    """What is saved of a forward pass, and where.

    Args:
        every_n_layers: how many layers share one saved input. The inputs in between are computed
            again, which costs (n - 1) / n of a forward pass and saves 1 / n of the memory.
        offload: whether inputs are offloaded to the host, in a slab of exactly their size, pinned
            where the model is on a GPU.
        keep_last: how many of the last saved inputs stay on the device, because backward needs them
            at once.
        skip_outputs: whether a recompute skips the matrix products that only the output of a tiled
            block needs, for layers where the first recompute proves that nothing reads it.
        save_attention: whether attention's output and log-sum-exp are saved, so that attention is
            never computed twice: `no`, on the `device` or on the `host`.
        save_exchange: with `save_attention`, whether the outputs of exchanges are saved too, so
            that no exchange is repeated.
        save_attention_bytes: bytes that `save_attention` may use on a rank, in whole layers from
            the last one backwards; all layers when None.
        max_inflight: copies to the host that may be unfinished before the computation waits.

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
        """What is saved besides inputs."""
        if self.save_attention == "no":
            return frozenset()
        if self.save_exchange:
            return frozenset(("attention", "exchange"))
        return frozenset(("attention",))


class CheckpointedLayers:
    """The activation checkpoints of one model; `close` restores the model.

    Layers are held weakly: they hold this object as their checkpoint function, and a strong
    reference back would keep their memory, and the slabs, until the garbage collector runs.

    Args:
        model: holds the layers.
        layers: in the order of the model.
        options: what is saved, and where.
    """

    def __init__(
        self, model: nn.Module, layers: list[nn.Module], options: CheckpointOptions
    ) -> None:
        self.options = options
        self.num_recomputed = 0
        self._attention_bytes = _attention_bytes(model, options)
        self._is_pinned = next(model.parameters()).is_cuda
        self._set_layers(layers)
        self._previous: _PreviousRun | None = None
        self._movers: dict[torch.device, Mover] = {}
        self._may_skip: dict[int, bool] = {}
        self._functions, self._changes = Installation(), Installation()

    def _set_layers(self, layers: list[nn.Module]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        self._index = {id(layer): index for index, layer in enumerate(layers)}
        num_kept = max(-(-len(layers) // self.options.every_n_layers) - self.options.keep_last, 1)
        self.slab = HostSlab(num_kept, self._is_pinned)
        self.attention_slab = HostSlab(len(layers), self._is_pinned)

    def install(self, model: nn.Module) -> None:
        """Sets the layers' checkpoint function, and checks it before each forward."""
        self._changes.callback(self._functions.close)
        self._set_functions()
        self._changes.hooks([model.register_forward_pre_hook(self._start_forward)])

    def close(self) -> None:
        """Restores the layers' own checkpointing, whatever it was, and frees the host memory."""
        self._changes.close()
        self.slab.clear()
        self.attention_slab.clear()
        self._movers.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> CheckpointedLayers:
        # For the copied layers, with host memory of its own.
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin._set_layers([copy.deepcopy(layer, memo) for layer in self.layers])
        twin._previous, twin._movers, twin._may_skip = None, {}, {}
        twin._functions, twin._changes = Installation(), Installation()
        return twin

    @property
    def layers(self) -> list[nn.Module]:
        """The layers, in the order of the model."""
        layers = [reference() for reference in self._layers]
        return [layer for layer in layers if layer is not None]

    def _attributes(self) -> dict[str, Any]:
        # Read by GradientCheckpointingLayer.__call__ of transformers 5.
        return {"gradient_checkpointing": True, _private_api.CHECKPOINT_FUNCTION: self.run}

    def _set_functions(self) -> None:
        self._functions.close()
        for layer in self.layers:
            for name, value in self._attributes().items():
                self._functions.set(layer, name, value)

    def _start_forward(self, *_: Any) -> None:
        expected = self._attributes().items()
        # transformers' gradient_checkpointing_enable may have set other functions since.
        if not all(expected <= vars(layer).items() for layer in self.layers):
            self._set_functions()
        self._previous = None

    def run(self, function: partial[Any], *args: Any) -> Any:
        """Runs a layer's forward and saves only its input; called instead of
        `torch.utils.checkpoint.checkpoint`.

        Args:
            function: the layer's forward, with the layer as first argument, and keyword arguments.
            args: positional arguments.

        Returns:
            The layer's output.
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
            self._previous.record if self._previous is not None else None,
            self._saved_results(hidden, index),
        )
        with record.without_saving():
            output = function(*args)
        tensor, path = _first_tensor(output)
        if tensor is not None:
            self._previous = _PreviousRun(weakref.ref(record), index, weakref.ref(tensor), path)
        return output

    def _source(self, hidden: Tensor, index: int) -> Source:
        previous, every = self._previous, self.options.every_n_layers
        if index % every and previous is not None and previous.index == index - 1:
            record = previous.record()
            # Only where nothing was computed between the two layers.
            if record is not None and previous.output() is hidden:
                return FromLayer(record, previous.path)
        num_kept = -(-len(self._layers) // every)
        if not self.options.offload or index // every >= num_kept - self.options.keep_last:
            return OnDevice(hidden)
        return OnHost(hidden, self.slab, self._mover(hidden.device))

    def _saved_results(self, hidden: Tensor, index: int) -> SavedResults | None:
        options, num_layers = self.options, len(self._layers)
        if options.save_attention_bytes is not None:
            # From the shard's size, which all ranks share: all must repeat the same collectives.
            layer_bytes = hidden.numel() // hidden.shape[-1] * self._attention_bytes
            num_layers = min(num_layers, options.save_attention_bytes // layer_bytes)
        if not options.parts or index < len(self._layers) - num_layers:
            return None
        if options.save_attention == "device":
            return SavedResults(options.parts, OnDevice)
        return SavedResults(
            options.parts,
            lambda result: OnHost(result, self.attention_slab, self._mover(result.device)),
        )

    def _mover(self, device: torch.device) -> Mover:
        if device not in self._movers:
            self._movers[device] = mover_for(device, self.options.max_inflight)
        return self._movers[device]

    def _recompute(self, record: LayerRecord) -> None:
        """Runs a layer again, while the previous layer's input is copied to the device."""
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


def checkpoint_layers(
    model: nn.Module, options: CheckpointOptions | None = None, **changes: Any
) -> CheckpointedLayers:
    """Makes a model's layers save only their inputs for the backward pass.

    Gradients equal the plain model's, dropout included; a layer must compute the same function when
    it runs again.

    Args:
        model: a transformers model, or a module that holds one; changed in place, reversibly.
        options: what is saved, and where; `CheckpointOptions()` when None.
        changes: fields of `CheckpointOptions` that differ from `options`.

    Returns:
        The installation; its `close()` restores the model.

    Raises:
        ConfigError: a number is not legal.
        UnsupportedModelError: the model has no layers that can be checkpointed.

    Source: gradient checkpointing (arXiv 1604.06174); ALST (arXiv 2506.13996).
    """
    options = replace(options or CheckpointOptions(), **changes)
    engine = CheckpointedLayers(model, find_layers(model), options)
    engine.install(model)
    return engine


def _attention_bytes(model: nn.Module, options: CheckpointOptions) -> int:
    """Returns the bytes that attention of one layer saves of a token: its output, log-sum-exp, and
    the outputs of exchanges.
    """
    text = None
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "get_text_config"):
            text = config.get_text_config()
            break
    heads = int(getattr(text, "num_attention_heads", None) or 1)
    size = int(getattr(text, "head_dim", None) or getattr(text, "hidden_size", heads) // heads)
    groups = int(getattr(text, "num_key_value_heads", None) or heads)
    element = next(model.parameters()).element_size()
    # The output after head_to_seq, and query, key and value after seq_to_head.
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
            "which checkpointing is installed into. Use a model of transformers 5, or its own "
            "gradient_checkpointing_enable."
        )
    return layers


def _find_input(function: partial[Any], args: tuple[Any, ...]) -> tuple[int | str, Tensor | None]:
    """Returns the index or keyword of a layer's input, and the input; None where there is no such
    tensor.
    """
    if isinstance(function.keywords.get("hidden_states"), Tensor):
        return "hidden_states", function.keywords["hidden_states"]
    return 0, args[0] if args and isinstance(args[0], Tensor) else None


def _first_tensor(output: Any) -> tuple[Tensor | None, int | str | None]:
    """Returns the tensor of a layer's output that goes to the next layer, and its index."""
    if isinstance(output, Tensor):
        return output, None
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return output[0], 0
    return None, None


def _outputs_are_unneeded(record: LayerRecord) -> bool:
    """Returns whether a layer's saved tensors stay the same to the bit when the outputs that tiled
    blocks can skip are NaN.

    Saved tensors are compared by checksum, so that two recomputes are never held at once.
    """

    def checksums(inside: Callable[[], AbstractContextManager[None]]) -> list[int]:
        sums: list[Tensor] = []

        def keep(tensor: Tensor) -> None:
            sums.append(_checksum(tensor.detach()))

        record.recompute(keep, inside)
        return torch.stack(sums).tolist() if sums else []

    with_nan = checksums(partial(skip_unneeded_outputs, probe=True))
    return with_nan == checksums(nullcontext)


def _checksum(tensor: Tensor) -> Tensor:
    """Returns the sum of a tensor's elements, their bits read as integers."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(whole).sum(dtype=torch.int64)
