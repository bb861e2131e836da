"""Adapters of PEFT: which of them a sharded sequence can have."""

from __future__ import annotations

from typing import Any

from torch import nn

from ulysses_accel.errors import UnsupportedModelError


def refuse_virtual_tokens(model: nn.Module) -> None:
    """Refuses adapters that put tokens of their own before a batch: every rank would put them
    before its shard.

    Args:
        model: any model, possibly with adapters.

    Raises:
        UnsupportedModelError: with the adapters' kinds.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    kinds = [
        config.peft_type
        for config in configs.values()
        if getattr(config, "is_prompt_learning", False)
    ]
    if kinds:
        names = ", ".join(str(getattr(kind, "value", kind)) for kind in kinds)
        raise UnsupportedModelError(
            f"{type(model).__name__} has an adapter of the kind {names}, which puts virtual tokens "
            "before its input: "
            "each rank would put them before its own shard of the sequence. Use LoRA, or "
            "sp_size=1 and cp_size=1."
        )
