"""Images and audio: merged into the embeddings of the full sequence as the model does it, and
sharded before its decoder.

Every rank of a sequence group has the batch's tokens, mask and images in full, runs the towers on
them and merges. A hook on the decoder, which is given embeddings, shards those and all that goes
with them; from there on each rank has its own tokens. What a rank's tokens contribute is its part
of a gradient, so embeddings and towers get the right one too.

An encoder whose input (audio, images) every rank has in full runs inside a sharded forward as it
always does. Its work is replicated, and its gradients are right: on each rank they are what that
rank's tokens contribute through cross-attention, and the loss carries the factor by which engines
average them.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ulysses_accel.attention.huggingface.masks import DescribedMask
from ulysses_accel.dataloader.keys import MERGED_KEYS
from ulysses_accel.errors import UnsupportedModelError
from ulysses_accel.forward.context import (
    ForwardFeature,
    ModelToShard,
    RunningBatch,
    sharded_batch,
)
from ulysses_accel.forward.override import Forward, override_forward
from ulysses_accel.installation import Installation
from ulysses_accel.introspection.positions import POSITIONS
from ulysses_accel.sequence.description import SequenceDescription
from ulysses_accel.sequence.gather import shard_sequence
from ulysses_accel.sequence.running import DescribedBatch, run_batch

_DEEPSTACK, _VISUAL_MASK = "deepstack_visual_embeds", "visual_pos_masks"


def has_merged_inputs(kwargs: dict[str, Any]) -> bool:
    """Returns whether a forward is given images or audio."""
    return any(kwargs.get(name) is not None for name in MERGED_KEYS)


class Multimodal(ForwardFeature):
    """Shards what a model gives to its decoder, and lets its towers attend as they always do."""

    def __init__(self, target: ModelToShard, changes: Installation) -> None:
        merging = target.profile.merging
        self._merges = merging is not None
        if target.profile.encoder is not None and target.profile.has_full_encoder:
            override_forward(target.profile.encoder, _without_sharding, changes)
        if merging is None:
            return
        decoder = merging.decoder
        names = tuple(inspect.signature(type(decoder).forward).parameters)[1:]
        hook = DecoderHook(target.group, names)
        changes.hooks([decoder.register_forward_pre_hook(hook, with_kwargs=True)])
        for tower in merging.towers:
            override_forward(tower, _without_sharding, changes)

    def before(self, model: nn.Module, batch: RunningBatch, kwargs: dict[str, Any]) -> None:
        """Gives the model the full mask and positions of a batch with images or audio.

        Positions that every rank has in full are the batch's own; others were computed for a
        decoder that is given none.
        """
        if not self._merges or not has_merged_inputs(kwargs):
            return
        assert batch.description is not None
        batch.merges = True
        positions = batch.positions.get(POSITIONS)
        is_full = positions is not None and positions.shape[-1] == batch.description.sequence_length
        batch.decoder_positions = None if is_full else positions
        kwargs.setdefault("attention_mask", None)
        kwargs[POSITIONS] = positions if is_full else None


def _without_sharding(
    _module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Hides the sharded batch from a tower, or from an encoder whose input is full."""
    with run_batch(DescribedBatch(None)):
        return forward(*args, **kwargs)


@dataclass(frozen=True)
class DecoderHook:
    """The hook before a decoder, which is given the merged embeddings of the full sequence.

    Args:
        group: the ranks that share each sequence.
        names: of the decoder's positional arguments.
    """

    group: ProcessGroup
    names: tuple[str, ...]

    def __call__(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns this rank's part of the decoder's arguments."""
        batch = sharded_batch()
        if batch is None or not batch.merges:
            return None
        description = batch.description
        assert description is not None
        full = {**dict(zip(self.names, args)), **kwargs}
        local = {}
        for name, value in full.items():
            local[name] = self._local_argument(decoder, name, value, description)
        if not isinstance(local.get("inputs_embeds"), Tensor):
            raise UnsupportedModelError(
                f"{type(decoder).__name__} was given no inputs_embeds, where merged images or "
                "audio were expected. Merge them before (inputs_embeds in the batch), or use "
                "sp_size=1 and cp_size=1."
            )
        if POSITIONS in self.names and local.get(POSITIONS) is None:
            local[POSITIONS] = batch.decoder_positions
        if full.get(_DEEPSTACK) is not None:
            local[_DEEPSTACK] = self._local_features(
                full[_DEEPSTACK], full[_VISUAL_MASK], description
            )
        return (), local

    def _local_argument(
        self, decoder: nn.Module, name: str, value: Any, description: SequenceDescription
    ) -> Any:
        """Returns one argument as the decoder of a sharded sequence is to get it."""
        if name == "attention_mask":
            return _described_or_none(value)
        if not isinstance(value, Tensor) or name == _DEEPSTACK:
            return value
        if name == POSITIONS:
            # [..., S] -> [..., S/P]
            return shard_sequence(value, description, self.group, dim=-1)
        if tuple(value.shape[:2]) != (description.batch_size, description.sequence_length):
            return value
        if name not in ("inputs_embeds", "input_ids", _VISUAL_MASK):
            raise UnsupportedModelError(
                f"{type(decoder).__name__} was given {name} of shape {list(value.shape)} beside "
                "its merged embeddings, which may or may not follow the tokens. Merge images "
                "before (inputs_embeds in the batch), or use sp_size=1 and cp_size=1."
            )
        # [B, S, ...] -> [B, S/P, ...]
        return shard_sequence(value, description, self.group)

    def _local_features(
        self, features: Any, mask: Tensor, description: SequenceDescription
    ) -> list[Tensor]:
        """Returns this rank's rows of features `[n, D]`, which the decoder adds where the mask
        `[B, S]` of the full sequence is True, n times.
        """
        numbers = (mask.flatten().cumsum(0) - 1).view_as(mask)
        # [B, S] -> [B, S/P]
        local_numbers = shard_sequence(numbers, description, self.group)
        local_mask = shard_sequence(mask, description, self.group)
        rows = local_numbers[local_mask]
        return [torch.index_select(feature, 0, rows.to(feature.device)) for feature in features]


def _described_or_none(mask: Any) -> Any:
    """Returns what a decoder is given as its mask: the described ones of its model, or None, and it
    computes its own.
    """
    masks = mask.values() if isinstance(mask, dict) else [mask]
    return mask if all(isinstance(one, DescribedMask) for one in masks) else None
