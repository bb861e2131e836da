"""A batch from a collate function, completed for sequence parallel training.

Pure functions on a dict of tensors; no other rank is involved. Documents, positions, labels and
padding are those of the full sequence, and only what is complete is sharded: each rank's part
follows from all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ulysses_accel.dataloader.batch_layout import BatchLayout
from ulysses_accel.dataloader.completion.draft import BatchDraft, SequenceDraft
from ulysses_accel.dataloader.completion.full_batch import FullBatch
from ulysses_accel.dataloader.completion.labels import place_labels
from ulysses_accel.dataloader.completion.masks import number_documents
from ulysses_accel.dataloader.completion.padding import pad_tensors
from ulysses_accel.dataloader.completion.positions import place_positions
from ulysses_accel.dataloader.completion.sequences import packed_pair_error, split_sequences
from ulysses_accel.dataloader.keys import DECODER
from ulysses_accel.errors import BatchError
from ulysses_accel.sequence.batch_rules import PLAIN_RULES, BatchRules, RulesSource, resolve_rules
from ulysses_accel.sequence.description import DESCRIPTION_KEY, SequenceDescription
from ulysses_accel.sequence.documents import (
    CUMULATIVE_KEYS,
    PREFIX_KEY,
    find_documents,
    find_prefixes,
)
from ulysses_accel.sequence.layout import in_ring_order

# They tell documents and prefixes apart, and are of no use to a model that gets a shard.
_READ_HERE = (*CUMULATIVE_KEYS, PREFIX_KEY)


def complete(batch: Any, layout: BatchLayout, rules: BatchRules = PLAIN_RULES) -> FullBatch:
    """Returns the batch with positions, labels, padding and its description.

    Args:
        batch: a mapping with `input_ids` `[B, S]` or `inputs_embeds` `[B, S, D]`; for a model with
            an encoder with `labels` `[B, T]` or `decoder_input_ids` `[B, T]` too. The mapping
            itself is not changed.
        layout: how batches are padded and sharded.
        rules: what the model asks of a batch.

    Raises:
        BatchError: the batch can't be sharded; the message says why and what to change.
    """
    draft = _read(batch)
    number_documents(draft, rules)
    split_sequences(draft, layout, rules)
    for sequence in draft.sequences:
        size = (sequence.batch_size, sequence.length)
        entries = {**draft.entries, **sequence.tensors}
        sequence.documents = find_documents(entries, *size, sequence.key_prefix)
        sequence.prefixes = find_prefixes(sequence.prefix_lengths, sequence.documents.rows)
        place_positions(sequence, rules)
        place_labels(sequence, layout, rules)
        pad_tensors(sequence, layout, rules)
        sequence.tensors = in_ring_order(
            sequence.tensors,
            sequence.dims,
            sequence.padded_length,
            layout.ring_size,
            layout.ring_layout,
        )
        _describe(sequence, layout, rules)
    return _joined(draft)


def _read(batch: Any) -> BatchDraft:
    """Returns the entries of a batch, with the tensors of its sequences told apart."""
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
            f"the batch has a '{DESCRIPTION_KEY}' already: it is one rank's shard, not a full "
            "batch. Wrap each data loader once only."
        )
    for key in ("position_ids", f"{DECODER}position_ids"):
        if not isinstance(batch.get(key), Tensor | None):
            raise BatchError(
                f"'{key}' is a {type(batch[key]).__name__}. Give a tensor, or leave positions out."
            )
    entries = dict(batch)
    tensors = {
        key: value
        for key, value in entries.items()
        if isinstance(value, Tensor) and key not in _READ_HERE
    }
    return BatchDraft(entries, tensors)


def _describe(sequence: SequenceDraft, layout: BatchLayout, rules: BatchRules) -> None:
    """Describes the padded sequence; one of an encoder and a decoder holds no packed documents."""
    documents = sequence.documents
    sequence.description = SequenceDescription(
        sequence.padded_length,
        layout.num_shards,
        documents.rows,
        layout.ring_size,
        layout.ring_layout,
        documents.holes,
        sequence.prefixes,
        sequence.longest_position,
    )
    if rules.decoder_inputs is not None and sequence.description.is_packed:
        name = "decoder" if sequence.key_prefix else "encoder"
        raise packed_pair_error(f"the {name}'s positions or mask mark")


def _joined(draft: BatchDraft) -> FullBatch:
    """Returns the batch of all completed sequences, described by the first of them."""
    tensors = dict(draft.tensors)
    dims: dict[str, int | None] = dict.fromkeys(draft.tensors)
    for sequence in reversed(draft.sequences):
        tensors.update(sequence.tensors)
        dims.update(sequence.dims)
    description, *encoder = (sequence.description for sequence in draft.sequences)
    if encoder:
        description = replace(description, encoder=encoder[0])
    extras = {
        key: value
        for key, value in draft.entries.items()
        if not isinstance(value, Tensor) and key not in _READ_HERE and key not in tensors
    }
    return FullBatch(tensors, dims, extras, description)


@dataclass(frozen=True)
class ShardingCollate:
    """A collate function that returns one rank's part of the batch, for loaders that others build
    from ours.

    Args:
        collate_fn: the wrapped loader's.
        layout: how batches are padded and sharded.
        rank: of this process in its sequence group.
        rules: what the model asks of a batch.
    """

    collate_fn: Callable[[Any], Any]
    layout: BatchLayout
    rank: int
    rules: RulesSource = PLAIN_RULES

    def __call__(self, samples: Any) -> dict[str, Any]:
        """Returns the local batch of the samples."""
        full = complete(self.collate_fn(samples), self.layout, resolve_rules(self.rules))
        batch = full.with_functions(self.layout, self.rank).local_batch(self.rank)
        return {
            key: value.clone() if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }
