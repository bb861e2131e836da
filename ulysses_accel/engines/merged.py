"""Images and sound: merged into the embeddings of whole tokens as the model does it, and cut before its decoder.

Every rank of a sequence group has the batch's tokens, mask and images whole, runs the towers on them and merges. A hook
on the decoder, which is given embeddings, cuts those and all that goes with them; from there on each rank has its own
tokens. What a rank's tokens contribute is its part of a gradient, so embeddings and towers get the right one too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ulysses_accel.attention.mask_patterns import DescribedMask
from ulysses_accel.attention.structure import attending, encoder_of, source_of, text_config
from ulysses_accel.attention.syntax import parameters
from ulysses_accel.dataloader.schema import MERGED_KEYS
from ulysses_accel.engines.whole_encoder import hook_whole_encoder
from ulysses_accel.errors import UnsupportedModelError
from ulysses_accel.pooling import shard_sequence
from ulysses_accel.sequence import SequenceDescription

_DEEPSTACK, _PLACES = "deepstack_visual_embeds", "visual_pos_masks"


@dataclass(frozen=True)
class Merging:
    """Where a model merges images or sound into its tokens.

    Args:
        decoder: what is given the merged embeddings.
        towers: what attends to images or sound, outermost modules only.
        has_blocks: whether it lets the tokens of one image, or of a prompt, see each other in both directions where the
            batch says of each token which it is.
    """

    decoder: nn.Module
    towers: tuple[nn.Module, ...]
    has_blocks: bool


@dataclass(frozen=True)
class MergedBatch:
    """A forward with images or sound that is running.

    Args:
        description: of its tokens.
        positions: `[B, S / P]`, for a decoder whose model gives it none; None where the batch has its own.
    """

    description: SequenceDescription
    positions: Tensor | None


def merging_of(model: Any) -> Merging | None:
    """Returns where a transformers model merges images or sound; None where it doesn't, or not in a known way.

    Args:
        model: a transformers model.
    """
    takes = set(parameters(model)) & set(MERGED_KEYS)
    if not takes or encoder_of(model) is not None or text_config(model) is model.config:
        return None
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or decoder is model or "inputs_embeds" not in parameters(decoder):
        return None
    around = [module for module in model.modules() if module is not decoder and _holds(module, decoder)]
    sources = [source_of(type(module)) for module in around]
    if not any("masked_scatter(" in source for source in sources):
        return None
    has_blocks = any("block_sequence_ids" in source for source in sources)
    return Merging(decoder, tuple(_towers(model, decoder)), has_blocks)


def _holds(module: nn.Module, part: nn.Module) -> bool:
    return any(other is part for other in module.modules())


def _towers(module: nn.Module, decoder: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if _holds(child, decoder):
            yield from _towers(child, decoder) if child is not decoder else ()
        elif any(True for _ in attending(child)):
            yield child


def is_merged(merging: Merging | None, kwargs: dict[str, Any]) -> bool:
    """Returns whether a model is going to merge images or sound of a batch into its tokens."""
    return merging is not None and any(kwargs.get(name) is not None for name in MERGED_KEYS)


def begin_merged(
    merging: Merging | None, description: SequenceDescription, kwargs: dict[str, Any]
) -> tuple[MergedBatch | None, dict[str, Any]]:
    """Returns what is kept of a batch with images or sound until its decoder runs, and what its model is given whole.

    Args:
        merging: of the model; nothing is kept where it merges nothing.
        description: of the batch.
        kwargs: of the forward; positions that every rank has whole are the batch's own, others were made for a decoder
            that is given none.
    """
    if not is_merged(merging, kwargs):
        return None, {}
    positions = kwargs.get("position_ids")
    is_own = positions is not None and positions.shape[-1] == description.sequence_length
    whole = {"attention_mask": kwargs.get("attention_mask"), "position_ids": positions if is_own else None}
    return MergedBatch(description, None if is_own else positions), whole


def hook_merged(merging: Merging, group: ProcessGroup, current: Callable[[], MergedBatch | None]) -> list[Any]:
    """Cuts what a model gives to its decoder, and lets its towers attend as they always do.

    Args:
        merging: of the model.
        group: the ranks that share each sequence.
        current: returns the running forward's batch; None where it has no images or sound.

    Returns:
        What takes the hooks off.
    """
    cut = _Cut(group, current, tuple(inspect.signature(type(merging.decoder).forward).parameters)[1:])
    handles: list[Any] = [merging.decoder.register_forward_pre_hook(cut, with_kwargs=True)]
    for tower in merging.towers:
        handles += hook_whole_encoder(tower)
    return handles


def _own_mask(mask: Any) -> Any:
    """Returns what a decoder is given as its mask: described ones of its model, or None, and it makes its own."""
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
                f"{type(decoder).__name__} was given no inputs_embeds, where merged images or sound were expected. "
                f"Merge them before (inputs_embeds in the batch), or use sp_size=1 and cp_size=1."
            )
        if "position_ids" in self.names and own.get("position_ids") is None:
            own["position_ids"] = batch.positions
        if given.get(_DEEPSTACK) is not None:
            own[_DEEPSTACK] = self._own_features(given[_DEEPSTACK], given[_PLACES], batch.description)
        return (), own

    def _part(self, decoder: nn.Module, name: str, value: Any, size: tuple[int, int], batch: MergedBatch) -> Any:
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
                f"{type(decoder).__name__} was given {name} of shape {list(value.shape)} beside its merged embeddings, "
                f"which may or may not follow the tokens. Merge images before (inputs_embeds in the batch), or use "
                f"sp_size=1 and cp_size=1."
            )
        # [B, S, ...] -> [B, S/P, ...]
        return shard_sequence(value, batch.description, self.group)

    def _own_features(self, features: Any, places: Tensor, description: SequenceDescription) -> list[Tensor]:
        """Returns this rank's rows of features `[n, D]` that the decoder adds at n places of the whole sequence."""
        numbers = (places.flatten().cumsum(0) - 1).view_as(places)
        # [B, S] -> [B, S/P]
        own = shard_sequence(numbers, description, self.group)[shard_sequence(places, description, self.group)]
        return [torch.index_select(feature, 0, own.to(feature.device)) for feature in features]
