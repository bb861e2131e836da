"""Cross-attention over a sharded sequence: the queries are one sequence's, keys and values
another's of its own length.

Where every rank has all of the other sequence, attention is local. Otherwise both are exchanged,
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
        own, size = parts[group.rank()].numel(), len(parts)
        send = torch.cat([part.flatten() for part in parts])
        received = all_to_all(send, group, [part.numel() for part in parts], [own] * size)
        counts = [high - low for low, high in heads[group.rank()]]
        widths = [count * tensor.shape[3] for count, tensor in zip(counts, tensors)]
        # [P * s, B, n * D] -> [B, n, P * s, D]
        found = received.view(size * length, batch, -1).split(widths, dim=2)
        return tuple(
            part.unflatten(2, (count, -1)).permute(1, 2, 0, 3) for part, count in zip(found, counts)
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
                # [s, B, n * D] -> [B, n, s, D]; a key/value head may have several readers.
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
        split: how the heads are dealt.

    Returns:
        `[B, h, T, D]`, `[B, k, S, D]`, `[B, k, S, Dv]`: all tokens of this rank's heads.
    """
    queries = [[split.queries(rank)] for rank in range(split.size)]
    keys = [[split.keys(rank)] * 2 for rank in range(split.size)]
    (query,) = _TokensForHeads.apply(group, queries, query)  # type: ignore[no-untyped-call]
    key, value = _TokensForHeads.apply(group, keys, key, value)  # type: ignore[no-untyped-call]
    return query, key, value


def encoder_of(description: SequenceDescription, key: Tensor) -> SequenceDescription:
    """Returns the sequence that cross-attention reads; where the batch does not say, all of `key`
    `[B, K, S, D]`.
    """
    if description.encoder is not None:
        return description.encoder
    wanted = ("encoder", key.shape[2])
    if wanted not in description.cache:
        rows = (((0, key.shape[2]),),) * description.batch_size
        description.cache[wanted] = SequenceDescription(key.shape[2], 1, rows)
    encoder: SequenceDescription = description.cache[wanted]
    return encoder


def check_lengths(
    query: Tensor, key: Tensor, description: SequenceDescription, encoder: SequenceDescription
) -> None:
    """Raises ShapeError where the tensors are not of the described sequences, or these are dealt in
    different ways.
    """
    held, expected = (
        (query.shape[2], key.shape[2]),
        (description.shard_length, encoder.shard_length),
    )
    if encoder.batch_size != description.batch_size:
        raise ShapeError(
            f"the sequence that cross-attention reads has {encoder.batch_size} rows, the one that "
            "reads it "
            f"{description.batch_size}. Describe both of the same batch."
        )
    dealt = (description.num_shards, description.ring_size)
    if held != expected or (
        encoder.num_shards > 1 and (encoder.num_shards, encoder.ring_size) != dealt
    ):
        raise ShapeError(
            f"cross-attention got {held[0]} queries and {held[1]} keys on a rank, of sequences "
            "described as "
            f"{description.sequence_length} tokens on {description.num_shards} ranks (ring of "
            f"{description.ring_size}) "
            f"and {encoder.sequence_length} on {encoder.num_shards} (ring of {encoder.ring_size}). "
            "Describe both as "
            f"they are dealt; an encoder's sequence of one shard is whole on every rank."
        )


def local_description(description: SequenceDescription, shard: int) -> SequenceDescription:
    """Returns one rank's tokens as a sequence of their own: a row's tokens without padding, in
    local places.

    Args:
        description: of the whole sequence.
        shard: which of its shards the rank holds.
    """
    wanted = ("local", shard)
    if wanted not in description.cache:
        rows = visible_rows(description)
        own = _shard_runs(description, shard)
        local = tuple(
            joined(
                (run.offset + low, run.offset + high)
                for run in own
                for low, high in (run.indices_of(*segment) for segment in row)
                if low < high
            )
            for row in rows
        )
        description.cache[wanted] = SequenceDescription(description.shard_length, 1, local)
    found: SequenceDescription = description.cache[wanted]
    return found


def _shard_runs(description: SequenceDescription, shard: int) -> list[Run]:
    """Returns the tokens of a shard: its part of its ring place's runs, in local places."""
    ulysses_size = description.num_shards // description.ring_size
    place, part = divmod(shard, ulysses_size)
    first, last = part * description.shard_length, (part + 1) * description.shard_length
    found = []
    for run in runs(description.sequence_length, description.ring_size, place, description.layout):
        low, high = max(first, run.offset), min(last, run.offset + run.count)
        if low < high:
            found.append(
                Run(run.start + (low - run.offset) * run.step, run.step, high - low, low - first)
            )
    return found
