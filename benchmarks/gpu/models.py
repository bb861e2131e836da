"""Llamas of 8B width on one GPU, with what holds less switched on: ours and the peers'."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.scale import Scale
from benchmarks.memory.models import FEATURES, Installed
from ulysses_accel.attention.huggingface.registry import (
    InstalledAttention,
    describe_forward,
    install,
)
from ulysses_accel.attention.strategy import SequenceAttention
from ulysses_accel.memory.tiled_loss.model import tile_loss
from ulysses_accel.sequence.description import SequenceDescription

OUR_ATTENTION, OUR_LOSS, LIGER = "our attention", "our loss", "liger"
_DEVICE = ("our checkpoint", "our TiledMLP", "our norms", OUR_LOSS, OUR_ATTENTION)
_ALL = ("our offload", *_DEVICE[1:])

FEATURE_SETS: dict[str, tuple[str, ...]] = {
    "transformers device": ("checkpoint",),
    "transformers offload": ("offload",),
    "Liger, offload": (LIGER, "offload"),
    "DeepSpeed TiledMLP, our loss": ("offload", "DeepSpeed TiledMLP", OUR_LOSS),
    "our loss": ("checkpoint", OUR_LOSS),
    "our loss, TiledMLP": ("our checkpoint", OUR_LOSS, "our TiledMLP"),
    "our loss, TiledMLP, offload": ("our offload", OUR_LOSS, "our TiledMLP"),
    "ours device": _DEVICE,
    "ours all": _ALL,
}
# Whose longest sequence is looked for beside ours.
PEERS = (
    "transformers device",
    "transformers offload",
    "Liger, offload",
    "DeepSpeed TiledMLP, our loss",
)


class Training:
    """A model with features, and its steps without an optimizer.

    Args:
        scale: sizes.
        layers: number of them.
        tokens: the most that a step has.
        features: names in `memory.models.FEATURES`, or the ones of this module.
        head: whether there is a loss over the vocabulary; otherwise the hidden states are summed
            up.
    """

    def __init__(
        self,
        scale: Scale,
        *,
        layers: int,
        tokens: int,
        features: tuple[str, ...],
        head: bool = True,
    ) -> None:
        from transformers import LlamaForCausalLM, LlamaModel

        torch.manual_seed(0)
        self.scale, self.has_head = scale, head
        self.has_attention = OUR_ATTENTION in features
        self.attention: InstalledAttention | None = None
        if LIGER in features:
            _apply_liger()
        with torch.device(scale.device):
            config = scale.config(layers, tokens)
            self.model: Any = (
                (LlamaForCausalLM if head else LlamaModel)(config).to(scale.dtype).train()
            )
        self.installed = Installed([], [])
        for name in features:
            if name == OUR_LOSS:
                if head:
                    tile_loss(self.model, tile_tokens=scale.loss_tile)
            elif name == OUR_ATTENTION:
                self.attention = install(self.model, SequenceAttention(None))
            elif name != LIGER:
                FEATURES[name](self.model, self.installed)

    def close(self) -> None:
        """Takes our attention out of transformers' registry."""
        if self.attention is not None:
            self.attention.close()

    @property
    def host_bytes(self) -> int:
        """Pinned bytes that our offload holds; 0 where there is none."""
        return sum(engine.slab.num_bytes for engine in self.installed.engines)

    def step(self, tokens: int) -> tuple[float, float]:
        """Forward and backward on one sequence; returns the loss and the gradient's norm."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(self.scale.vocabulary, (1, tokens), generator=generator).to(
            self.scale.device
        )
        self.model.zero_grad(set_to_none=True)
        description = SequenceDescription(tokens, 1, (((0, tokens),),))
        with describe_forward(description) if self.has_attention else nullcontext():
            loss = self._loss(ids)
            loss.backward()
        norms = [
            p.grad.norm(dtype=torch.float32) for p in self.model.parameters() if p.grad is not None
        ]
        return float(loss.detach()), float(torch.stack(norms).norm())

    def _loss(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        if self.has_head:
            loss: Tensor = self.model(input_ids=ids, labels=ids, position_ids=positions).loss
            return loss
        hidden: Tensor = self.model(input_ids=ids, position_ids=positions).last_hidden_state
        return hidden.mean(dtype=torch.float32)


def _apply_liger() -> None:
    """Liger replaces methods of transformers' classes, which is why each case has a process of its
    own.
    """
    from liger_kernel.transformers import apply_liger_kernel_to_llama  # type: ignore[import-not-found]

    apply_liger_kernel_to_llama()
