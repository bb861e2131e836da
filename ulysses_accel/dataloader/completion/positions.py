"""A sequence's position ids: the batch's own, or those that the model would have made of the whole
sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ulysses_accel.errors import BatchError
from ulysses_accel.sequence.batch_rules import BatchRules
from ulysses_accel.sequence.documents import Documents
from ulysses_accel.sequence.sharding import default_position_ids, pad_position_ids, pad_sequence_dim


@dataclass(frozen=True)
class Positions:
    """The positions of a sequence before it is padded.

    Args:
        ids: `[B, S]`, or `[planes, B, S]`.
        padding: the position of padding; None for padding that counts on, though never past the
            longest position.
    """

    ids: Tensor
    padding: int | None = None

    @property
    def longest(self) -> int:
        """The greatest position of the whole batch."""
        return int(self.ids.max())

    def padded(self, length: int) -> Tensor:
        """Returns the positions `[..., length]`; padding never leaves the range that the batch
        itself has.
        """
        if self.padding is not None:
            return pad_sequence_dim(self.ids, length, self.padding, dim=-1)
        return pad_position_ids(self.ids, length).clamp(max=self.longest)


def given_positions(given: Tensor, name: str, batch_size: int, length: int) -> Positions:
    """Returns the batch's own positions, one row for each of its rows.

    Args:
        given: `[S]`, `[1, S]`, `[B, S]` or `[planes, B, S]`, signed integers.
        name: the batch's key.
        batch_size: rows B.
        length: tokens S.

    Raises:
        BatchError: another dtype or shape.
    """
    if not given.dtype.is_signed or given.is_floating_point() or given.is_complex():
        raise BatchError(f"'{name}' is {given.dtype}, but positions are counted. Use torch.int64.")
    planes = given.shape[:-2]
    rows_fit = given.shape[-2:-1] in ((), (1,), (batch_size,))
    if not 1 <= given.ndim <= 3 or given.shape[-1] != length or not rows_fit or not all(planes):
        raise BatchError(
            f"'{name}' has shape {list(given.shape)}, but the batch's sequence is [{batch_size}, "
            f"{length}]. "
            "Give [batch, sequence] or, for several position planes, [planes, batch, sequence]; or "
            "leave them out."
        )
    return Positions(given.expand(*planes, batch_size, length))


def made_positions(tokens: Tensor, documents: Documents, rules: BatchRules) -> Positions:
    """Returns the positions of a batch that gives none, as its model counts them.

    Where something marks packed documents each of them counts anew; otherwise a row counts as one,
    padding included or not as the model's rule says.

    Args:
        tokens: `input_ids` `[B, S]` or `inputs_embeds` `[B, S, D]`.
        documents: of the batch.
        rules: how the model counts.
    """
    batch_size, length = tokens.shape[:2]
    if rules.padding_idx is not None:
        counted = (
            documents.token_mask(length)
            if documents.marked
            else torch.ones(batch_size, length, dtype=torch.bool)
        )
        if tokens.ndim == 2:
            counted = counted & (tokens.detach().cpu() != rules.padding_idx)
        ids = _counts(counted, documents) + rules.padding_idx
        return Positions(ids.to(tokens.device), rules.padding_idx)
    if rules.counts_mask:
        ids = _counts(documents.token_mask(length), documents) - 1
        return Positions(ids.to(tokens.device), -1)
    return Positions(_restarting(documents, length).to(tokens.device))


def _counts(counted: Tensor, documents: Documents) -> Tensor:
    """Returns for each counted token its number, from 1 on, in its document or row; 0 for the
    others.
    """
    running = counted.cumsum(1)
    if not documents.marked:
        return running * counted
    before = (
        torch.where(documents.starts(counted.shape[1]), running - counted.long(), 0)
        .cummax(dim=1)
        .values
    )
    return (running - before) * counted


def _restarting(documents: Documents, length: int) -> Tensor:
    """Returns positions `[B, S]` that start at 0 in each marked document; tokens in no document
    count on.
    """
    counting = default_position_ids(len(documents.rows), length)
    if not documents.marked:
        return counting
    first = torch.where(documents.starts(length), counting, 0).cummax(dim=1).values
    return torch.where(documents.spans(length), counting - first, counting)
