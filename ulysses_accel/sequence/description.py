"""What a sharded sequence is: its documents, padding and layout, described once on the host.

Nothing here talks to another rank or to a model. The attention strategies and the data loader meet
only in this folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

from torch import Tensor

from ulysses_accel.errors import ConfigError
from ulysses_accel.sequence.documents import (
    Rows,
    Segment,
    document_pieces,
    documents_of_ids,
    joined,
)
from ulysses_accel.sequence.layout import Layout

DESCRIPTION_KEY = "sequence_description"


@dataclass(frozen=True)
class SequenceDescription:
    """What every layer must know of the full sequence that its shard is a part of.

    Args:
        sequence_length: tokens S of the full sequence on all ranks together, padding included.
        num_shards: ranks P that share the sequence; each holds S / P consecutive tokens.
        rows: for each batch row its documents as (start, stop) token positions, in order; tokens
            outside of every document are padding.
        ring_size: size of the ring; each of its members is a group of P / ring_size Ulysses ranks.
        layout: how the tokens are distributed over the ring.
        holes: for each row the padding that lies inside of its documents, as (start, stop); no
            token sees it, while the tokens around it see each other. Empty where no row has any.
        prefixes: for each row and document how many of its first tokens all of its tokens see,
            whatever their order (prefix language modelling). Empty where no document has any.
        longest_position: the greatest position id of the full batch; None where it is not known.
        encoder: the sequence that cross-attention reads, of one shard where every rank has all of
            it; None where it has no padding and every rank has all of it, or where there is no
            cross-attention.
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
        cls,
        document_ids: Tensor,
        num_shards: int,
        ring_size: int = 1,
        layout: Layout = "contiguous",
    ) -> SequenceDescription:
        """Describes a batch by an id for each token.

        Args:
            document_ids: `[B, S]`, equal for consecutive tokens of one document, negative for
                padding.
            num_shards: ranks P that share the sequence.
            ring_size: ranks of the ring among them.
            layout: how the tokens are distributed over the ring.
        """
        ids = document_ids.cpu()
        rows = documents_of_ids(ids).rows
        return cls(ids.shape[1], num_shards, rows, ring_size, layout)

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
        """True when causal attention over the full row is exact: one document from the first token
        on.

        Padding after the only document is seen by no counted token under a causal mask.
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
        """True when every row is one document without padding, so that no mask of any kind is
        needed.
        """
        return not self.has_holes and all(row == ((0, self.sequence_length),) for row in self.rows)

    def chunked(self, size: int) -> SequenceDescription:
        """Returns the description whose documents end at every multiple of `size` tokens too,
        computed once for a batch.

        Args:
            size: tokens of a chunk, counted from each document's first token; padding before it
                does not count.

        Raises:
            ConfigError: the size is not at least 1.
        """
        if size < 1:
            raise ConfigError(
                f"chunks of {size} tokens (attention_chunk_size) are not possible. Use at least 1."
            )
        key = ("chunked", size)
        if key not in self.cache:
            chunked = [
                chunk_documents(documents, holes, prefixes, size)
                for documents, holes, prefixes in zip_longest(
                    self.rows, self.holes, self.prefixes, fillvalue=()
                )
            ]
            rows, holes, prefixes = (tuple(part) for part in zip(*chunked))
            self.cache[key] = replace(self, rows=rows, holes=holes, prefixes=prefixes, cache={})
        description: SequenceDescription = self.cache[key]
        return description

    def to(self, *_args: Any, **_kwargs: Any) -> SequenceDescription:
        """Returns itself: a description lives on the host, and batches are moved by calling `.to`
        on each entry.
        """
        return self


def split_at_multiples(
    segments: tuple[Segment, ...], origins: tuple[int, ...], size: int
) -> tuple[Segment, ...]:
    """Returns each segment split at every multiple of `size` tokens from its origin on, which lies
    at or before it.
    """
    pieces = []
    for (start, stop), origin in zip(segments, origins):
        while start < stop:
            end = min(stop, start + size - (start - origin) % size)
            pieces.append((start, end))
            start = end
    return tuple(pieces)


def chunk_documents(
    documents: tuple[Segment, ...], holes: tuple[Segment, ...], prefixes: tuple[int, ...], size: int
) -> tuple[tuple[Segment, ...], tuple[Segment, ...], tuple[int, ...]]:
    """Returns one row's documents, holes and prefixes, split every `size` tokens from each
    document's first one on.

    Args:
        documents: (start, stop) token positions.
        holes: padding inside of the documents.
        prefixes: for each document the length of its prefix; empty where none has any.
        size: tokens of a chunk.
    """
    starts = tuple(start for start, _ in documents)
    homes = tuple(max(start for start in starts if start <= hole_start) for hole_start, _ in holes)
    chunked = split_at_multiples(documents, starts, size)
    lengths = []
    for (start, stop), prefix in zip(documents, prefixes):
        chunks = split_at_multiples(((start, stop),), (start,), size)
        lengths += [min(max(0, start + prefix - first), last - first) for first, last in chunks]
    return chunked, split_at_multiples(holes, homes, size), tuple(lengths)


def visible_rows(description: SequenceDescription) -> Rows:
    """Returns for each row its tokens that are no padding, in the fewest segments; computed once
    for a batch.
    """
    if "visible" not in description.cache:
        description.cache["visible"] = tuple(
            joined(piece for pieces in document_pieces(documents, holes) for piece in pieces)
            for documents, holes in zip_longest(description.rows, description.holes, fillvalue=())
        )
    rows: Rows = description.cache["visible"]
    return rows
