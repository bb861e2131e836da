"""A batch on its way through the steps that complete it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ulysses_accel.sequence.description import SequenceDescription
from ulysses_accel.sequence.documents import Documents, Prefixes


@dataclass
class SequenceDraft:
    """One sequence of a batch, and what the steps have filled in.

    Args:
        key_prefix: of its tokens, mask and positions: empty, or `decoder_`.
        batch_size: rows B.
        length: tokens S, before padding.
        tensors: by the batch's keys. Each step replaces what it completes: positions and labels
            first, all of them padded after that, in the order of the shards at the end.
        prefix_lengths: of its documents, as the batch says them; None where it has no prefixes.
        dims: for each tensor its sequence dim, None when every rank gets all of it.
        documents: where they lie in each row.
        prefixes: for each document how many of its first tokens all of its tokens see.
        positions_placed: whether the batch had no position ids, so that they were counted here.
        longest_position: the greatest position id of the batch.
        padding_position: the position id of padding; None for padding that counts on, though never
            past the longest position.
        padded_length: tokens after padding.
        description: of the padded sequence.
    """

    key_prefix: str
    batch_size: int
    length: int
    tensors: dict[str, Tensor]
    prefix_lengths: Any = None
    dims: dict[str, int | None] = field(default_factory=dict)
    documents: Documents = field(init=False)
    prefixes: Prefixes = ()
    positions_placed: bool = False
    longest_position: int = field(init=False)
    padding_position: int | None = None
    padded_length: int = field(init=False)
    description: SequenceDescription = field(init=False)

    @property
    def positions_key(self) -> str:
        """The key of its position ids."""
        return f"{self.key_prefix}position_ids"


@dataclass
class BatchDraft:
    """A batch that is not complete yet.

    Args:
        entries: all of the batch, as the collate function returned it.
        tensors: those of its tensors that no sequence has taken; every rank gets all of them.
        sequences: one, or a decoder's and after it, where the encoder reads tokens, the encoder's.
    """

    entries: dict[str, Any]
    tensors: dict[str, Tensor]
    sequences: list[SequenceDraft] = field(default_factory=list)
