"""Installs everything that a `MemoryConfig` requests into one model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from ulysses_accel.attention import SequenceAttention, install
from ulysses_accel.config.memory import MemoryConfig
from ulysses_accel.installation import Installation
from ulysses_accel.memory.checkpoint.layers import CheckpointOptions, checkpoint_layers, find_layers
from ulysses_accel.memory.tiled_loss.model import check_tiled_loss, tile_loss
from ulysses_accel.memory.tiling.mlp import tile_mlps, tileable_mlps
from ulysses_accel.memory.tiling.norm import tile_norms


class Closable(Protocol):
    """What a technique installed."""

    def close(self) -> None:
        """Restores the model."""


class InstalledMemory(Installation):
    """What was installed into one model; `close` restores it.

    Args:
        parts: what each technique installed, in order.
        left_alone: by module name, why a block or norm is not tiled.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[Any] = []
        self.left_alone: dict[str, str] = {}

    def add(self, part: Closable) -> None:
        """Takes over what a technique installed."""
        self.parts.append(part)
        self.callback(part.close)


def apply_memory(
    model: nn.Module, config: MemoryConfig, *, shares_sequence: bool = False
) -> InstalledMemory:
    """Makes a model train in less memory, with the same loss and gradients; alone or before
    `Accelerator.prepare`.

    Args:
        model: a transformers model, or a module that holds one; changed in place, reversibly.
        config: what to install.
        shares_sequence: whether an accelerator installs sequence parallel attention into the
            model.

    Returns:
        The installation; its `close()` restores the model.

    Raises:
        UnsupportedModelError: the model has no part that a requested feature works on.
    """
    installed = InstalledMemory()
    try:
        _install(model, config, installed)
        if config.save_attention != "no" and not shares_sequence:
            # The kernels that transformers calls return no log-sum-exp that could be saved.
            installed.callback(install(model, SequenceAttention(None)).close)
    except Exception:
        installed.close()
        raise
    if installed.left_alone:
        reasons = [f"{name}: {reason}" for name, reason in installed.left_alone.items()]
        warnings.warn(
            f"{len(reasons)} parts stay as they are: {'; '.join(reasons[:4])}", stacklevel=2
        )
    return installed


def _install(model: nn.Module, config: MemoryConfig, installed: InstalledMemory) -> None:
    if config.tiled_mlp:
        blocks = tile_mlps(model, tile_bytes=config.tiled_mlp_bytes)
        installed.add(blocks)
        installed.left_alone |= blocks.left_alone
    if config.tiled_norm:
        norms, left_alone = tile_norms(model)
        installed.add(norms)
        installed.left_alone |= left_alone
    if config.tiled_loss:
        loss = tile_loss(
            model, tile_tokens=config.tiled_loss_tokens, use_liger=config.use_liger_loss
        )
        installed.add(loss)
    if config.checkpoint:
        installed.add(checkpoint_layers(model, checkpoint_options(config)))


def check_memory(model: nn.Module, config: MemoryConfig) -> list[Callable[[], object]]:
    """Returns the checks that `apply_memory` makes of a model; each raises what it would raise.

    Args:
        model: a transformers model, or a module that holds one; nothing of it is changed.
        config: what would be installed.
    """
    checks: list[Callable[[], object]] = []
    if config.tiled_mlp:
        checks.append(lambda: tileable_mlps(model))
    if config.tiled_loss:
        checks.append(lambda: check_tiled_loss(model, use_liger=bool(config.use_liger_loss)))
    if config.checkpoint:
        checks.append(lambda: find_layers(model))
    return checks


def checkpoint_options(config: MemoryConfig) -> CheckpointOptions:
    """Returns the options of activation checkpointing in a config."""
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
