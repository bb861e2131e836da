"""A sequence's position ids: the batch's, or those that the model would have made of the full
sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ulysses_accel.dataloader.completion.draft import SequenceDraft
from ulysses_accel.errors import BatchError
from ulysses_accel.sequence.batch_rules import BatchRules
from ulysses_accel.sequence.documents import Documents


def place_positions(sequence: SequenceDraft, rules: BatchRules) -> None:
    """Gives the sequence position ids `[B, S]` or `[planes, B, S]`, and says how padding counts.

    Args:
        sequence: its documents are known; may hold `position_ids` `[S]`, `[1, S]`, `[B, S]` or
            `[planes, B, S]`, signed integers.
        rules: how the model counts positions that the batch lacks.

    Raises:
        BatchError: positions of another dtype or shape.
    """
    key = sequence.positions_key
    positions = sequence.tensors.get(key)
    if positions is None:
        sequence.positions_placed = True
        positions = _as_the_model_counts(sequence, rules).to(_tokens(sequence).device)
    else:
        positions = _expanded(positions, key, sequence.batch_size, sequence.length)
    sequence.tensors[key] = positions
    sequence.longest_position = int(positions.max())


def _as_the_model_counts(sequence: SequenceDraft, rules: BatchRules) -> Tensor:
    """Returns position ids `[B, S]`, on the host.

    Where something marks packed documents each of them counts from its start; otherwise a row
    counts as one, padding included or not as the model's rule says.
    """
    documents = sequence.documents
    if rules.padding_idx is not None:
        sequence.padding_position = rules.padding_idx
        return _after_padding_idx(sequence, rules.padding_idx)
    if rules.counts_mask:
        sequence.padding_position = -1
        return _counts(documents.token_mask, documents) - 1
    return _restarting(documents)


def _tokens(sequence: SequenceDraft) -> Tensor:
    """Returns the tokens' ids, or their embeddings where the batch has no ids."""
    ids = sequence.tensors.get(f"{sequence.key_prefix}input_ids")
    return sequence.tensors[f"{sequence.key_prefix}inputs_embeds"] if ids is None else ids


def _expanded(positions: Tensor, key: str, batch_size: int, length: int) -> Tensor:
    """Returns the batch's position ids with one row for each of its rows."""
    if positions.is_floating_point() or positions.is_complex() or not positions.dtype.is_signed:
        raise BatchError(
            f"'{key}' is {positions.dtype}, but positions are counted. Use torch.int64."
        )
    planes = positions.shape[:-2]
    rows_fit = positions.shape[-2:-1] in ((), (1,), (batch_size,))
    is_legal = 1 <= positions.ndim <= 3 and positions.shape[-1] == length
    if not is_legal or not rows_fit or not all(planes):
        raise BatchError(
            f"'{key}' has shape {list(positions.shape)}, but the batch's sequence is "
            f"[{batch_size}, {length}]. Give [batch, sequence] or, for several position planes, "
            "[planes, batch, sequence]; or leave them out."
        )
    return positions.expand(*planes, batch_size, length)


def _after_padding_idx(sequence: SequenceDraft, padding_idx: int) -> Tensor:
    """Returns position ids `[B, S]` that start after `padding_idx`, which padding itself has; as
    RoBERTa's embeddings count them.
    """
    documents, tokens = sequence.documents, _tokens(sequence)
    if documents.marked:
        counted = documents.token_mask
    else:
        counted = torch.ones(sequence.batch_size, sequence.length, dtype=torch.bool)
    if tokens.ndim == 2:
        counted = counted & (tokens.detach().cpu() != padding_idx)
    return _counts(counted, documents) + padding_idx


def _counts(counted: Tensor, documents: Documents) -> Tensor:
    """Returns for each counted token its number, from 1 on, in its marked document, or in its row
    where nothing marks documents; 0 for the others.
    """
    running = counted.cumsum(1)
    if not documents.marked:
        return running * counted
    at_starts = torch.where(documents.starts, running - counted.long(), 0)
    return (running - at_starts.cummax(dim=1).values) * counted


def _restarting(documents: Documents) -> Tensor:
    """Returns positions `[B, S]` that start at 0 in each marked document; tokens in no document
    count on.
    """
    counting = torch.arange(documents.length).repeat(len(documents.rows), 1)
    if not documents.marked:
        return counting
    first = torch.where(documents.starts, counting, 0).cummax(dim=1).values
    return torch.where(documents.spans, counting - first, counting)
