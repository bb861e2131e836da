"""Cross-attention over a sharded sequence: the queries are one sequence's, keys and values
another's of its own length.

Where every rank has the other sequence in full, attention is local. Otherwise both are exchanged,
tokens for heads. Shapes: B = rows, H / K = query / key-value heads, P = ranks, T / S = tokens of
the two sequences, D / Dv = head sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ulysses_accel.attention.heads import HeadSplit, Range
from ulysses_accel.distributed.collectives import all_to_all
from ulysses_accel.errors import ShapeError
from ulysses_accel.sequence.description import SequenceDescription, visible_rows
from ulysses_accel.sequence.documents import joined
from ulysses_accel.sequence.layout import Run, runs


class _TokensForHeads(torch.autograd.Function):
    """[B, N, s, D] of each tensor -> [B, n, P * s, D], n heads of this rank; one message for all
    tensors.
    """

    @staticmethod
    def forward(
        ctx: Any, group: ProcessGroup, heads: list[list[Range]], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.heads, ctx.shapes = group, heads, [tensor.shape for tensor in tensors]
        batch, length = tensors[0].shape[0], tensors[0].shape[2]
        # [B, n, s, D] -> [s, B, n * D]
        parts = [
            torch.cat(
                [
                    t[:, low:high].permute(2, 0, 1, 3).flatten(2)
                    for t, (low, high) in zip(tensors, ranges)
                ],
                dim=2,
            )
            for ranges in heads
        ]
        local, size = parts[group.rank()].numel(), len(parts)
        send = torch.cat([part.flatten() for part in parts])
        received = all_to_all(send, group, [part.numel() for part in parts], [local] * size)
        counts = [high - low for low, high in heads[group.rank()]]
        widths = [count * tensor.shape[3] for count, tensor in zip(counts, tensors)]
        # [P * s, B, n * D] -> [B, n, P * s, D]
        by_tensor = received.view(size * length, batch, -1).split(widths, dim=2)
        return tuple(
            part.unflatten(2, (count, -1)).permute(1, 2, 0, 3)
            for part, count in zip(by_tensor, counts)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        heads, size, batch = ctx.heads, len(ctx.heads), ctx.shapes[0][0]
        length = ctx.shapes[0][2]
        # [B, n, P * s, D] -> [P * s, B, n * D]
        send = torch.cat([grad.permute(2, 0, 1, 3).flatten(2) for grad in grads], dim=2)
        widths = [
            [(high - low) * shape[3] for (low, high), shape in zip(ranges, ctx.shapes)]
            for ranges in heads
        ]
        sizes = [length * batch * sum(each) for each in widths]
        received = all_to_all(send.flatten(), ctx.group, [send.numel() // size] * size, sizes)
        totals = [send.new_zeros(shape) for shape in ctx.shapes]
        for rank, message in enumerate(received.split(sizes)):
            parts = message.view(length, batch, -1).split(widths[rank], dim=2)
            for total, part, (low, high) in zip(totals, parts, heads[rank]):
                # [s, B, n * D] -> [B, n, s, D]; a key/value head may be on several ranks.
                total[:, low:high] += part.unflatten(2, (high - low, -1)).permute(1, 2, 0, 3)
        return None, None, *totals


def sequences_to_heads(
    query: Tensor, key: Tensor, value: Tensor, group: ProcessGroup, split: HeadSplit
) -> tuple[Tensor, Tensor, Tensor]:
    """Exchanges tokens for heads in two collectives, one for each sequence.

    Args:
        query: `[B, H, T / P, D]`, this rank's tokens of all heads.
        key: `[B, K, S / P, D]`.
        value: `[B, K, S / P, Dv]`.
        group: the P ranks of both sequences.
        split: how the heads are partitioned.

    Returns:
        `[B, h, T, D]`, `[B, k, S, D]`, `[B, k, S, Dv]`: all tokens of this rank's heads.
    """
    queries = [[split.queries(rank)] for rank in range(split.size)]
    keys = [[split.keys(rank)] * 2 for rank in range(split.size)]
    (query,) = _TokensForHeads.apply(group, queries, query)  # type: ignore[no-untyped-call]
    key, value = _TokensForHeads.apply(group, keys, key, value)  # type: ignore[no-untyped-call]
    return query, key, value


def encoder_of(description: SequenceDescription, key: Tensor) -> SequenceDescription:
    """Returns the sequence that cross-attention reads; all of `key` `[B, K, S, D]` where the batch
    describes none.
    """
    if description.encoder is not None:
        return description.encoder
    cache_key = ("encoder", key.shape[2])
    if cache_key not in description.cache:
        rows = (((0, key.shape[2]),),) * description.batch_size
        description.cache[cache_key] = SequenceDescription(key.shape[2], 1, rows)
    encoder: SequenceDescription = description.cache[cache_key]
    return encoder


def check_lengths(
    query: Tensor, key: Tensor, description: SequenceDescription, encoder: SequenceDescription
) -> None:
    """Raises ShapeError where the tensors are not of the described sequences, or these are sharded
    in different ways.
    """
    lengths = (query.shape[2], key.shape[2])
    expected = (description.shard_length, encoder.shard_length)
    if encoder.batch_size != description.batch_size:
        raise ShapeError(
            f"the sequence that cross-attention reads has {encoder.batch_size} rows, the one that "
            f"reads it {description.batch_size}. Describe both of the same batch."
        )
    degrees = (description.num_shards, description.ring_size)
    if lengths != expected or (
        encoder.num_shards > 1 and (encoder.num_shards, encoder.ring_size) != degrees
    ):
        raise ShapeError(
            f"cross-attention got {lengths[0]} queries and {lengths[1]} keys on a rank, of "
            f"sequences described as {description.sequence_length} tokens on "
            f"{description.num_shards} ranks (ring of {description.ring_size}) and "
            f"{encoder.sequence_length} on {encoder.num_shards} (ring of {encoder.ring_size}). "
            "Describe both as they are sharded; an encoder's sequence of one shard is full on "
            "every rank."
        )


def local_description(description: SequenceDescription, shard: int) -> SequenceDescription:
    """Returns one rank's tokens as a sequence by themselves: a row's tokens without padding, by
    local indices.

    Args:
        description: of the full sequence.
        shard: which of its shards the rank holds.
    """
    cache_key = ("local", shard)
    if cache_key not in description.cache:
        local_runs = _shard_runs(description, shard)
        rows = []
        for row in visible_rows(description):
            segments = []
            for run in local_runs:
                for segment in row:
                    low, high = run.indices_of(*segment)
                    if low < high:
                        segments.append((run.offset + low, run.offset + high))
            rows.append(joined(segments))
        description.cache[cache_key] = SequenceDescription(description.shard_length, 1, tuple(rows))
    cached: SequenceDescription = description.cache[cache_key]
    return cached


def _shard_runs(description: SequenceDescription, shard: int) -> list[Run]:
    """Returns the tokens of a shard, a part of its ring rank's runs, with local offsets."""
    ulysses_size = description.num_shards // description.ring_size
    ring_rank, part = divmod(shard, ulysses_size)
    first, last = part * description.shard_length, (part + 1) * description.shard_length
    local_runs = []
    for run in runs(
        description.sequence_length, description.ring_size, ring_rank, description.layout
    ):
        low, high = max(first, run.offset), min(last, run.offset + run.count)
        if low < high:
            start = run.start + (low - run.offset) * run.step
            local_runs.append(Run(start, run.step, high - low, low - first))
    return local_runs
