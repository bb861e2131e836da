"""Gives modules the positions of this rank's tokens where a model's forward takes none and would
count from 0.

Hooks on the instances only, which do nothing outside of a sharded forward.

Rotary angles that follow from the longest position: the whole batch's, not this shard's.

transformers takes the greatest of the positions that a rotary module is given (dynamic and long
RoPE). A hook appends the batch's longest position to them as one more token, and another cuts its
angles off again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ulysses_accel.attention import SequenceAttention, active_description
from ulysses_accel.attention.huggingface.masks import DescribedMask
from ulysses_accel.errors import BatchError, UnsupportedModelError
from ulysses_accel.introspection.positions import OwnCount, PositionSource, makes_positions
from ulysses_accel.sequence.description import SequenceDescription
from ulysses_accel.sequence.layout import ring_order

Handles = list[Any]
CurrentPositions = Callable[[str], Tensor | None]


def hook_positions(source: PositionSource, current: CurrentPositions) -> Handles:
    """Makes a model's position embeddings use the batch's positions.

    Args:
        source: of a sequence whose positions the model's forward does not take.
        current: returns the running forward's positions `[B, S / P]` by their key, None outside of
            a sharded forward.

    Returns:
        What takes the hooks off.
    """
    handles: Handles = []
    for _, module in source.embeddings:
        if makes_positions(module):
            handles.append(module.register_forward_hook(_LookUp(source.key, current)))
            continue
        given = _Give(source.key, current, inspect.signature(type(module).forward))
        handles.append(module.register_forward_pre_hook(given.before, with_kwargs=True))
        handles.append(module.register_forward_hook(given.after))
    return handles


@dataclass(frozen=True)
class _Give:
    """Puts positions in the place of whatever a module was given."""

    key: str
    current: CurrentPositions
    signature: inspect.Signature

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        positions = self.current(self.key)
        if positions is None:
            return None
        bound = self.signature.bind(module, *args, **kwargs)
        bound.arguments["position_ids"] = positions
        return bound.args[1:], bound.kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        positions = self.current(self.key)
        if positions is None or not isinstance(output, Tensor):
            return None
        # Some embeddings expect the positions of one row and add the batch's dim.
        return (
            output.squeeze(0)
            if output.ndim == positions.ndim + 2 and output.shape[0] == 1
            else None
        )


@dataclass(frozen=True)
class _LookUp:
    """Replaces the output of a module that counts its tokens, by looking positions up in the table
    it would make.

    The table has a row for every position up to the longest of the batch, as such a module keeps it
    anyway.
    """

    key: str
    current: CurrentPositions

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        positions = self.current(self.key)
        if positions is None:
            return None
        padding = int(module.padding_idx)  # type: ignore[arg-type]
        description = active_description()
        longest = longest_position(
            description, is_encoder=self.key == "position_ids" and _has_encoder(description)
        )
        tokens = torch.full(
            (1, max(longest, padding) - padding + 1), padding + 1, device=positions.device
        )
        tokens[0, 0] = padding
        table: Tensor = type(module).forward(module, input_ids=tokens)
        # [L, D], [B, S/P] -> [B, S/P, D]
        return table[0][positions - padding]


def _has_encoder(description: SequenceDescription | None) -> bool:
    return description is not None and description.encoder is not None


def longest_position(description: SequenceDescription | None, is_encoder: bool) -> int:
    """Returns the longest position of a sequence of the batch, or of its encoder's."""
    side = description.encoder if description is not None and is_encoder else description
    if side is None or side.longest_position is None:
        raise BatchError(
            "the model's positions follow from the longest one of the whole batch, which the "
            "batch's description does "
            "not tell. Describe it with longest_position, as prepared data loaders do."
        )
    return side.longest_position


def hook_counts(counts: Sequence[OwnCount], attention: SequenceAttention) -> Handles:
    """Makes attention modules that count their tokens behind a cache count them as those of the
    whole sequence.

    Args:
        counts: of modules that add what a cache says.
        attention: the model's strategy, which knows this rank's shard.

    Returns:
        What takes the hooks off.
    """
    handles: Handles = []
    for count in counts:
        before = _CountOn(attention, inspect.signature(type(count.module).forward))
        handles.append(count.module.register_forward_pre_hook(before, with_kwargs=True))
    return handles


@dataclass(frozen=True)
class _CountOn:
    attention: SequenceAttention
    signature: inspect.Signature

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = self.signature.bind(module, *args, **kwargs)
        mask = bound.arguments.get("attention_mask")
        # The mask's description is the right one in a checkpoint's recompute too.
        description = mask.description if isinstance(mask, DescribedMask) else active_description()
        if description is None:
            return None
        device = next(
            value.device for value in bound.arguments.values() if isinstance(value, Tensor)
        )
        bound.arguments["past_key_values"] = _SeenTokens(
            _offsets(description, self.attention.shard, device)
        )
        return bound.args[1:], bound.kwargs


@dataclass(frozen=True)
class _SeenTokens:
    """Stands for an empty cache that says for each of this rank's tokens how many of the row's lie
    before them.
    """

    offsets: Tensor

    def get_seq_length(self, *_: Any) -> Tensor:
        return self.offsets

    def update(self, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return key, value


def _offsets(description: SequenceDescription, shard: int, device: torch.device) -> Tensor:
    """Returns `[S / P]`, each local token's place in the row less its place in the shard."""
    wanted = ("offsets", shard, device)
    if wanted not in description.cache:
        order = ring_order(description.sequence_length, description.ring_size, description.layout)
        places = torch.arange(description.sequence_length) if order is None else order
        length = description.shard_length
        own = places.narrow(0, shard * length, length) - torch.arange(length)
        description.cache[wanted] = own.to(device)
    offsets: Tensor = description.cache[wanted]
    return offsets


def hook_rotary(
    modules: Sequence[nn.Module], longest: Callable[[nn.Module], int | None]
) -> list[Any]:
    """Tells rotary modules the longest position of the batch that is running.

    Args:
        modules: whose angles follow from it.
        longest: returns it for a module's sequence; None outside of a sharded forward.

    Returns:
        What takes the hooks off.
    """
    handles: list[Any] = []
    for module in modules:
        hook = _LongestLast(longest, inspect.signature(type(module).forward))
        handles.append(module.register_forward_pre_hook(hook.before, with_kwargs=True))
        handles.append(module.register_forward_hook(hook.after))
    return handles


@dataclass(frozen=True)
class _LongestLast:
    longest: Callable[[nn.Module], int | None]
    signature: inspect.Signature

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        longest = self.longest(module)
        if longest is None:
            return None
        bound = self.signature.bind(module, *args, **kwargs)
        positions: Tensor = bound.arguments["position_ids"]
        # Padding that was added behind the batch counts on, and must not make it longer.
        last = positions.new_full((*positions.shape[:-1], 1), longest)
        bound.arguments["position_ids"] = torch.cat([positions.clamp(max=longest), last], dim=-1)
        return bound.args[1:], bound.kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.longest(module) is None:
            return None
        if isinstance(output, Tensor):
            return _without_last(module, output)
        return tuple(_without_last(module, angles) for angles in output)


def _without_last(module: nn.Module, angles: Any) -> Tensor:
    """Returns angles `[..., S / P + 1, D]` without the last token's."""
    if not isinstance(angles, Tensor) or angles.ndim < 2:
        raise UnsupportedModelError(
            f"{type(module).__name__} returns {type(angles).__name__} for its positions, where "
            "angles of each token "
            f"were expected. Use a fixed scaling such as yarn or linear."
        )
    return angles.narrow(-2, 0, angles.shape[-2] - 1)
