"""Finds out where a model takes the positions of its tokens from, so that a shard's are those of
the whole sequence.

Checks that every token's position is the one that it has in the whole sequence.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from ulysses_accel.introspection.findings import Finding
from ulysses_accel.introspection.source import (
    LiveForward,
    assignments,
    attention_calls,
    forward_of,
    is_name,
    live_forward,
    mentions,
    parameters,
    syntax_of,
    text_of,
)
from ulysses_accel.introspection.structure import ModelReading, is_model, once_per_reading

DECODER_POSITIONS = "decoder_position_ids"
POSITIONS = "position_ids"
SCALED_BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class PositionSource:
    """How one sequence's positions come into a model.

    Args:
        key: their name in the batch.
        is_argument: whether the model's forward takes them under that name.
        embeddings: otherwise the modules that take positions, or compute them, with their names.
    """

    key: str
    is_argument: bool
    embeddings: tuple[tuple[str, nn.Module], ...] = ()

    @property
    def is_known(self) -> bool:
        """Whether the positions have a way in."""
        return self.is_argument or bool(self.embeddings)


@once_per_reading
def position_sources(reading: ModelReading) -> tuple[PositionSource, ...]:
    """Returns how each sharded sequence's positions come into a model: the main one's first, then
    an encoder's.
    """
    if reading.encoder is None:
        return (_source(reading, POSITIONS, reading.sharded),)
    encoder: dict[str, nn.Module] = {}
    decoder: dict[str, nn.Module] = {}
    for name, module in reading.sharded.items():
        side = encoder if module in reading.encoder_modules else decoder
        side[name] = module
    main = _source(reading, DECODER_POSITIONS, decoder)
    if not reading.is_encoder_sharded:
        return (main,)
    return main, _source(reading, POSITIONS, encoder)


def _source(reading: ModelReading, key: str, side: Mapping[str, nn.Module]) -> PositionSource:
    if key in reading.parameters:
        return PositionSource(key, True)
    return PositionSource(key, False, _embeddings(side))


def _embeddings(side: Mapping[str, nn.Module]) -> tuple[tuple[str, nn.Module], ...]:
    """Returns the innermost modules that take positions, and those that compute them from the
    tokens that they are passed.
    """
    takes = {
        name: module
        for name, module in side.items()
        if POSITIONS in parameters(module) or makes_positions(module)
    }
    innermost = []
    for name, module in takes.items():
        is_outer = any(other.startswith(f"{name}.") for other in takes)
        if not is_outer and not is_model(module):
            innermost.append((name, module))
    return tuple(innermost)


def makes_positions(module: nn.Module) -> bool:
    """Returns whether a module looks up positions that it counts in `input_ids`, without taking
    any.
    """
    counts = callable(getattr(module, "create_position_ids_from_input_ids", None))
    return counts and POSITIONS not in parameters(module) and "input_ids" in parameters(module)


def padding_start(reading: ModelReading) -> int | None:
    """Returns the number after which a model's positions start, where it counts them from its
    padding token.
    """
    for module in reading.sharded.values():
        index = getattr(module, "padding_idx", None)
        if (
            isinstance(index, int)
            and _counts_tokens(module)
            and (makes_positions(module) or _looks_up(module))
        ):
            return index
    return None


def _looks_up(module: nn.Module) -> bool:
    """Whether a module has an embedding of positions; with rotary ones it computes those positions
    for nothing.
    """
    return any(
        isinstance(child, nn.Embedding) and "position" in name
        for name, child in module.named_children()
    )


def _counts_tokens(module: nn.Module) -> bool:
    """Whether a module's forward counts positions by the tokens that differ from its padding
    token.
    """
    forward = forward_of(module)
    return forward is not None and any(
        isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith("create_position_ids_from_input_ids")
        for node in ast.walk(forward)
    )


def counts_mask(reading: ModelReading) -> bool:
    """Returns whether a model counts positions by its attention mask, where it is passed none."""
    for name, module in reading.sharded.items():
        parent = reading.sharded.get(name.rpartition(".")[0])
        if _takes_mask(module) and not _counts_indices(parent):
            return True
    return any(map(_counts_text_by_mask, reading.modules.values()))


def _takes_mask(module: nn.Module) -> bool:
    """Whether an embedding of positions counts them by the mask that it is passed."""
    forward = forward_of(module)
    if (
        not isinstance(module, nn.Embedding)
        or forward is None
        or "attention_mask" not in parameters(module)
    ):
        return False
    return any(
        mentions(call, "attention_mask") for call in ast.walk(forward) if isinstance(call, ast.Call)
    )


def _counts_indices(module: nn.Module | None) -> bool:
    """Whether a module computes positions from indices in the row, so that its embedding is never
    without any.
    """
    forward = forward_of(module) if module is not None else None
    if module is None or forward is None:
        return False
    computed = [value for name, value in assignments(forward, module) if name == POSITIONS]
    return any("torch.arange" in ast.unparse(value) for value in computed)


def _counts_text_by_mask(module: nn.Module) -> bool:
    """Whether a model of text and images computes positions from its mask for text alone, too."""
    method = getattr(type(module), "compute_3d_position_ids", None)
    tree = syntax_of(method) if method is not None else None
    if tree is None:
        return False
    return any(
        name == "can_compute_mrope" and mentions(value, "attention_mask")
        for name, value in assignments(tree, module)
    )


@dataclass(frozen=True)
class OwnCount:
    """An attending module that counts its tokens by itself, as if they were all.

    Args:
        name: of the module.
        module: itself.
        expression: how it counts.
        follows_cache: whether it adds how many tokens a cache has seen, and so can be told where
            its own begin.
    """

    name: str
    module: nn.Module
    expression: str
    follows_cache: bool


@once_per_reading
def own_counts(reading: ModelReading) -> tuple[OwnCount, ...]:
    """Returns the attending modules of a model that count their tokens by themselves."""
    counting = []
    for name, module in reading.sharded.items():
        forward = live_forward(module) if attention_calls(module) else None
        counts = _counts(forward) if forward is not None else ()
        if forward is None or not counts:
            continue
        added = [
            node.left
            for node in forward.nodes
            if isinstance(node, ast.BinOp) and is_name(node.right, "past_seen_tokens")
        ]
        is_one = len(counts) == 1 and counts[0] in added
        follows_cache = is_one and "past_key_values" in parameters(module)
        counting.append(OwnCount(name, module, text_of(counts[0]), follows_cache))
    return tuple(counting)


@cache
def _counts(forward: LiveForward) -> tuple[ast.Call, ...]:
    """Returns where a forward counts tokens."""
    calls = (node for node in forward.nodes if isinstance(node, ast.Call))
    return tuple(call for call in calls if ast.unparse(call.func) == "torch.arange")


def check_positions(reading: ModelReading) -> Iterator[Finding]:
    """Yields positions that can't be passed to the model, or that it counts on a shard."""
    for source in position_sources(reading):
        if not source.is_known:
            yield Finding(
                "positions",
                "forward",
                f"its forward takes no {source.key} and no part of it takes positions, so a shard "
                "would start at "
                f"position 0.",
                "Use a model that takes them.",
            )
    for count in own_counts(reading):
        if not count.follows_cache:
            yield Finding(
                "positions",
                count.name,
                f"{count.name} ({type(count.module).__name__}) counts its tokens by itself "
                f"({count.expression}), of "
                f"which a shard has only a part.",
                "Use a model without it, or sp_size=1 and cp_size=1.",
            )
            break
    scaled = set(rope_types(reading.text_config)) & set(SCALED_BY_LENGTH)
    if scaled and not rotary_modules(reading):
        yield Finding(
            "positions",
            "config",
            "its rotary positions are scaled by the longest position of the whole sequence "
            "(rope_type="
            f"{', '.join(sorted(scaled))}), in a way that a shard can't be told.",
            "Use a fixed scaling such as yarn or linear.",
        )


def rope_types(config: Any) -> set[str]:
    """Returns every rope type that a config names, whether it has one set of parameters or one for
    each layer type.
    """
    parameters = (
        getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    )
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(entry.get("rope_type", entry.get("type"))) for entry in [parameters, *nested]}


@once_per_reading
def rotary_modules(reading: ModelReading) -> tuple[nn.Module, ...]:
    """Returns the modules whose rotary angles follow from the longest position that they are
    passed.
    """
    return tuple(module for module in reading.sharded.values() if _follows_length(module))


def _follows_length(module: nn.Module) -> bool:
    types = getattr(module, "rope_type", None)
    named = types.values() if isinstance(types, dict) else [types]
    return any(name in SCALED_BY_LENGTH or "dynamic" in str(name) for name in named)
