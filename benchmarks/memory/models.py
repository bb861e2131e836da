"""Small Llamas whose layers hold less, in every way that is compared: what is switched on, by
name.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from benchmarks.memory.blocks import LOSS_TILE, tiled_by_deepspeed
from ulysses_accel.memory import AllocationTracker
from ulysses_accel.memory.checkpoint.layers import checkpoint_layers, find_layers
from ulysses_accel.memory.tiled_loss.model import tile_loss
from ulysses_accel.memory.tiling.mlp import tile_mlps
from ulysses_accel.memory.tiling.norm import tile_norms


def llama_config(
    hidden: int, layers: int, heads: int, key_heads: int, vocabulary: int, tokens: int
) -> Any:
    """A Llama with an MLP 3.5 times as wide as its hidden states, as in Llama 3 8B."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        max_position_embeddings=tokens,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    return config


@dataclass
class Installed:
    """What a model was given.

    Args:
        engines: our checkpointing, whose slab is host memory.
        host: where transformers' offload reports its copies while it is counted.
    """

    engines: list[Any]
    host: list[AllocationTracker]


Feature = Callable[[nn.Module, Installed], Any]


def _checkpoint(model: Any, _: Installed) -> None:
    # Older releases have the second name only.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def _offload(model: Any, installed: Installed) -> None:
    """What `offload=True` of transformers does; on a CPU its copies stay on the device that is
    counted, so they are reported."""
    _checkpoint(model, installed)

    def run(function: Callable[..., Any], *args: Any) -> Any:
        with _ReportedCopies(installed.host):
            return checkpoint(function, *args, use_reentrant=False)

    for layer in find_layers(model):
        layer._gradient_checkpointing_func = run  # type: ignore[assignment]


class _ReportedCopies(save_on_cpu):
    """Says which tensors are on the host."""

    def __init__(self, host: list[AllocationTracker]) -> None:
        super().__init__(pin_memory=True)
        pack = self.pack_hook

        def reporting(tensor: Tensor) -> Any:
            packed = pack(tensor)
            for tracker in host:
                tracker.exclude(packed[1])
            return packed

        self.pack_hook = reporting


def _deepspeed_mlps(model: nn.Module, _: Installed) -> None:
    for layer in find_layers(model):
        mlp = layer.get_submodule("mlp")
        mlp.forward = tiled_by_deepspeed(mlp)


def _our_checkpoint(model: nn.Module, installed: Installed, offload: bool = False) -> None:
    installed.engines.append(checkpoint_layers(model, offload=offload))


FEATURES: Mapping[str, Feature] = {
    "checkpoint": _checkpoint,
    "offload": _offload,
    "DeepSpeed TiledMLP": _deepspeed_mlps,
    "our checkpoint": _our_checkpoint,
    "our offload": partial(_our_checkpoint, offload=True),
    "our TiledMLP": lambda model, _: tile_mlps(model),
    "our norms": lambda model, _: tile_norms(model),
    "our loss": lambda model, _: tile_loss(model, tile_tokens=LOSS_TILE),
}


def install(model: nn.Module, names: tuple[str, ...]) -> Installed:
    """Switches features on, in this order."""
    installed = Installed([], [])
    for name in names:
        FEATURES[name](model, installed)
    return installed


@contextmanager
def on_host(installed: Installed, tracker: AllocationTracker) -> Iterator[None]:
    """Takes transformers' host copies out of the count; our slab is from before, so it never was in
    it.
    """
    installed.host.append(tracker)
    try:
        yield
    finally:
        installed.host.remove(tracker)


def has_deepspeed() -> bool:
    """Whether the peer is installed."""
    return importlib.util.find_spec("deepspeed") is not None
