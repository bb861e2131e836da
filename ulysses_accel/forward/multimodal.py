"""Images and sound: merged into the embeddings of whole tokens as the model does it, and cut before
its decoder.

Every rank of a sequence group has the batch's tokens, mask and images whole, runs the towers on
them and merges. A hook on the decoder, which is given embeddings, cuts those and all that goes with
them; from there on each rank has its own tokens. What a rank's tokens contribute is its part of a
gradient, so embeddings and towers get the right one too.

An encoder that every rank has all of (sound, images) runs inside a sharded forward as it always
does.

Its work is replicated, and its gradients are right: on each rank they are what that rank's tokens
contribute through cross-attention, and the loss carries the factor by which engines average them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ulysses_accel.attention import describe_forward
from ulysses_accel.attention.huggingface.masks import DescribedMask
from ulysses_accel.dataloader.keys import MERGED_KEYS
from ulysses_accel.errors import UnsupportedModelError
from ulysses_accel.introspection.multimodal import Merging
from ulysses_accel.sequence.description import SequenceDescription
from ulysses_accel.sequence.gather import shard_sequence

_DEEPSTACK, _PLACES = "deepstack_visual_embeds", "visual_pos_masks"


@dataclass(frozen=True)
class MergedBatch:
    """A forward with images or sound that is running.

    Args:
        description: of its tokens.
        positions: `[B, S / P]`, for a decoder whose model gives it none; None where the batch has
            its own.
    """

    description: SequenceDescription
    positions: Tensor | None


def is_merged(merging: Merging | None, kwargs: dict[str, Any]) -> bool:
    """Returns whether a model is going to merge images or sound of a batch into its tokens."""
    return merging is not None and any(kwargs.get(name) is not None for name in MERGED_KEYS)


def begin_merged(
    merging: Merging | None, description: SequenceDescription, kwargs: dict[str, Any]
) -> tuple[MergedBatch | None, dict[str, Any]]:
    """Returns what is kept of a batch with images or sound until its decoder runs, and what its
    model is given whole.

    Args:
        merging: of the model; nothing is kept where it merges nothing.
        description: of the batch.
        kwargs: of the forward; positions that every rank has whole are the batch's own, others were
            made for a decoder that is given none.
    """
    if not is_merged(merging, kwargs):
        return None, {}
    positions = kwargs.get("position_ids")
    is_own = positions is not None and positions.shape[-1] == description.sequence_length
    whole = {
        "attention_mask": kwargs.get("attention_mask"),
        "position_ids": positions if is_own else None,
    }
    return MergedBatch(description, None if is_own else positions), whole


def hook_merged(
    merging: Merging, group: ProcessGroup, current: Callable[[], MergedBatch | None]
) -> list[Any]:
    """Cuts what a model gives to its decoder, and lets its towers attend as they always do.

    Args:
        merging: of the model.
        group: the ranks that share each sequence.
        current: returns the running forward's batch; None where it has no images or sound.

    Returns:
        What takes the hooks off.
    """
    cut = _Cut(
        group, current, tuple(inspect.signature(type(merging.decoder).forward).parameters)[1:]
    )
    handles: list[Any] = [merging.decoder.register_forward_pre_hook(cut, with_kwargs=True)]
    for tower in merging.towers:
        handles += hook_whole_encoder(tower)
    return handles


def _own_mask(mask: Any) -> Any:
    """Returns what a decoder is given as its mask: described ones of its model, or None, and it
    makes its own.
    """
    masks = mask.values() if isinstance(mask, dict) else [mask]
    return mask if all(isinstance(one, DescribedMask) for one in masks) else None


@dataclass(frozen=True)
class _Cut:
    """The hook before a decoder.

    Args:
        group: the ranks that share each sequence.
        current: as for `hook_merged`.
        names: of the decoder's positional arguments.
    """

    group: ProcessGroup
    current: Callable[[], MergedBatch | None]
    names: tuple[str, ...]

    def __call__(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batch = self.current()
        if batch is None:
            return None
        given = {**dict(zip(self.names, args)), **kwargs}
        size = (batch.description.batch_size, batch.description.sequence_length)
        own = {name: self._part(decoder, name, value, size, batch) for name, value in given.items()}
        if not isinstance(own.get("inputs_embeds"), Tensor):
            raise UnsupportedModelError(
                f"{type(decoder).__name__} was given no inputs_embeds, where merged images or "
                "sound were expected. "
                f"Merge them before (inputs_embeds in the batch), or use sp_size=1 and cp_size=1."
            )
        if "position_ids" in self.names and own.get("position_ids") is None:
            own["position_ids"] = batch.positions
        if given.get(_DEEPSTACK) is not None:
            own[_DEEPSTACK] = self._own_features(
                given[_DEEPSTACK], given[_PLACES], batch.description
            )
        return (), own

    def _part(
        self, decoder: nn.Module, name: str, value: Any, size: tuple[int, int], batch: MergedBatch
    ) -> Any:
        """Returns one argument as the decoder of a sharded sequence is to get it."""
        if name == "attention_mask":
            return _own_mask(value)
        if not isinstance(value, Tensor) or name == _DEEPSTACK:
            return value
        if name == "position_ids":
            # [..., S] -> [..., S/P]
            return shard_sequence(value, batch.description, self.group, dim=-1)
        if tuple(value.shape[:2]) != size:
            return value
        if name not in ("inputs_embeds", "input_ids", _PLACES):
            raise UnsupportedModelError(
                f"{type(decoder).__name__} was given {name} of shape {list(value.shape)} beside "
                "its merged embeddings, "
                "which may or may not follow the tokens. Merge images before (inputs_embeds in "
                "the batch), or use "
                f"sp_size=1 and cp_size=1."
            )
        # [B, S, ...] -> [B, S/P, ...]
        return shard_sequence(value, batch.description, self.group)

    def _own_features(
        self, features: Any, places: Tensor, description: SequenceDescription
    ) -> list[Tensor]:
        """Returns this rank's rows of features `[n, D]` that the decoder adds at n places of the
        whole sequence.
        """
        numbers = (places.flatten().cumsum(0) - 1).view_as(places)
        # [B, S] -> [B, S/P]
        own = shard_sequence(numbers, description, self.group)[
            shard_sequence(places, description, self.group)
        ]
        return [torch.index_select(feature, 0, own.to(feature.device)) for feature in features]


def hook_whole_encoder(encoder: nn.Module) -> list[Any]:
    """Hides the sharded batch from an encoder.

    Args:
        encoder: of an encoder-decoder.

    Returns:
        What takes the hooks off.
    """
    entered: list[AbstractContextManager[None]] = []

    def before(_module: nn.Module, _args: tuple[Any, ...]) -> None:
        context = describe_forward(None)
        context.__enter__()
        entered.append(context)

    def after(_module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        entered.pop().__exit__(None, None, None)

    return [
        encoder.register_forward_pre_hook(before),
        encoder.register_forward_hook(after, always_call=True),
    ]
