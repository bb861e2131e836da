"""Adapters of PEFT: which of them a sharded sequence can have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ulysses_accel.introspection.findings import Finding


def check_adapters(model: nn.Module) -> Iterator[Finding]:
    """Yields adapters that put virtual tokens before a batch: every rank would put them before its
    shard.

    Args:
        model: any model, possibly with adapters.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    kinds = []
    for config in configs.values():
        if getattr(config, "is_prompt_learning", False):
            kinds.append(str(getattr(config.peft_type, "value", config.peft_type)))
    if kinds:
        yield Finding(
            "adapters",
            "forward",
            f"{type(model).__name__} has an adapter of the kind {', '.join(kinds)}, which puts "
            "virtual tokens before its input: each rank would put them before its own shard of the "
            "sequence.",
            "Use LoRA, or sp_size=1 and cp_size=1.",
        )
