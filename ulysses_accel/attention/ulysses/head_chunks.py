"""Ulysses in head chunks: a rank's heads are exchanged and attended to a few at a time, in less
memory.

The exchange of one chunk runs while the chunk before it is computed, forward and backward. Chunks
cut whole groups of query heads; where a rank has fewer key/value heads than chunks, a head travels
with its first query chunk and stays for the others, so that the bytes on the wire are those of the
exchange at once. Shapes: B = rows, H / K = query / key-value heads, P = ranks, s = S / P tokens, D
/ Dv = head sizes.
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
    CutHeads,
    Sizes,
    check_exchange,
    message_parts,
)
from ulysses_accel.attention.ulysses.overlap import (
    AsyncExchange,
    CutByHeads,
    JoinByHeads,
    StartExchange,
    WaitForExchange,
    WholeTensor,
)
from ulysses_accel.errors import ShapeError

Attend = Callable[[Tensor, Tensor, Tensor, Range], Tensor]
Keys = tuple[Tensor, ...]


def min_head_chunks(batch: int, sequence_length: int, heads: int, head_dim: int) -> int:
    """Returns the fewest head chunks with which no tensor of a core call reaches 2^31 elements.

    Args:
        batch: rows B.
        sequence_length: tokens S of the core call.
        heads: query heads of a rank.
        head_dim: size of a head; the larger one where values' differs.

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
        split: how the heads are dealt to the ranks.
        number: chunks that each rank's heads are cut into.
    """

    split: HeadSplit
    number: int

    def __post_init__(self) -> None:
        fewest = min(self.split.counts(rank)[0] for rank in range(self.split.size))
        if not 1 <= self.number <= fewest:
            legal = ", ".join(str(number) for number in range(1, fewest + 1))
            raise ShapeError(
                f"sp_head_chunks={self.number} can't cut the {fewest} query heads of a rank "
                f"(num_attention_heads={self.split.num_heads} on sp_size={self.split.size}). Use "
                f"one of: {legal}."
            )

    @cached_property
    def _cuts(self) -> tuple[HeadSplit, ...]:
        """For each rank its own heads, dealt to chunks as heads are dealt to ranks."""
        counts = [self.split.counts(rank) for rank in range(self.split.size)]
        return tuple(HeadSplit(self.number, queries, keys) for queries, keys, _ in counts)

    def queries(self, chunk: int, rank: int) -> Range:
        """Returns the query heads (from, to) of a rank's chunk."""
        return _moved(self._cuts[rank].queries(chunk), self.split.queries(rank)[0])

    def keys(self, chunk: int, rank: int) -> Range:
        """Returns the key/value heads (from, to) that travel with a rank's chunk; none where an
        earlier one did.
        """
        keys = self._cuts[rank].keys(chunk)
        if chunk > 0 and self._cuts[rank].keys(chunk - 1) == keys:
            keys = (keys[1], keys[1])
        return _moved(keys, self.split.keys(rank)[0])

    def counts(self, chunk: int, rank: int) -> Counts:
        """Returns how many query, key and value heads travel to a rank with a chunk."""
        queries, keys = self.queries(chunk, rank), self.keys(chunk, rank)
        return queries[1] - queries[0], keys[1] - keys[0], keys[1] - keys[0]

    def all_queries(self) -> list[Range]:
        """Returns the query heads of each chunk and rank, rank by rank within a chunk; together all
        heads once.
        """
        return [
            self.queries(chunk, rank)
            for chunk in range(self.number)
            for rank in range(self.split.size)
        ]

    def keys_in(self, chunk: int) -> list[Range]:
        """Returns the key/value heads that travel with a chunk, each once; over all chunks all
        heads once.
        """
        return sorted(
            {
                self.keys(chunk, rank)
                for rank in range(self.split.size)
                if self.counts(chunk, rank)[1]
            }
        )


def _moved(heads: Range, first: int) -> Range:
    return heads[0] + first, heads[1] + first


class _Pack(torch.autograd.Function):
    """A chunk's pieces [B, s, n, D] of query, key and value -> one flat message, [s, B, width] for
    each rank.
    """

    @staticmethod
    def forward(ctx: Any, pipeline: _Pipeline, chunk: int, *pieces: Tensor) -> Tensor:
        ctx.pipeline, ctx.chunk = pipeline, chunk
        send = pieces[0].new_empty(sum(pipeline.message_sizes(chunk)))
        for parts, places in zip(pipeline.messages(chunk, send), pipeline.places(chunk)):
            for part, place in zip(parts, places):
                if place is not None:
                    # [B, s, n, D] -> [s, B, n, D]
                    part.copy_(pieces[place].transpose(0, 1))
        return send

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pipeline, chunk = ctx.pipeline, ctx.chunk
        pieces: dict[int, Tensor] = {}
        for parts, places in zip(pipeline.messages(chunk, grad), pipeline.places(chunk)):
            for part, place in zip(parts, places):
                if place is not None:
                    # A key/value head has several readers where there are fewer of them than ranks.
                    part = part.transpose(0, 1)
                    pieces[place] = pieces[place] + part if place in pieces else part
        return None, None, *(pieces[place] for place in sorted(pieces))


class _Place(torch.autograd.Function):
    """A chunk's outputs, flat, [s, B, n, Dv] from each rank -> their places [B, s, n, Dv] in the
    whole output.
    """

    @staticmethod
    def forward(ctx: Any, pipeline: _Pipeline, chunk: int, received: Tensor) -> tuple[Tensor, ...]:
        ctx.pipeline, ctx.chunk = pipeline, chunk
        places = []
        for rank, part in enumerate(pipeline.outputs(chunk, received)):
            place = pipeline.out.part(pipeline.chunks.queries(chunk, rank), received)
            place.copy_(part.transpose(0, 1))
            # Without autograd's knowledge of the view: other nodes fill other parts of the same
            # buffer.
            places.append(place.data)
        return tuple(places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        message = grads[0].new_empty(sum(ctx.pipeline.output_sizes(ctx.chunk)))
        for part, grad in zip(ctx.pipeline.outputs(ctx.chunk, message), grads):
            part.copy_(grad.transpose(0, 1))
        return None, None, message


class _Pipeline:
    """The chunks of one attention call on one rank: what is sent, where it lies, and the steps of
    each chunk.

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
        self.out = WholeTensor((*query.shape[:3], value.shape[3]))

    def pieces(self, *tensors: Tensor) -> list[list[Tensor]]:
        """Cuts query, key and value into the pieces of each chunk."""
        keys = [self.chunks.keys_in(chunk) for chunk in range(self.chunks.number)]
        ranges = (self.chunks.all_queries(), *[[heads for found in keys for heads in found]] * 2)
        cuts = zip(tensors, ranges)
        query, key, value = (iter(CutByHeads.apply(*cut)) for cut in cuts)  # type: ignore[no-untyped-call]
        counts = [len(found) for found in keys]
        return [
            [*islice(query, self.size), *islice(key, count), *islice(value, count)]
            for count in counts
        ]

    def message_sizes(self, chunk: int) -> list[int]:
        """Returns the elements of a chunk's message to each rank."""
        widths = [self._width(chunk, rank) for rank in range(self.size)]
        return [self.length * self.batch * width for width in widths]

    def _width(self, chunk: int, rank: int) -> int:
        return sum(count * size for count, size in zip(self.chunks.counts(chunk, rank), self.sizes))

    def messages(self, chunk: int, message: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Cuts a flat message into views [s, B, n, D] of the query, key and value heads for each
        rank.
        """
        parts = message.split(self.message_sizes(chunk))
        shaped = (part.view(self.length, self.batch, -1) for part in parts)
        return [
            message_parts(part, self.chunks.counts(chunk, rank), self.sizes)
            for rank, part in enumerate(shaped)
        ]

    def places(self, chunk: int) -> list[tuple[int | None, int | None, int | None]]:
        """Returns for each rank which of a chunk's pieces its query, key and value heads are."""
        keys = self.chunks.keys_in(chunk)
        found: list[tuple[int | None, int | None, int | None]] = []
        for rank in range(self.size):
            heads = self.chunks.keys(chunk, rank)
            place = self.size + keys.index(heads) if heads in keys else None
            found.append((rank, place, None if place is None else place + len(keys)))
        return found

    def output_sizes(self, chunk: int) -> list[int]:
        """Returns the elements of a chunk's outputs from each rank."""
        unit = self.length * self.batch * self.sizes[2]
        return [unit * self.chunks.counts(chunk, rank)[0] for rank in range(self.size)]

    def outputs(self, chunk: int, message: Tensor) -> list[Tensor]:
        """Cuts flat outputs into views [s, B, n, Dv] of each rank's heads."""
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
        """Waits for a chunk: all tokens of its heads, [B, h, S, D], [B, k, S, D], [B, k, S, Dv]; k
        may be 0.
        """
        message = WaitForExchange.apply(pending, exchange)  # type: ignore[no-untyped-call]
        message = message.view(self.size * self.length, self.batch, -1)
        counts = self.chunks.counts(chunk, self.rank)
        result: tuple[Tensor, Tensor, Tensor] = CutHeads.apply(message, counts, self.sizes)  # type: ignore[no-untyped-call]
        return result

    def start_return(self, chunk: int, out: Tensor) -> tuple[Tensor, AsyncExchange]:
        """Starts the exchange of a chunk's outputs [B, h, S, Dv] for tokens."""
        sizes = self.output_sizes(chunk)
        exchange = AsyncExchange(self.group, [sizes[self.rank]] * self.size, sizes)
        # [B, h, S, Dv] -> [S, B, h, Dv]
        send = out.permute(2, 0, 1, 3).reshape(-1)
        return StartExchange.apply(send, exchange), exchange  # type: ignore[no-untyped-call]

    def finish_return(self, chunk: int, pending: Tensor, exchange: AsyncExchange) -> list[Tensor]:
        """Waits for a chunk's outputs and puts them in their places; returns these, [B, s, n, Dv]
        for each rank.
        """
        received = WaitForExchange.apply(pending, exchange)  # type: ignore[no-untyped-call]
        return list(_Place.apply(self, chunk, received))  # type: ignore[no-untyped-call]

    def attend(
        self, chunk: int, arrived: Keys, kept: Keys, attend: Attend
    ) -> tuple[tuple[Tensor, AsyncExchange], Keys]:
        """Attends with a chunk's heads and starts the return of the outputs.

        Args:
            chunk: which.
            arrived: what `finish` returned.
            kept: key and value that an earlier chunk left for this one.
            attend: see `attend_in_chunks`.

        Returns:
            What `start_return` returned; key and value for the next chunk, where it brings none of
            its own.
        """
        query, *fresh = arrived
        keys = tuple(fresh) if fresh[0].shape[1] else kept
        out = attend(query, keys[0], keys[1], self.chunks.queries(chunk, self.rank))
        is_last = chunk + 1 == self.chunks.number or self.chunks.counts(chunk + 1, self.rank)[1] > 0
        return self.start_return(chunk, out), () if is_last else keys

    def join(self, parts: list[Tensor]) -> Tensor:
        """Returns the whole output [B, s, H, Dv]."""
        out: Tensor = JoinByHeads.apply(self.out, self.chunks.all_queries(), *parts)  # type: ignore[no-untyped-call]
        return out


def chunks_of(query: Tensor, value: Tensor, split: HeadSplit, number: int) -> HeadChunks:
    """Returns the chunks of one attention call: those wished for, or more where a core call would
    be too large.

    Args:
        query: `[B, H, S / P, D]`, this rank's tokens of all heads.
        value: `[B, K, S / P, Dv]`.
        split: how the heads are dealt to the ranks.
        number: chunks wished for.

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
        ShapeError: the tensors don't belong together.

    Source: the idea of exchanging heads in chunks is Untied Ulysses' (UPipe).
    """
    check_exchange(query, key, value)
    run = _attend_in_chunks
    if torch.compiler.is_compiling():
        # Messages on their way are nothing that a graph could hold; decorating costs seconds where
        # nothing is compiled.
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
        # Popped where it is used: a name would keep a chunk's tensors alive while the next one is
        # computed.
        arrived = [pipeline.finish(chunk, *arriving.pop())]
        if chunk + 1 < chunks.number:
            arriving.append(pipeline.start(chunk + 1, pieces[chunk + 1]))
        departing, keys = pipeline.attend(chunk, arrived.pop(), keys, attend)
        leaving.append(departing)
        if chunk > 0:
            parts += pipeline.finish_return(chunk - 1, *leaving.pop(0))
    parts += pipeline.finish_return(chunks.number - 1, *leaving.pop())
    return pipeline.join(parts)
