"""Checks that every token's position is the one that it has in the whole sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ulysses_accel.attention.findings import Finding
from ulysses_accel.attention.positions import own_counts, position_sources
from ulysses_accel.attention.structure import sharded_parts, text_config

SCALED_BY_LENGTH = ("dynamic", "longrope")


def check_positions(model: Any) -> Iterator[Finding]:
    """Yields positions that can't be told to the model, or that it counts on its own tokens."""
    for source in position_sources(model):
        if not source.is_known:
            yield Finding(
                "positions",
                "forward",
                f"its forward takes no {source.key} and no part of it takes positions, so a shard would start at "
                f"position 0.",
                "Use a model that takes them.",
            )
    for count in own_counts(model):
        if not count.follows_cache:
            yield Finding(
                "positions",
                count.name,
                f"{count.name} ({type(count.module).__name__}) counts its tokens by itself ({count.expression}), of "
                f"which a shard has only a part.",
                "Use a model without it, or sp_size=1 and cp_size=1.",
            )
            break
    scaled = set(rope_types(text_config(model))) & set(SCALED_BY_LENGTH)
    if scaled and not rotary_modules(model):
        yield Finding(
            "positions",
            "config",
            f"its rotary positions are scaled by the longest position of the whole sequence (rope_type="
            f"{', '.join(sorted(scaled))}), in a way that a shard can't be told.",
            "Use a fixed scaling such as yarn or linear.",
        )


def rope_types(config: Any) -> set[str]:
    """Returns every rope type that a config names, whether it has one set of parameters or one for each layer type."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(entry.get("rope_type", entry.get("type"))) for entry in [parameters, *nested]}


def rotary_modules(model: Any) -> list[nn.Module]:
    """Returns the modules whose rotary angles follow from the longest position that they are given."""
    return [module for _, module in sharded_parts(model) if _follows_length(module)]


def _follows_length(module: nn.Module) -> bool:
    types = getattr(module, "rope_type", None)
    named = types.values() if isinstance(types, dict) else [types]
    return any(name == kind or "dynamic" in str(name) for name in named for kind in SCALED_BY_LENGTH)
