"""Finds out where a model takes the positions of its tokens from, so that a shard's are those of
the whole sequence.

Checks that every token's position is the one that it has in the whole sequence.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ulysses_accel import _private_api
from ulysses_accel.introspection.findings import Finding
from ulysses_accel.introspection.source import (
    assignments,
    attention_calls,
    forward_of,
    is_name,
    live_nodes,
    mentions,
    parameters,
    syntax_of,
    text_of,
)
from ulysses_accel.introspection.structure import (
    encoder_of,
    reads_tokens,
    sharded_parts,
    text_config,
)

DECODER_POSITIONS = "decoder_position_ids"
POSITIONS = "position_ids"
SCALED_BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class PositionSource:
    """How one sequence's positions come into a model.

    Args:
        key: their name in the batch.
        is_argument: whether the model's forward takes them under that name.
        embeddings: otherwise the modules that take positions, or make their own, with their names.
    """

    key: str
    is_argument: bool
    embeddings: tuple[tuple[str, nn.Module], ...] = ()

    @property
    def is_known(self) -> bool:
        """Whether the positions have a way in."""
        return self.is_argument or bool(self.embeddings)


def position_sources(model: Any) -> list[PositionSource]:
    """Returns the way of each sharded sequence's positions into a model: the main one's first, then
    an encoder's.

    Args:
        model: a transformers model.
    """
    taken, encoder, parts = parameters(model), encoder_of(model), sharded_parts(model)
    if encoder is None:
        return [
            PositionSource(POSITIONS, True)
            if POSITIONS in taken
            else PositionSource(POSITIONS, False, _embeddings(parts))
        ]
    inside = set(encoder.modules())
    sources = []
    for key, is_encoder in ((DECODER_POSITIONS, False), (POSITIONS, True)):
        side = [(name, module) for name, module in parts if (module in inside) is is_encoder]
        if not is_encoder or reads_tokens(encoder):
            found = (
                PositionSource(key, True)
                if key in taken
                else PositionSource(key, False, _embeddings(side))
            )
            sources.append(found)
    return sources


def _embeddings(parts: Iterable[tuple[str, nn.Module]]) -> tuple[tuple[str, nn.Module], ...]:
    """Returns the innermost modules that take positions, and those that make them of tokens they
    are given.
    """
    found = [
        (name, module)
        for name, module in parts
        if POSITIONS in parameters(module) or makes_positions(module)
    ]
    return tuple(
        (name, module)
        for name, module in found
        if not any(other.startswith(f"{name}.") for other, _ in found) and not _is_model(module)
    )


def _is_model(module: nn.Module) -> bool:
    return _private_api.is_transformers_model(module)


def makes_positions(module: nn.Module) -> bool:
    """Returns whether a module looks up positions that it counts in `input_ids`, without taking
    any.
    """
    counts = callable(getattr(module, "create_position_ids_from_input_ids", None))
    return counts and POSITIONS not in parameters(module) and "input_ids" in parameters(module)


def padding_start(model: Any) -> int | None:
    """Returns the number behind which a model's positions start, where it counts them from its
    padding token.
    """
    for _, module in sharded_parts(model):
        index = getattr(module, "padding_idx", None)
        if (
            isinstance(index, int)
            and _counts_tokens(module)
            and (makes_positions(module) or _looks_up(module))
        ):
            return index
    return None


def _looks_up(module: nn.Module) -> bool:
    """Whether a module has an embedding of positions; with rotary ones it makes those positions for
    nothing.
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


def counts_mask(model: Any) -> bool:
    """Returns whether a model counts positions by its attention mask, where it is given none."""
    parts = sharded_parts(model)
    named = dict(parts)
    embeds = any(
        _takes_mask(part) and not _counts_places(named.get(name.rpartition(".")[0]))
        for name, part in parts
    )
    return embeds or any(map(_counts_text_by_mask, model.modules()))


def _takes_mask(module: nn.Module) -> bool:
    """Whether an embedding of positions counts them by the mask that it is given."""
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


def _counts_places(module: nn.Module | None) -> bool:
    """Whether a module makes positions of places in the row, so that its embedding is never without
    any.
    """
    forward = forward_of(module) if module is not None else None
    if module is None or forward is None:
        return False
    made = [value for name, value in assignments(forward, module) if name == POSITIONS]
    return any("torch.arange" in ast.unparse(value) for value in made)


def _counts_text_by_mask(module: nn.Module) -> bool:
    """Whether a model of text and images makes positions of its mask for text alone, too."""
    method = getattr(type(module), "compute_3d_position_ids", None)
    made = syntax_of(method) if method is not None else None
    conditions = (
        [value for name, value in assignments(made, module) if name == "can_compute_mrope"]
        if made
        else []
    )
    return any(mentions(value, "attention_mask") for value in conditions)


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


def own_counts(model: Any) -> list[OwnCount]:
    """Returns the attending modules of a model that count their tokens by themselves."""
    found = []
    for name, module in sharded_parts(model):
        forward = forward_of(module) if attention_calls(module) else None
        nodes = list(live_nodes(forward, module)) if forward is not None else []
        counts = [
            node
            for node in nodes
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.arange"
        ]
        added = [
            node.left
            for node in nodes
            if isinstance(node, ast.BinOp) and is_name(node.right, "past_seen_tokens")
        ]
        if counts:
            follows = (
                len(counts) == 1 and counts[0] in added and "past_key_values" in parameters(module)
            )
            found.append(OwnCount(name, module, text_of(counts[0]), follows))
    return found


def check_positions(model: Any) -> Iterator[Finding]:
    """Yields positions that can't be told to the model, or that it counts on its own tokens."""
    for source in position_sources(model):
        if not source.is_known:
            yield Finding(
                "positions",
                "forward",
                f"its forward takes no {source.key} and no part of it takes positions, so a shard "
                "would start at "
                f"position 0.",
                "Use a model that takes them.",
            )
    for count in own_counts(model):
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
    scaled = set(rope_types(text_config(model))) & set(SCALED_BY_LENGTH)
    if scaled and not rotary_modules(model):
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


def rotary_modules(model: Any) -> list[nn.Module]:
    """Returns the modules whose rotary angles follow from the longest position that they are
    given.
    """
    return [module for _, module in sharded_parts(model) if _follows_length(module)]


def _follows_length(module: nn.Module) -> bool:
    types = getattr(module, "rope_type", None)
    named = types.values() if isinstance(types, dict) else [types]
    return any(
        name == kind or "dynamic" in str(name) for name in named for kind in SCALED_BY_LENGTH
    )
