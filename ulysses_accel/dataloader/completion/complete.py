"""A batch from a collate function, made complete for sequence parallel training and cut into
shards.

Pure functions on a dict of tensors; no other rank is involved. The whole batch is padded, described
and its labels are placed first, and it is cut afterwards, so that every shard follows from the
whole sequence.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ulysses_accel.dataloader.batch_layout import BatchLayout, KeyFunction
from ulysses_accel.dataloader.completion.encoder_decoder import packed_pair_error, split_pair
from ulysses_accel.dataloader.completion.labels import are_whole, place_labels
from ulysses_accel.dataloader.completion.masks import with_plain_mask
from ulysses_accel.dataloader.completion.positions import Positions, given_positions, made_positions
from ulysses_accel.dataloader.completion.prefixes import PREFIX_KEY, find_prefixes
from ulysses_accel.dataloader.keys import (
    DECODER,
    MERGED_KEYS,
    known,
    pad_tensor,
    sequence_dim,
    token_size,
)
from ulysses_accel.errors import BatchError
from ulysses_accel.sequence.batch_rules import PLAIN_RULES, BatchRules, RulesSource, resolve_rules
from ulysses_accel.sequence.description import DESCRIPTION_KEY, SequenceDescription
from ulysses_accel.sequence.documents import CUMULATIVE_KEYS, Documents, find_rows
from ulysses_accel.sequence.layout import ring_order
from ulysses_accel.sequence.sharding import shard


@dataclass(frozen=True)
class WholeBatch:
    """A complete batch before it is cut.

    Args:
        tensors: padded, whole, in the order of the shards.
        dims: for each tensor its sequence dim, None when every rank gets all of it.
        extras: everything that is no tensor.
        description: of the whole sequence; of the decoder's, with the encoder's in it, where there
            are both.
        made: what the user's functions have made of some tensors, for one rank.
    """

    tensors: dict[str, Tensor]
    dims: dict[str, int | None]
    extras: dict[str, Any]
    description: SequenceDescription
    made: dict[str, Tensor] = field(default_factory=dict)

    def shard(self, rank: int) -> dict[str, Tensor]:
        """Returns one rank's part of every tensor, as views."""
        parts = self.description.num_shards
        cut = {
            name: tensor if (dim := self.dims[name]) is None else shard(tensor, parts, rank, dim)
            for name, tensor in self.tensors.items()
        }
        return {**cut, **self.made}

    def with_functions(self, layout: BatchLayout, rank: int) -> WholeBatch:
        """Returns the batch with one rank's part of the tensors that the user's own functions cut.

        Args:
            layout: has the functions.
            rank: of this process in its sequence group.

        Raises:
            BatchError: a function returned no tensor.
        """
        functions = {
            name: rule
            for name, rule in layout.key_rules.items()
            if callable(rule) and name in self.tensors
        }
        made = {name: _own_part(name, rule, self, rank) for name, rule in functions.items()}
        return replace(self, made=made) if made else self

    def local_batch(self, rank: int) -> dict[str, Any]:
        """Returns what one rank's model gets: its shards, the non-tensors, and the description."""
        return {**self.extras, **self.shard(rank), DESCRIPTION_KEY: self.description}

    def checksum(self) -> int:
        """Returns crc32 of the description and all integer tensors, which tells if two ranks drew
        the same batch.
        """
        value = zlib.crc32(repr(self.description).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            exact = not tensor.is_floating_point() and not tensor.is_complex()
            tokens = name.removeprefix(DECODER) == "inputs_embeds"
            if exact or (tokens and self._lacks_ids(name)):
                value = zlib.crc32(
                    tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data,
                    value,
                )
        return value

    def _lacks_ids(self, embeds: str) -> bool:
        return embeds.replace("inputs_embeds", "input_ids") not in self.tensors


@dataclass(frozen=True)
class ShardingCollate:
    """A collate function that returns one rank's part of the batch, for loaders that others build
    from ours.

    Args:
        collate_fn: the wrapped loader's own.
        layout: how batches are padded and cut.
        rank: of this process in its sequence group.
        rules: what the model asks of a batch.
    """

    collate_fn: Callable[[Any], Any]
    layout: BatchLayout
    rank: int
    rules: RulesSource = PLAIN_RULES

    def __call__(self, samples: Any) -> dict[str, Any]:
        """Returns the local batch of the samples."""
        whole = complete(self.collate_fn(samples), self.layout, resolve_rules(self.rules))
        batch = whole.with_functions(self.layout, self.rank).local_batch(self.rank)
        return {
            key: value.clone() if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }


def complete(batch: Any, layout: BatchLayout, rules: BatchRules = PLAIN_RULES) -> WholeBatch:
    """Returns the batch with positions, labels, padding and its description.

    Args:
        batch: a mapping with `input_ids` `[B, S]` or `inputs_embeds` `[B, S, D]`; for a model with
            an encoder with `labels` `[B, T]` or `decoder_input_ids` `[B, T]` too. The mapping
            itself is not changed.
        layout: how batches are padded and cut.
        rules: what the model asks of a batch.

    Raises:
        BatchError: the batch can't be sharded; the message says why and what to change.
    """
    tensors, extras = _split(batch)
    tensors = with_plain_mask(tensors, rules)
    prefix_lengths = {**extras, **tensors}.get(PREFIX_KEY)
    tensors.pop(PREFIX_KEY, None)
    if rules.decoder_inputs is None:
        whole = _complete_sequence(tensors, extras, layout, rules)
    else:
        whole = _complete_pair(tensors, extras, layout, rules)
    made = (*CUMULATIVE_KEYS, PREFIX_KEY, *whole.tensors)
    return replace(
        whole,
        extras={name: value for name, value in extras.items() if name not in made},
        description=replace(
            whole.description, prefixes=find_prefixes(prefix_lengths, whole.description.rows)
        ),
    )


def _complete_pair(
    tensors: dict[str, Tensor], extras: dict[str, Any], layout: BatchLayout, rules: BatchRules
) -> WholeBatch:
    """Completes a decoder's sequence and, where the encoder reads tokens, the encoder's."""
    pair = split_pair(tensors, extras, layout, rules)
    decoder = _complete_sequence(pair.decoder, extras, layout, rules, DECODER)
    if decoder.description.is_packed:
        raise packed_pair_error("the decoder's positions or mask mark")
    if not pair.encoder:
        return replace(
            decoder,
            tensors={**pair.whole, **decoder.tensors},
            dims={**dict.fromkeys(pair.whole), **decoder.dims},
        )
    encoder = _complete_sequence(pair.encoder, extras, layout, rules)
    if encoder.description.is_packed:
        raise packed_pair_error("the encoder's positions or mask mark")
    return WholeBatch(
        {**encoder.tensors, **decoder.tensors},
        {**encoder.dims, **decoder.dims},
        {},
        replace(decoder.description, encoder=encoder.description),
    )


def _split(batch: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not isinstance(batch, Mapping):
        raise BatchError(
            f"the batch is a {type(batch).__name__}, but a dict with 'input_ids' is needed. "
            "Return a dict from the collate function."
        )
    if not all(isinstance(key, str) for key in batch):
        raise BatchError(
            f"the batch's keys {list(batch)} are not all strings. Name every entry in the collate "
            "function."
        )
    if DESCRIPTION_KEY in batch:
        raise BatchError(
            f"the batch has a '{DESCRIPTION_KEY}' already: it is one rank's shard, not a whole "
            "batch. "
            "Wrap each data loader once only."
        )
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    for key in ("position_ids", f"{DECODER}position_ids"):
        if key not in tensors and batch.get(key) is not None:
            raise BatchError(
                f"'{key}' is a {type(batch[key]).__name__}. Give a tensor, or leave positions out."
            )
    return tensors, {key: value for key, value in batch.items() if key not in tensors}


def _complete_sequence(
    tensors: dict[str, Tensor],
    extras: Mapping[str, Any],
    layout: BatchLayout,
    rules: BatchRules,
    prefix: str = "",
) -> WholeBatch:
    """Completes one sequence, whose tokens, mask and positions have `prefix` before their names."""
    batch_size, length = token_size(tensors, prefix)
    padded = layout.padded_length(length)
    documents = find_rows({**extras, **tensors}, batch_size, length, prefix)
    positions, positions_are_given = (
        _positions(tensors, documents, rules, prefix),
        f"{prefix}position_ids" in tensors,
    )
    tensors = {name: tensor for name, tensor in tensors.items() if name not in CUMULATIVE_KEYS}
    tensors[f"{prefix}position_ids"] = positions.ids
    place_labels(tensors, documents, (batch_size, length), layout, rules)
    whole_labels = ("labels",) if are_whole(layout, rules) else ()
    dims = {
        name: None
        if name in whole_labels
        else sequence_dim(name, tensor, batch_size, length, layout)
        for name, tensor in tensors.items()
    }
    whole = {
        name: pad_tensor(name, tensor, dims[name], padded, layout)
        for name, tensor in tensors.items()
    }
    if dims[f"{prefix}position_ids"] is not None:
        whole[f"{prefix}position_ids"] = positions.padded(padded)
    if rules.merges and any(name in tensors for name in MERGED_KEYS):
        dims.update(dict.fromkeys(_whole_beside_merged(tensors, positions_are_given)))
    description = SequenceDescription(
        padded,
        layout.num_shards,
        documents.rows,
        layout.ring_size,
        layout.ring_layout,
        documents.holes,
        longest_position=positions.longest,
    )
    return WholeBatch(_in_ring_order(whole, dims, description), dims, {}, description)


def _whole_beside_merged(tensors: Mapping[str, Tensor], positions_are_given: bool) -> list[str]:
    """Returns the keys whose tensors every rank needs whole (and padded) to merge images or sound
    into its tokens.

    Positions that nobody gave are cut all the same: they are for decoders whose model makes none.
    """
    found = [name for name in tensors if (key := known(name)) is not None and key.merged_whole]
    return [name for name in found if name != "position_ids" or positions_are_given]


def _own_part(name: str, function: KeyFunction, whole: WholeBatch, rank: int) -> Tensor:
    part = function(whole.tensors[name], whole.description, rank)
    if not isinstance(part, Tensor):
        raise BatchError(
            f"the function of key_rules[{name!r}] returned a {type(part).__name__}. Return this "
            "rank's tensor."
        )
    return part


def _positions(
    tensors: Mapping[str, Tensor], documents: Documents, rules: BatchRules, prefix: str
) -> Positions:
    given = tensors.get(f"{prefix}position_ids")
    if given is not None:
        return given_positions(given, f"{prefix}position_ids", *token_size(tensors, prefix))
    ids = f"{prefix}input_ids"
    return made_positions(
        tensors[ids if ids in tensors else f"{prefix}inputs_embeds"], documents, rules
    )


def _in_ring_order(
    tensors: dict[str, Tensor], dims: Mapping[str, int | None], description: SequenceDescription
) -> dict[str, Tensor]:
    order = ring_order(description.sequence_length, description.ring_size, description.layout)
    if order is None:
        return tensors
    return {
        name: tensor
        if (dim := dims[name]) is None
        else tensor.index_select(dim, order.to(tensor.device))
        for name, tensor in tensors.items()
    }
