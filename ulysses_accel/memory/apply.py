"""Puts everything that a `MemoryConfig` asks for into one model, and takes it out again."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ulysses_accel.attention import SequenceAttention, install
from ulysses_accel.config.memory import MemoryConfig
from ulysses_accel.memory.checkpoint.layers import CheckpointOptions, checkpoint_layers
from ulysses_accel.memory.tiled_loss.model import tile_loss
from ulysses_accel.memory.tiling.mlp import find_tileable, tile_mlps
from ulysses_accel.memory.tiling.norm import tile_norms


@dataclass
class InstalledMemory:
    """What was put into one model.

    Args:
        parts: the installations, in their order.
        left_alone: by module name, why a block or norm is not tiled.
    """

    parts: list[Any] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)

    def close(self) -> None:
        """Restores the model."""
        for part in reversed(self.parts):
            part.uninstall()
        self.parts.clear()


def apply_memory(
    model: nn.Module, config: MemoryConfig, *, shares_sequence: bool = False
) -> InstalledMemory:
    """Makes a model train in less memory, with the same loss and gradients; alone or before
    `Accelerator.prepare`.

    Args:
        model: a transformers model, or a module that holds one; changed in place, reversibly.
        config: what to install.
        shares_sequence: whether the model's attention is installed by an accelerator that shares
            sequences.

    Returns:
        The installation; its `close()` restores the model.

    Raises:
        UnsupportedModelError: the model has no part that a wanted feature works on.
    """
    installed = InstalledMemory()
    try:
        _install(model, config, installed)
        if config.save_attention != "no" and not shares_sequence:
            # transformers' own kernels give no log-sum-exp that could be kept.
            installed.parts.append(install(model, SequenceAttention(None)))
    except Exception:
        installed.close()
        raise
    if installed.left_alone:
        listed = "; ".join(
            f"{name}: {reason}" for name, reason in list(installed.left_alone.items())[:4]
        )
        warnings.warn(f"{len(installed.left_alone)} parts stay as they are: {listed}", stacklevel=2)
    return installed


def _install(model: nn.Module, config: MemoryConfig, installed: InstalledMemory) -> None:
    if config.tiled_mlp:
        installed.left_alone |= find_tileable(model)[1]
        installed.parts.append(tile_mlps(model, tile_bytes=config.tiled_mlp_bytes))
    if config.tiled_norm:
        norms, left_alone = tile_norms(model)
        installed.parts.append(norms)
        installed.left_alone |= left_alone
    if config.tiled_loss:
        loss = tile_loss(
            model, tile_tokens=config.tiled_loss_tokens, use_liger=config.use_liger_loss
        )
        installed.parts.append(loss)
    if config.checkpoint:
        installed.parts.append(checkpoint_layers(model, checkpoint_options(config)))


def checkpoint_options(config: MemoryConfig) -> CheckpointOptions:
    """Returns a config's part about checkpointing."""
    return CheckpointOptions(
        every_n_layers=config.checkpoint_every_n_layers,
        offload=config.checkpoint_offload,
        keep_last=config.checkpoint_keep_last,
        # Only tiled blocks have an output to leave out.
        skip_outputs=config.tiled_mlp,
        save_attention=config.save_attention,
        save_exchange=config.save_exchange,
        save_attention_bytes=config.save_attention_bytes,
    )
