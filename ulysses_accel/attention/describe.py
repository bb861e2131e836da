"""A call's sequence as a description, from the documents, lengths and prefixes that the caller
gives.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ulysses_accel.errors import BatchError, ConfigError, ShapeError
from ulysses_accel.sequence.description import SequenceDescription
from ulysses_accel.sequence.documents import find_prefixes
from ulysses_accel.sequence.layout import Layout


def describe(
    document_ids: Tensor | SequenceDescription | None,
    key_lengths: Tensor | None,
    prefix_lengths: Tensor | None,
    shape: tuple[int, int],
    num_shards: int,
    ring_size: int,
    layout: Layout,
) -> SequenceDescription:
    """Returns the description of the whole sequence of one call.

    Args:
        document_ids: `[B, S]`, equal for the tokens of one document, negative for padding; or the
            description itself; or None: each row is one document.
        key_lengths: `[B]` tokens of each row; those behind are padding.
        prefix_lengths: `[B]` or `[B, documents]` first tokens of the row's first or of each
            document that all of its tokens see.
        shape: rows B and tokens S of the query on all ranks.
        num_shards: ranks P that share the sequence.
        ring_size: ranks of the ring among them.
        layout: how the tokens are dealt over the ring.

    Raises:
        ConfigError: a description and further tensors that say the same.
        ShapeError: tensors or a description of another batch.
        BatchError: lengths that the rows or documents have not.
    """
    if isinstance(document_ids, SequenceDescription):
        if key_lengths is not None or prefix_lengths is not None:
            raise ConfigError(
                "a SequenceDescription says padding and prefixes itself: leave out key_lengths and "
                "prefix_lengths, or "
                "give document_ids as a tensor."
            )
        description = document_ids
    elif document_ids is None and key_lengths is None:
        rows = (((0, shape[1]),),) * shape[0]
        description = SequenceDescription(shape[1], num_shards, rows, ring_size, layout)
    else:
        ids = torch.zeros(shape, dtype=torch.long) if document_ids is None else document_ids.cpu()
        if key_lengths is not None:
            ids = _without_padding(ids, key_lengths)
        description = SequenceDescription.from_document_ids(ids, num_shards, ring_size, layout)
    if (description.batch_size, description.sequence_length) != shape:
        raise ShapeError(
            f"the documents are of {description.batch_size} rows with "
            f"{description.sequence_length} tokens, the query "
            f"of {shape[0]} rows with {shape[1]} tokens on {num_shards} ranks. Describe the whole "
            "sequence, each batch "
            f"anew."
        )
    if prefix_lengths is None:
        return description
    if len(prefix_lengths) != description.batch_size:
        raise ShapeError(
            f"prefix_lengths has {len(prefix_lengths)} rows, the batch {description.batch_size}. "
            "Give one row for each."
        )
    prefixes = find_prefixes(prefix_lengths, description.rows, missing_is_zero=True)
    return replace(description, prefixes=prefixes, cache={})


def _without_padding(ids: Tensor, key_lengths: Tensor) -> Tensor:
    lengths = key_lengths.cpu()
    if lengths.shape != ids.shape[:1] or bool(((lengths < 0) | (lengths > ids.shape[1])).any()):
        raise BatchError(
            f"key_lengths={lengths.tolist()} must be one number of tokens, 0 to {ids.shape[1]}, "
            "for each of "
            f"{ids.shape[0]} rows."
        )
    return ids.masked_fill(torch.arange(ids.shape[1]) >= lengths[:, None], -1)
