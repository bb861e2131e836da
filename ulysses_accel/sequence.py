"""Pure layout arithmetic of a sharded sequence: padding, documents, label shift, shard and unshard.

Nothing here talks to another rank or to a model. A batch is described once, on the host, by a `SequenceDescription`;
the attention strategies and the data loader meet only in this file. Invariant: `unshard(shard(x)) == x`, every token of
every sample is on exactly one rank.

Shapes: B = batch rows, S = tokens of the whole (padded) sequence, P = ranks that share one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, zip_longest
from typing import Any

import torch
from torch import Tensor

from ulysses_accel.errors import BatchError, ConfigError, ShapeError
from ulysses_accel.sequence_chunks import chunk_documents
from ulysses_accel.sequence_layout import Layout

IGNORE_INDEX = -100
DESCRIPTION_KEY = "sequence_description"
_SHARD_MARK = "ulysses_accel_shard"

Segment = tuple[int, int]
Rows = tuple[tuple[Segment, ...], ...]


@dataclass(frozen=True)
class SequenceDescription:
    """What every layer must know of the whole sequence that its shard was cut from.

    Args:
        sequence_length: tokens S of the whole sequence on all ranks together, padding included.
        num_shards: ranks P that share the sequence; each holds S / P consecutive tokens.
        rows: for each batch row its documents as (start, stop) token positions, in order; tokens outside of every
            document are padding.
        ring_size: how many of the shards' cuts lie between ranks of a ring; the rest between Ulysses ranks.
        layout: how the tokens are dealt over the ring.
        holes: for each row the padding that lies inside of its documents, as (start, stop); no token sees it, while the
            tokens around it see each other. Empty where no row has any.
        prefixes: for each row and document how many of its first tokens all of its tokens see, whatever their order
            (prefix language modelling). Empty where no document has any.
        longest_position: the greatest position id of the whole batch; None where it is not known.
        encoder: the sequence that cross-attention reads, of one shard where every rank has all of it; None where it has
            no padding and every rank has all of it, or where there is no cross-attention.
        cache: what strategies derive once for a batch and use in every layer.
    """

    sequence_length: int
    num_shards: int
    rows: Rows
    ring_size: int = 1
    layout: Layout = "contiguous"
    holes: Rows = ()
    prefixes: tuple[tuple[int, ...], ...] = ()
    longest_position: int | None = None
    encoder: SequenceDescription | None = None
    cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_document_ids(
        cls, document_ids: Tensor, num_shards: int, ring_size: int = 1, layout: Layout = "contiguous"
    ) -> SequenceDescription:
        """Describes a batch by an id for each token.

        Args:
            document_ids: `[B, S]`, equal for consecutive tokens of one document, negative for padding.
            num_shards: ranks P that share the sequence.
            ring_size: ranks of the ring among them.
            layout: how the tokens are dealt over the ring.
        """
        ids = document_ids.cpu()
        counting = torch.arange(ids.shape[1]).expand_as(ids)
        starts = torch.ones_like(ids, dtype=torch.bool)
        starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
        # Positions that count from each document's first token, as `find_documents` reads them.
        first = torch.where(starts, counting, 0).cummax(dim=1).values
        return cls(ids.shape[1], num_shards, find_documents(counting - first, ids >= 0), ring_size, layout)

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return len(self.rows)

    @property
    def shard_length(self) -> int:
        """Tokens of the sequence on one rank."""
        return self.sequence_length // self.num_shards

    @property
    def is_padded_left(self) -> bool:
        """True when a row begins with padding."""
        return any(row and row[0][0] > 0 for row in self.rows)

    @property
    def is_packed(self) -> bool:
        """True when a row holds more than one document."""
        return any(len(row) > 1 for row in self.rows)

    @property
    def is_plain_causal(self) -> bool:
        """True when causal attention over the whole row is exact: one document from the first token on.

        Padding behind the only document is seen by no counted token under a causal mask.
        """
        return not self.has_holes and all(len(row) == 1 and row[0][0] == 0 for row in self.rows)

    @property
    def has_holes(self) -> bool:
        """True when padding lies inside of some document."""
        return any(self.holes)

    @property
    def has_prefixes(self) -> bool:
        """True when some document has a prefix that all of its tokens see."""
        return any(any(lengths) for lengths in self.prefixes)

    @property
    def is_dense(self) -> bool:
        """True when every row is one document without padding, so that no mask of any kind is needed."""
        return not self.has_holes and all(row == ((0, self.sequence_length),) for row in self.rows)

    def chunked(self, size: int) -> SequenceDescription:
        """Returns the description whose documents end at every multiple of `size` tokens too, made once for a batch.

        Args:
            size: tokens of a chunk, counted from each document's first token; padding before it does not count.

        Raises:
            ConfigError: the size is not at least 1.
        """
        if size < 1:
            raise ConfigError(f"chunks of {size} tokens (attention_chunk_size) can't be cut. Use at least 1.")
        wanted = ("chunked", size)
        if wanted not in self.cache:
            cut = [
                chunk_documents(documents, holes, prefixes, size)
                for documents, holes, prefixes in zip_longest(self.rows, self.holes, self.prefixes, fillvalue=())
            ]
            rows, holes, prefixes = (tuple(part) for part in zip(*cut))
            self.cache[wanted] = replace(self, rows=rows, holes=holes, prefixes=prefixes, cache={})
        description: SequenceDescription = self.cache[wanted]
        return description

    def to(self, *_args: Any, **_kwargs: Any) -> SequenceDescription:
        """Returns itself: a description lives on the host, and batches are moved by calling `.to` on each entry."""
        return self


def next_multiple(length: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `length`, both in tokens."""
    return -(-length // multiple) * multiple


def shard(tensor: Tensor, num_shards: int, rank: int, dim: int = 1) -> Tensor:
    """Returns the part of a tensor that one rank holds, as a view.

    Args:
        tensor: any tensor whose `dim` is the sequence, `[B, S, ...]` by default.
        num_shards: ranks P that share the sequence; must divide S.
        rank: which of them, 0 to P - 1.
        dim: the sequence dim of `tensor`.

    Returns:
        `[B, S / P, ...]`, tokens `rank * S / P` up to the next rank's first.

    Raises:
        ShapeError: `num_shards` does not divide the sequence.
    """
    length = tensor.shape[dim]
    if length % num_shards:
        raise ShapeError(
            f"{num_shards} ranks do not divide a sequence of {length} tokens (dim {dim} of shape "
            f"{tuple(tensor.shape)}). Pad it to {next_multiple(length, num_shards)} tokens."
        )
    return tensor.narrow(dim, rank * (length // num_shards), length // num_shards)


def mark_shard(value: Any) -> Any:
    """Returns a tensor marked as one rank's part of a batch, so that it is known where its description is missing."""
    if isinstance(value, Tensor):
        setattr(value, _SHARD_MARK, True)
    return value


def is_marked_shard(value: Any) -> bool:
    """Returns whether a value is a tensor from `mark_shard`, or a view of one; copies are not known."""
    return isinstance(value, Tensor) and (hasattr(value, _SHARD_MARK) or hasattr(value._base, _SHARD_MARK))


def unshard(shards: Sequence[Tensor], dim: int = 1) -> Tensor:
    """Returns the whole tensor from all ranks' shards, in rank order: the inverse of `shard`."""
    return torch.cat(list(shards), dim=dim)


def pad_sequence_dim(tensor: Tensor, length: int, value: float | bool, dim: int = 1) -> Tensor:
    """Returns `tensor` with its sequence dim padded at the end to `length` tokens; itself when nothing is missing."""
    missing = length - tensor.shape[dim]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_full(shape, value)], dim=dim)


def pad_position_ids(position_ids: Tensor, length: int) -> Tensor:
    """Returns position ids `[..., S]` padded to `length`, each row counting on from its last position."""
    missing = length - position_ids.shape[-1]
    if missing == 0:
        return position_ids
    steps = torch.arange(1, missing + 1, dtype=position_ids.dtype, device=position_ids.device)
    return torch.cat([position_ids, position_ids[..., -1:] + steps], dim=-1)


def default_position_ids(batch_size: int, length: int, device: torch.device | None = None) -> Tensor:
    """Returns positions `[B, S]` that count 0 to S - 1 in each row, as transformers does for a batch without them."""
    return torch.arange(length, device=device).unsqueeze(0).expand(batch_size, length).contiguous()


def document_starts(position_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Returns where a document begins: at the first counted token, and wherever positions do not go up by one.

    Args:
        position_ids: `[B, S]`.
        attention_mask: `[B, S]`, nonzero for tokens, zero for padding; None where there is no padding.

    Returns:
        `[B, S]` of bool, False on padding.
    """
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if attention_mask is None:
        return starts
    valid = attention_mask.to(torch.bool)
    starts[:, 1:] |= ~valid[:, :-1]
    return starts & valid


def find_documents(position_ids: Tensor, attention_mask: Tensor | None = None) -> Rows:
    """Returns each row's documents as (start, stop) pairs; a hole of padding inside a row ends a document.

    Args:
        position_ids: `[B, S]`, on the host.
        attention_mask: `[B, S]` or None, as for `document_starts`.

    Returns:
        One tuple for each row.
    """
    length = position_ids.shape[1]
    starts = document_starts(position_ids, attention_mask)
    ends = torch.ones_like(starts)
    ends[:, :-1] = starts[:, 1:]
    if attention_mask is not None:
        valid = attention_mask.to(torch.bool)
        ends[:, :-1] |= ~valid[:, 1:]
        ends &= valid
    rows = []
    for row_starts, row_ends in zip(starts, ends):
        first = row_starts.nonzero().flatten().tolist()
        last = row_ends.nonzero().flatten().tolist()
        rows.append(tuple((a, b + 1) for a, b in zip(first, last)))
    assert all(0 <= a < b <= length for row in rows for a, b in row)
    return tuple(rows)


def documents_from_lengths(cu_seq_lens: Sequence[int], length: int) -> tuple[Segment, ...]:
    """Returns one row's documents from cumulative lengths `[0, end of first, end of second, ...]`.

    Args:
        cu_seq_lens: as flash attention takes them; the last may lie before `length`, what follows is padding.
        length: tokens of the row.

    Raises:
        BatchError: the lengths do not start at 0, go down, or pass the end of the row.
    """
    bounds = [int(bound) for bound in cu_seq_lens]
    if not bounds or bounds[0] != 0 or bounds[-1] > length or any(a > b for a, b in pairwise(bounds)):
        raise BatchError(
            f"cumulative document lengths {bounds[:8]}{'...' if len(bounds) > 8 else ''} do not fit a row of {length} "
            f"tokens. They must start at 0, never go down, and end at {length} at most."
        )
    return tuple((a, b) for a, b in pairwise(bounds) if b > a)


def shift_labels(labels: Tensor, rows: Rows, ignore_index: int = IGNORE_INDEX, holes: Rows = ()) -> Tensor:
    """Returns labels moved one token to the left, so that a token's label is its successor in the same document.

    Args:
        labels: `[B, S]`, unshifted, as transformers' data collators give them.
        rows: the documents of each row.
        ignore_index: the label of tokens that don't count.
        holes: the padding inside of each row's documents; empty where there is none.

    Returns:
        `[B, S]`; the last token of every document, the last one before a hole, and padding, have `ignore_index`.
    """
    shifted = torch.full_like(labels, ignore_index)
    for row, segments in enumerate(rows):
        # One copy for the row, then the few seams: documents are many, seams are one token each.
        shifted[row, :-1] = labels[row, 1:]
        last = torch.tensor([stop - 1 for _, stop in segments], dtype=torch.long, device=labels.device)
        shifted[row, last] = ignore_index
        _ignore_padding(shifted[row], segments, ignore_index)
    for row, gaps in enumerate(holes):
        for start, stop in gaps:
            # A hole begins behind its document's first token, so there is one before it.
            shifted[row, start - 1 : stop] = ignore_index
    return shifted


def _ignore_padding(row: Tensor, segments: tuple[Segment, ...], ignore_index: int) -> None:
    """Sets `ignore_index` on every token of the row that lies in no document."""
    end = 0
    for start, stop in segments:
        if start > end:
            row[end:start] = ignore_index
        end = stop
    row[end:] = ignore_index


def num_counted(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Returns how many labels count, as an integer scalar on the labels' device (no host synchronization)."""
    return (labels != ignore_index).sum()
