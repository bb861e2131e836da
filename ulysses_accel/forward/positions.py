"""Gives modules the positions of this rank's tokens where a model's forward takes none and would
count from 0.

Three kinds of hooks, on the instances only, which do nothing outside of a sharded forward:

- position embeddings use the batch's positions;
- attention modules that count tokens after a cache count those of the full sequence;
- rotary modules whose angles depend on the longest position (dynamic and long RoPE) get the full
  batch's: transformers takes the greatest of the positions that they are given, so a hook appends
  the longest one as one more token, and another removes its angles again.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ulysses_accel.attention.huggingface.masks import DescribedMask
from ulysses_accel.errors import BatchError, UnsupportedModelError
from ulysses_accel.forward.context import (
    ForwardFeature,
    ModelToShard,
    RunningBatch,
    sharded_batch,
)
from ulysses_accel.installation import Installation
from ulysses_accel.introspection.positions import (
    POSITIONS,
    PositionSource,
    makes_positions,
)
from ulysses_accel.sequence.description import SequenceDescription
from ulysses_accel.sequence.layout import ring_order
from ulysses_accel.sequence.running import running_description


class Positions(ForwardFeature):
    """Makes a model, or its position embeddings, use the batch's positions."""

    def __init__(self, target: ModelToShard, changes: Installation) -> None:
        self._is_argument = {source.key: source.is_argument for source in target.profile.positions}
        for source in target.profile.positions:
            if not source.is_argument:
                _hook_embeddings(source, changes)

    def before(self, model: nn.Module, batch: RunningBatch, kwargs: dict[str, Any]) -> None:
        """Keeps the batch's positions for the hooks; the model gets those that it takes."""
        for key, is_argument in self._is_argument.items():
            batch.positions[key] = kwargs[key]
            if not is_argument:
                del kwargs[key]


def _hook_embeddings(source: PositionSource, changes: Installation) -> None:
    for _, module in source.embeddings:
        if makes_positions(module):
            changes.hooks([module.register_forward_hook(PositionLookupHook(source.key))])
            continue
        hook = PositionArgumentHook(source.key, inspect.signature(type(module).forward))
        changes.hooks(
            [
                module.register_forward_pre_hook(hook.before, with_kwargs=True),
                module.register_forward_hook(hook.after),
            ]
        )


def _local_positions(key: str) -> Tensor | None:
    """Returns the running batch's positions `[B, S / P]`, None outside of a sharded forward."""
    batch = sharded_batch()
    return None if batch is None else batch.positions.get(key)


@dataclass(frozen=True)
class PositionArgumentHook:
    """Gives a module the batch's positions, whatever its model passes.

    Args:
        key: their name in the batch.
        signature: of the module's forward.
    """

    key: str
    signature: inspect.Signature

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replaces the argument."""
        positions = _local_positions(self.key)
        if positions is None:
            return None
        bound = self.signature.bind(module, *args, **kwargs)
        bound.arguments["position_ids"] = positions
        return bound.args[1:], bound.kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Removes the dim that some embeddings add: they expect the positions of one row."""
        positions = _local_positions(self.key)
        if positions is None or not isinstance(output, Tensor):
            return None
        adds_dim = output.ndim == positions.ndim + 2 and output.shape[0] == 1
        return output.squeeze(0) if adds_dim else None


@dataclass(frozen=True)
class PositionLookupHook:
    """Replaces the output of a module that counts its tokens, by looking positions up in the table
    that it computes.

    The table has a row for every position up to the longest of the batch, as such a module keeps it
    anyway.

    Args:
        key: the positions' name in the batch.
    """

    key: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Returns the embeddings `[B, S / P, D]` of this rank's positions."""
        positions, description = _local_positions(self.key), running_description()
        if positions is None or description is None:
            return None
        padding = int(module.padding_idx)  # type: ignore[arg-type]
        is_encoder = self.key == POSITIONS and description.encoder is not None
        longest = longest_position(description, is_encoder)
        tokens = torch.full(
            (1, max(longest, padding) - padding + 1), padding + 1, device=positions.device
        )
        tokens[0, 0] = padding
        table: Tensor = type(module).forward(module, input_ids=tokens)
        # [L, D], [B, S/P] -> [B, S/P, D]
        return table[0][positions - padding]


def longest_position(description: SequenceDescription, is_encoder: bool) -> int:
    """Returns the longest position of a sequence of the batch, or of its encoder's."""
    side = description.encoder if is_encoder else description
    if side is None or side.longest_position is None:
        raise BatchError(
            "the model's positions follow from the longest one of the whole batch, which the "
            "batch's description does not tell. Describe it with longest_position, as prepared "
            "data loaders do."
        )
    return side.longest_position


class TokenCounts(ForwardFeature):
    """Makes attention modules that count their tokens after a cache count those of the full
    sequence.
    """

    def __init__(self, target: ModelToShard, changes: Installation) -> None:
        shard = target.attention.attention.shard
        for count in target.profile.own_counts:
            hook = TokenCountHook(shard, inspect.signature(type(count.module).forward))
            changes.hooks([count.module.register_forward_pre_hook(hook, with_kwargs=True)])


@dataclass(frozen=True)
class TokenCountHook:
    """Gives an attention module a cache that says where this rank's tokens are.

    Args:
        shard: which of the sequence's shards this rank holds.
        signature: of the module's forward.
    """

    shard: int
    signature: inspect.Signature

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replaces the module's cache in a sharded forward."""
        bound = self.signature.bind(module, *args, **kwargs)
        mask = bound.arguments.get("attention_mask")
        description = mask.description if isinstance(mask, DescribedMask) else running_description()
        if description is None:
            return None
        tensors = (value for value in bound.arguments.values() if isinstance(value, Tensor))
        device = next(tensors).device
        bound.arguments["past_key_values"] = SeenTokens(_offsets(description, self.shard, device))
        return bound.args[1:], bound.kwargs


@dataclass(frozen=True)
class SeenTokens:
    """An empty cache that says for each of this rank's tokens how many of the row's lie before it.

    Args:
        offsets: `[S / P]`.
    """

    offsets: Tensor

    def get_seq_length(self, *_: Any) -> Tensor:
        """Returns the offsets, which the module adds to its own count."""
        return self.offsets

    def update(self, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """Returns key and value as they are."""
        return key, value


def _offsets(description: SequenceDescription, shard: int, device: torch.device) -> Tensor:
    """Returns `[S / P]`, each local token's index in the row less its index in the shard."""
    key = ("offsets", shard, device)
    if key not in description.cache:
        order = ring_order(description.sequence_length, description.ring_size, description.layout)
        indices = torch.arange(description.sequence_length) if order is None else order
        length = description.shard_length
        offsets = indices.narrow(0, shard * length, length) - torch.arange(length)
        description.cache[key] = offsets.to(device)
    cached: Tensor = description.cache[key]
    return cached


class RotaryLength(ForwardFeature):
    """Tells rotary modules the longest position of the batch that is running."""

    def __init__(self, target: ModelToShard, changes: Installation) -> None:
        in_encoder = target.attention.roles.encoder or ()
        for module in target.profile.rotary:
            hook = LongestPositionHook(
                module in in_encoder, inspect.signature(type(module).forward)
            )
            changes.hooks(
                [
                    module.register_forward_pre_hook(hook.before, with_kwargs=True),
                    module.register_forward_hook(hook.after),
                ]
            )


@dataclass(frozen=True)
class LongestPositionHook:
    """Appends the longest position of a module's sequence to the positions that it is given.

    Args:
        is_encoder: whether that sequence is the encoder's.
        signature: of the module's forward.
    """

    is_encoder: bool
    signature: inspect.Signature

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Appends the position."""
        batch = sharded_batch()
        if batch is None or batch.description is None:
            return None
        longest = longest_position(batch.description, self.is_encoder)
        bound = self.signature.bind(module, *args, **kwargs)
        positions: Tensor = bound.arguments["position_ids"]
        # Padding that was added after the batch counts on, and must not make it longer.
        last = positions.new_full((*positions.shape[:-1], 1), longest)
        bound.arguments["position_ids"] = torch.cat([positions.clamp(max=longest), last], dim=-1)
        return bound.args[1:], bound.kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Removes its angles again."""
        if sharded_batch() is None:
            return None
        if isinstance(output, Tensor):
            return _without_last(module, output)
        return tuple(_without_last(module, angles) for angles in output)


def _without_last(module: nn.Module, angles: Any) -> Tensor:
    """Returns angles `[..., S / P + 1, D]` without the last token's."""
    if not isinstance(angles, Tensor) or angles.ndim < 2:
        raise UnsupportedModelError(
            f"{type(module).__name__} returns {type(angles).__name__} for its positions, where "
            "angles of each token were expected. Use a fixed scaling such as yarn or linear."
        )
    return angles.narrow(-2, 0, angles.shape[-2] - 1)
