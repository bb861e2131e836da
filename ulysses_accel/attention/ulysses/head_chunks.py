"""Ulysses in head chunks: a rank's heads are exchanged and computed a few at a time, in less
memory.

The exchange of one chunk overlaps with the attention of the previous one, in forward and backward.
Where a rank has fewer key/value heads than chunks, a key/value head is sent with the first chunk of
its query heads and held for the others, so that as many bytes are sent as without chunks. Shapes: B
= rows, H / K = query / key-value heads, P = ranks, s = S / P tokens, D / Dv = head sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ulysses_accel.attention.heads import HeadSplit, Range
from ulysses_accel.attention.kernels.limits import MAX_ELEMENTS
from ulysses_accel.attention.ulysses.exchange import (
    Counts,
    Sizes,
    SplitMessage,
    check_exchange,
    message_parts,
)
from ulysses_accel.attention.ulysses.overlap import (
    AsyncExchange,
    JoinByHeads,
    SharedOutput,
    SplitByHeads,
    StartExchange,
    WaitForExchange,
)
from ulysses_accel.errors import ShapeError

Attend = Callable[[Tensor, Tensor, Tensor, Range], Tensor]
Keys = tuple[Tensor, ...]


def min_head_chunks(batch: int, sequence_length: int, heads: int, head_dim: int) -> int:
    """Returns the least number of head chunks with which no tensor of a core attention call reaches
    2^31 elements.

    Args:
        batch: rows B.
        sequence_length: tokens S of the call.
        heads: query heads of a rank.
        head_dim: size of a head; the larger one where that of values differs.

    Returns:
        At most one chunk for each head, also where a single head is too large.
    """
    head = batch * sequence_length * head_dim
    fitting = max(1, MAX_ELEMENTS // max(1, head))
    # The largest of n chunks has ceil(heads / n) heads.
    return max(1, -(-heads // fitting))


@dataclass(frozen=True)
class HeadChunks:
    """Which heads of each rank are in which chunk.

    Args:
        split: the heads of each rank.
        number: of chunks on each rank.
    """

    split: HeadSplit
    number: int

    def __post_init__(self) -> None:
        fewest = min(self.split.counts(rank)[0] for rank in range(self.split.size))
        if not 1 <= self.number <= fewest:
            legal = ", ".join(str(number) for number in range(1, fewest + 1))
            raise ShapeError(
                f"sp_head_chunks={self.number} can't split the {fewest} query heads of a rank "
                f"(num_attention_heads={self.split.num_heads} on sp_size={self.split.size}). Use "
                f"one of: {legal}."
            )

    @cached_property
    def _splits(self) -> tuple[HeadSplit, ...]:
        """For each rank, how its heads are distributed over chunks: as heads over ranks."""
        counts = [self.split.counts(rank) for rank in range(self.split.size)]
        return tuple(HeadSplit(self.number, queries, keys) for queries, keys, _ in counts)

    def queries(self, chunk: int, rank: int) -> Range:
        """Returns the query heads (from, to) of a rank's chunk."""
        return _moved(self._splits[rank].queries(chunk), self.split.queries(rank)[0])

    def keys(self, chunk: int, rank: int) -> Range:
        """Returns the key/value heads (from, to) that are sent with a rank's chunk; none where the
        rank has them from an earlier chunk.
        """
        keys = self._splits[rank].keys(chunk)
        if chunk > 0 and self._splits[rank].keys(chunk - 1) == keys:
            keys = (keys[1], keys[1])
        return _moved(keys, self.split.keys(rank)[0])

    def counts(self, chunk: int, rank: int) -> Counts:
        """Returns the number of query, key and value heads that are sent to a rank in a chunk."""
        queries, keys = self.queries(chunk, rank), self.keys(chunk, rank)
        return queries[1] - queries[0], keys[1] - keys[0], keys[1] - keys[0]

    def all_queries(self) -> list[Range]:
        """Returns the query heads of each chunk and rank, ordered by chunk, then by rank; each head
        is in one of them.
        """
        return [
            self.queries(chunk, rank)
            for chunk in range(self.number)
            for rank in range(self.split.size)
        ]

    def keys_in(self, chunk: int) -> list[Range]:
        """Returns the different ranges of key/value heads that are sent in a chunk; each head is
        sent in one chunk.
        """
        ranges = {self.keys(chunk, rank) for rank in range(self.split.size)}
        return sorted(heads for heads in ranges if heads[0] < heads[1])


def _moved(heads: Range, first: int) -> Range:
    return heads[0] + first, heads[1] + first


class _Pack(torch.autograd.Function):
    """A chunk's query, key and value heads, [B, s, n, D] each -> one flat message, [s, B, width]
    for each rank.
    """

    @staticmethod
    def forward(ctx: Any, pipeline: _Pipeline, chunk: int, *pieces: Tensor) -> Tensor:
        ctx.pipeline, ctx.chunk = pipeline, chunk
        send = pieces[0].new_empty(sum(pipeline.message_sizes(chunk)))
        for parts, indices in zip(pipeline.messages(chunk, send), pipeline.piece_indices(chunk)):
            for part, index in zip(parts, indices):
                if index is not None:
                    # [B, s, n, D] -> [s, B, n, D]
                    part.copy_(pieces[index].transpose(0, 1))
        return send

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pipeline, chunk = ctx.pipeline, ctx.chunk
        pieces: dict[int, Tensor] = {}
        for parts, indices in zip(pipeline.messages(chunk, grad), pipeline.piece_indices(chunk)):
            for part, index in zip(parts, indices):
                if index is not None:
                    # A key/value head is replicated where there are fewer of them than ranks.
                    part = part.transpose(0, 1)
                    pieces[index] = pieces[index] + part if index in pieces else part
        return None, None, *(pieces[index] for index in sorted(pieces))


class _PlaceOutputs(torch.autograd.Function):
    """A chunk's flat outputs, [s, B, n, Dv] from each rank -> views [B, s, n, Dv] of the full
    output, which they are copied to.
    """

    @staticmethod
    def forward(ctx: Any, pipeline: _Pipeline, chunk: int, received: Tensor) -> tuple[Tensor, ...]:
        ctx.pipeline, ctx.chunk = pipeline, chunk
        views = []
        for rank, part in enumerate(pipeline.outputs(chunk, received)):
            view = pipeline.out.part(pipeline.chunks.queries(chunk, rank), received)
            view.copy_(part.transpose(0, 1))
            # .data, because autograd must not track that other nodes write to the same buffer.
            views.append(view.data)
        return tuple(views)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        message = grads[0].new_empty(sum(ctx.pipeline.output_sizes(ctx.chunk)))
        for part, grad in zip(ctx.pipeline.outputs(ctx.chunk, message), grads):
            part.copy_(grad.transpose(0, 1))
        return None, None, message


class _Pipeline:
    """The chunks of one attention call on one rank: their messages, and the steps of each chunk.

    Args:
        query: `[B, s, H, D]`.
        key: `[B, s, K, D]`.
        value: `[B, s, K, Dv]`.
        group: the P ranks that exchange tokens for heads.
        chunks: which heads are in which chunk.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, group: ProcessGroup, chunks: HeadChunks
    ) -> None:
        self.group, self.chunks, self.rank, self.size = group, chunks, group.rank(), group.size()
        self.sizes: Sizes = (query.shape[3], key.shape[3], value.shape[3])
        self.batch, self.length = query.shape[:2]
        self.out = SharedOutput((*query.shape[:3], value.shape[3]))

    def pieces(self, *tensors: Tensor) -> list[list[Tensor]]:
        """Returns for each chunk views of the heads that are sent in it: query heads of each rank,
        then key heads, then value heads.
        """
        keys_in = [self.chunks.keys_in(chunk) for chunk in range(self.chunks.number)]
        all_keys = [heads for ranges in keys_in for heads in ranges]
        ranges_of = (self.chunks.all_queries(), all_keys, all_keys)
        query, key, value = (
            iter(SplitByHeads.apply(tensor, ranges))  # type: ignore[no-untyped-call]
            for tensor, ranges in zip(tensors, ranges_of)
        )
        result = []
        for ranges in keys_in:
            count = len(ranges)
            result.append([*islice(query, self.size), *islice(key, count), *islice(value, count)])
        return result

    def message_sizes(self, chunk: int) -> list[int]:
        """Returns the number of elements of a chunk's message to each rank."""
        widths = [self._width(chunk, rank) for rank in range(self.size)]
        return [self.length * self.batch * width for width in widths]

    def _width(self, chunk: int, rank: int) -> int:
        return sum(count * size for count, size in zip(self.chunks.counts(chunk, rank), self.sizes))

    def messages(self, chunk: int, message: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Returns views [s, B, n, D] of the query, key and value heads for each rank in a flat
        message.
        """
        parts = message.split(self.message_sizes(chunk))
        shaped = (part.view(self.length, self.batch, -1) for part in parts)
        return [
            message_parts(part, self.chunks.counts(chunk, rank), self.sizes)
            for rank, part in enumerate(shaped)
        ]

    def piece_indices(self, chunk: int) -> list[tuple[int | None, int | None, int | None]]:
        """Returns for each rank the indices of its query, key and value heads in a chunk's
        `pieces`; None where no key/value heads are sent to it.
        """
        keys = self.chunks.keys_in(chunk)
        indices: list[tuple[int | None, int | None, int | None]] = []
        for rank in range(self.size):
            heads = self.chunks.keys(chunk, rank)
            if heads in keys:
                key = self.size + keys.index(heads)
                indices.append((rank, key, key + len(keys)))
            else:
                indices.append((rank, None, None))
        return indices

    def output_sizes(self, chunk: int) -> list[int]:
        """Returns the number of elements of a chunk's outputs from each rank."""
        unit = self.length * self.batch * self.sizes[2]
        return [unit * self.chunks.counts(chunk, rank)[0] for rank in range(self.size)]

    def outputs(self, chunk: int, message: Tensor) -> list[Tensor]:
        """Returns views [s, B, n, Dv] of each rank's heads in flat outputs."""
        shape = (self.length, self.batch, -1, self.sizes[2])
        return [part.view(shape) for part in message.split(self.output_sizes(chunk))]

    def start(self, chunk: int, pieces: list[Tensor]) -> tuple[Tensor, AsyncExchange]:
        """Starts the exchange of a chunk's tokens for heads."""
        send_sizes = self.message_sizes(chunk)
        exchange = AsyncExchange(self.group, send_sizes, [send_sizes[self.rank]] * self.size)
        send = _Pack.apply(self, chunk, *pieces)  # type: ignore[no-untyped-call]
        return StartExchange.apply(send, exchange), exchange  # type: ignore[no-untyped-call]

    def finish(
        self, chunk: int, pending: Tensor, exchange: AsyncExchange
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Waits for a chunk; returns all tokens of its heads, [B, h, S, D], [B, k, S, D], [B, k, S,
        Dv], where k may be 0.
        """
        message = WaitForExchange.apply(pending, exchange)  # type: ignore[no-untyped-call]
        message = message.view(self.size * self.length, self.batch, -1)
        counts = self.chunks.counts(chunk, self.rank)
        result: tuple[Tensor, Tensor, Tensor] = SplitMessage.apply(message, counts, self.sizes)  # type: ignore[no-untyped-call]
        return result

    def start_return(self, chunk: int, out: Tensor) -> tuple[Tensor, AsyncExchange]:
        """Starts the exchange of a chunk's outputs [B, h, S, Dv] for tokens."""
        sizes = self.output_sizes(chunk)
        exchange = AsyncExchange(self.group, [sizes[self.rank]] * self.size, sizes)
        # [B, h, S, Dv] -> [S, B, h, Dv]
        send = out.permute(2, 0, 1, 3).reshape(-1)
        return StartExchange.apply(send, exchange), exchange  # type: ignore[no-untyped-call]

    def finish_return(self, chunk: int, pending: Tensor, exchange: AsyncExchange) -> list[Tensor]:
        """Waits for a chunk's outputs and copies them into the full output; returns views of it,
        [B, s, n, Dv] for each rank.
        """
        received = WaitForExchange.apply(pending, exchange)  # type: ignore[no-untyped-call]
        return list(_PlaceOutputs.apply(self, chunk, received))  # type: ignore[no-untyped-call]

    def attend(
        self, chunk: int, arrived: Keys, kept: Keys, attend: Attend
    ) -> tuple[tuple[Tensor, AsyncExchange], Keys]:
        """Computes the attention of a chunk's heads and starts the exchange of its outputs.

        Args:
            chunk: index of the chunk.
            arrived: what `finish` returned.
            kept: key and value of an earlier chunk, for a chunk that is sent none.
            attend: see `attend_in_chunks`.

        Returns:
            What `start_return` returned; and key and value for the next chunk, where it is sent
            none.
        """
        query, *received = arrived
        keys = tuple(received) if received[0].shape[1] else kept
        out = attend(query, keys[0], keys[1], self.chunks.queries(chunk, self.rank))
        is_last = chunk + 1 == self.chunks.number or self.chunks.counts(chunk + 1, self.rank)[1] > 0
        return self.start_return(chunk, out), () if is_last else keys

    def join(self, parts: list[Tensor]) -> Tensor:
        """Returns the full output [B, s, H, Dv]."""
        out: Tensor = JoinByHeads.apply(self.out, self.chunks.all_queries(), *parts)  # type: ignore[no-untyped-call]
        return out


def chunks_of(query: Tensor, value: Tensor, split: HeadSplit, number: int) -> HeadChunks:
    """Returns the chunks of one attention call: as many as requested, or more where a core
    attention call would be too large.

    Args:
        query: `[B, H, S / P, D]`, this rank's tokens of all heads.
        value: `[B, K, S / P, Dv]`.
        split: the heads of each rank.
        number: of chunks requested.

    Raises:
        ShapeError: more chunks than a rank has heads.
    """
    counts = [split.counts(rank)[0] for rank in range(split.size)]
    length, size = query.shape[2] * split.size, max(query.shape[3], value.shape[3])
    needed = min_head_chunks(query.shape[0], length, max(counts), size)
    return HeadChunks(split, max(number, min(needed, min(counts))))


def attend_in_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: ProcessGroup,
    chunks: HeadChunks,
    attend: Attend,
) -> Tensor:
    """Runs Ulysses attention chunk by chunk.

    Args:
        query: `[B, H, S / P, D]`, this rank's tokens of all heads.
        key: `[B, K, S / P, D]`.
        value: `[B, K, S / P, Dv]`.
        group: the P ranks of the sequence.
        chunks: which heads are in which chunk.
        attend: attention over whole sequences; takes `[B, h, S, D]`, `[B, k, S, D]`, `[B, k, S,
            Dv]` and which of the model's query heads (from, to) these are, returns `[B, h, S, Dv]`.

    Returns:
        `[B, S / P, H, Dv]`, this rank's tokens of all heads.

    Raises:
        ShapeError: the tensors' shapes or dtypes don't fit.

    Source: the idea of exchanging heads in chunks is Untied Ulysses' (UPipe).
    """
    check_exchange(query, key, value)
    run = _attend_in_chunks
    if torch.compiler.is_compiling():
        # A graph can't hold exchanges that are in progress. Not a decorator: torch.compiler.disable
        # imports dynamo, which takes seconds also where nothing is compiled (torch 2.13).
        run = torch.compiler.disable(run)
    return run(query, key, value, group, chunks, attend)


def _attend_in_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: ProcessGroup,
    chunks: HeadChunks,
    attend: Attend,
) -> Tensor:
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    pipeline = _Pipeline(query, key, value, group, chunks)
    pieces = pipeline.pieces(query, key, value)
    arriving, leaving = [pipeline.start(0, pieces[0])], []
    keys: Keys = ()
    parts: list[Tensor] = []
    for chunk in range(chunks.number):
        # Popped where it is used: a variable would keep a chunk's tensors alive while the next one
        # is computed.
        arrived = [pipeline.finish(chunk, *arriving.pop())]
        if chunk + 1 < chunks.number:
            arriving.append(pipeline.start(chunk + 1, pieces[chunk + 1]))
        departing, keys = pipeline.attend(chunk, arrived.pop(), keys, attend)
        leaving.append(departing)
        if chunk > 0:
            parts += pipeline.finish_return(chunk - 1, *leaving.pop(0))
    parts += pipeline.finish_return(chunks.number - 1, *leaving.pop())
    return pipeline.join(parts)
