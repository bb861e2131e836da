"""The Ulysses exchange: for the core attention, each rank has all tokens of some heads instead of
some tokens of all heads.

A layer takes two collectives in forward and two in backward: query, key and value are sent as one
message. Each message is packed with one copy and read in the receive buffer: received rows are the
whole sequence in order, so the core attention gets strided views. Query heads of one key/value head
stay together; where they are not distributed evenly, ranks get messages of different widths. KV
heads may be replicated on several ranks, which split their query heads. Shapes: B = rows, H / K =
query / key-value heads, P = ranks, s = S / P tokens, D / Dv = head sizes, h / k = the query and
key/value heads of one rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ulysses_accel.attention.heads import HeadSplit
from ulysses_accel.attention.saved_results import kept
from ulysses_accel.distributed.collectives import all_to_all
from ulysses_accel.errors import ShapeError

Sizes = tuple[int, int, int]
Counts = tuple[int, int, int]


class _SeqToHead(torch.autograd.Function):
    """[B, s, P, H/P, D] and the same for key and value -> one message [S, B, width]: all tokens of
    this rank's heads.

    The exchange and splitting the message are two nodes, so that the packed gradients are freed in
    the backward pass before the received ones are copied.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        group: ProcessGroup,
        split: HeadSplit,
        sizes: Sizes,
    ) -> Tensor:
        ctx.group, ctx.split, ctx.sizes = group, split, sizes
        batch, length = query.shape[:2]
        send = query.new_empty(split.size, length, batch, split.width(0, sizes))
        for part, tensor in zip(message_parts(send, split.counts(0), sizes), (query, key, value)):
            _write_heads(part, tensor)
        # [P, s, B, width] -> [P, s, B, width]: the part for each rank -> the part from each rank
        (received,) = kept("exchange", lambda: (all_to_all(send, group),))
        return received.view(split.size * length, batch, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        split: HeadSplit = ctx.split
        # [S, B, width] -> [P, s, B, width]
        received = all_to_all(grad, ctx.group).view(
            split.size, grad.shape[0] // split.size, *grad.shape[1:]
        )
        q, k, v = message_parts(received, split.counts(0), ctx.sizes)
        return (
            _read_heads(q, 1),
            _read_heads(k, split.readers),
            _read_heads(v, split.readers),
            None,
            None,
            None,
        )


class SplitMessage(torch.autograd.Function):
    """[S, B, width] -> views [B, h, S, D], [B, k, S, D], [B, k, S, Dv]; backward packs one
    message.
    """

    @staticmethod
    def forward(
        ctx: Any, message: Tensor, counts: Counts, sizes: Sizes
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.counts, ctx.sizes, ctx.shape = counts, sizes, message.shape
        q, k, v = (part.permute(1, 2, 0, 3) for part in message_parts(message, counts, sizes))
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        message = grads[0].new_empty(ctx.shape)
        for part, grad in zip(message_parts(message, ctx.counts, ctx.sizes), grads):
            part.copy_(grad.permute(2, 0, 1, 3))
        return message, None, None


class _HeadToSeq(torch.autograd.Function):
    """[B, H/P, S, Dv] -> [B, s, H, Dv]."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        send = out.permute(2, 0, 1, 3)
        size = group.size()
        # [S, B, H/P, Dv] -> [S, B, H/P, Dv]: the part for each rank -> the part from each rank
        (received,) = kept("exchange", lambda: (all_to_all(send, group),))
        received = received.view(size, send.shape[0] // size, *send.shape[1:])
        # [P, s, B, H/P, Dv] -> [B, s, P, H/P, Dv] -> [B, s, H, Dv]
        return received.permute(2, 1, 0, 3, 4).flatten(2, 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        size = ctx.group.size()
        # [B, s, H, Dv] -> [P, s, B, H/P, Dv]
        send = grad.unflatten(2, (size, -1)).permute(2, 1, 0, 3, 4)
        return all_to_all(send, ctx.group).flatten(0, 1).permute(1, 2, 0, 3), None


class _UnevenSeqToHead(torch.autograd.Function):
    """[B, s, 1, H, D] and the same for key and value -> one message [S, B, width], whose width
    differs between ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        group: ProcessGroup,
        split: HeadSplit,
        sizes: Sizes,
    ) -> Tensor:
        ctx.group, ctx.split, ctx.sizes = group, split, sizes
        ctx.shapes = [tensor.shape for tensor in (query, key, value)]
        batch, length = query.shape[:2]
        lengths = [length * batch * split.width(rank, sizes) for rank in range(split.size)]
        send = query.new_empty(sum(lengths))
        for rank, buffer in enumerate(send.split(lengths)):
            parts = message_parts(buffer.view(length, batch, -1), split.counts(rank), sizes)
            for part, tensor, heads in zip(parts, (query, key, value), _heads_of(split, rank)):
                part.copy_(tensor[:, :, 0, heads].transpose(0, 1))
        receive_sizes = [lengths[group.rank()]] * split.size
        # P times [s, B, width of rank] -> P times [s, B, width]
        (received,) = kept("exchange", lambda: (all_to_all(send, group, lengths, receive_sizes),))
        return received.view(split.size * length, batch, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        split: HeadSplit = ctx.split
        batch, length = ctx.shapes[0][:2]
        lengths = [length * batch * split.width(rank, ctx.sizes) for rank in range(split.size)]
        send_sizes = [lengths[ctx.group.rank()]] * split.size
        # P times [s, B, width] -> P times [s, B, width of rank]
        received = all_to_all(grad.flatten(), ctx.group, send_sizes, lengths)
        totals = [grad.new_zeros(shape) for shape in ctx.shapes]
        for rank, buffer in enumerate(received.split(lengths)):
            parts = message_parts(buffer.view(length, batch, -1), split.counts(rank), ctx.sizes)
            for part, total, heads in zip(parts, totals, _heads_of(split, rank)):
                total[:, :, 0, heads] += part.transpose(0, 1)
        return totals[0], totals[1], totals[2], None, None, None


class _UnevenHeadToSeq(torch.autograd.Function):
    """[B, h, S, Dv] -> [B, s, H, Dv], where h differs between ranks."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, group: ProcessGroup, split: HeadSplit) -> Tensor:
        ctx.group, ctx.split = group, split
        batch, num_heads, sequence_length, value_dim = out.shape
        length = sequence_length // split.size
        unit = length * batch * value_dim
        counts = [split.counts(rank)[0] for rank in range(split.size)]
        send = out.permute(2, 0, 1, 3).flatten()
        send_sizes = [unit * num_heads] * split.size
        sizes = [unit * count for count in counts]
        # P times [s, B, h, Dv] -> P times [s, B, h of rank, Dv]
        (received,) = kept("exchange", lambda: (all_to_all(send, group, send_sizes, sizes),))
        parts = received.split(sizes)
        # P times [s, B, h of rank, Dv] -> [B, s, H, Dv]
        return torch.cat(
            [part.view(length, batch, -1, value_dim) for part in parts], dim=2
        ).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        split: HeadSplit = ctx.split
        batch, length, _, value_dim = grad.shape
        unit = length * batch * value_dim
        counts = [split.counts(rank)[0] for rank in range(split.size)]
        num_heads = counts[ctx.group.rank()]
        # [B, s, H, Dv] -> P times [s, B, h of rank, Dv] -> P times [s, B, h, Dv]
        send = torch.cat([part.transpose(0, 1).flatten() for part in grad.split(counts, dim=2)])
        received = all_to_all(
            send, ctx.group, [unit * count for count in counts], [unit * num_heads] * split.size
        )
        return (
            received.view(split.size * length, batch, num_heads, value_dim).permute(1, 2, 0, 3),
            None,
            None,
        )


def _heads_of(split: HeadSplit, rank: int) -> tuple[slice, slice, slice]:
    """Returns the query, key and value heads of a rank."""
    queries, keys = slice(*split.queries(rank)), slice(*split.keys(rank))
    return queries, keys, keys


def message_parts(buffer: Tensor, counts: Counts, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Returns views of the query, key and value heads in a message.

    Args:
        buffer: `[..., width]`.
        counts: number of query, key and value heads.
        sizes: of a query, key and value head.

    Returns:
        `[..., count, size]` each.
    """
    widths = [count * size for count, size in zip(counts, sizes)]
    q, k, v = (
        part.unflatten(-1, (count, size))
        for part, count, size in zip(buffer.split(widths, dim=-1), counts, sizes)
    )
    return q, k, v


def _write_heads(part: Tensor, tensor: Tensor) -> None:
    """Copies heads `[B, s, n, N/n, D]` into the message `[P, s, B, N/n, D]`, each of the n parts to
    the P/n ranks that read it.
    """
    readers = part.unflatten(0, (tensor.shape[2], -1))
    readers.copy_(tensor.permute(2, 1, 0, 3, 4).unsqueeze(1))


def _read_heads(part: Tensor, readers: int) -> Tensor:
    """Returns gradients `[P, s, B, N/n, D]` as `[B, s, n, N/n, D]`, summed over the ranks that read
    each part.
    """
    if readers > 1:
        part = part.unflatten(0, (-1, readers)).sum(dim=1)
    return part.permute(2, 1, 0, 3, 4)


def check_exchange(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuses tensors that can't be sent as one message.

    Raises:
        ShapeError: their dtypes, rows, tokens or head sizes differ.
    """
    if not (query.dtype == key.dtype == value.dtype):
        raise ShapeError(
            f"query is {query.dtype}, key {key.dtype}, value {value.dtype}; they travel as one "
            "message. Cast them to one dtype before attention."
        )
    same_tokens = key.shape[:3] == value.shape[:3] and query.shape[::2] == key.shape[::2]
    if not same_tokens or query.shape[3] != key.shape[3]:
        raise ShapeError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} "
            "must agree in rows, tokens and head size. Cross-attention and key caches can't be "
            "sharded by Ulysses."
        )


def seq_to_head(
    query: Tensor, key: Tensor, value: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Exchanges tokens for heads in one collective.

    Args:
        query: `[B, H, S / P, D]`, this rank's tokens of all heads.
        key: `[B, K, S / P, D]`.
        value: `[B, K, S / P, Dv]`.
        group: the P ranks of the sequence.

    Returns:
        `[B, h, S, D]`, `[B, k, S, D]`, `[B, k, S, Dv]`: all tokens of this rank's heads
        (`HeadSplit.counts`).

    Raises:
        ShapeError: there are fewer query heads than ranks, or the tensors' shapes or dtypes don't
            fit.
    """
    check_exchange(query, key, value)
    split = HeadSplit(group.size(), query.shape[1], key.shape[1])
    sizes = (query.shape[3], key.shape[3], value.shape[3])
    function: type[torch.autograd.Function] = _SeqToHead if split.is_even else _UnevenSeqToHead
    parts = split.size if split.is_even else 1
    # [B, N, s, D] -> [B, s, n, N/n, D]
    grouped = [
        tensor.transpose(1, 2).unflatten(2, (min(parts, tensor.shape[1]), -1))
        for tensor in (query, key, value)
    ]
    message = function.apply(*grouped, group, split, sizes)
    counts = split.counts(group.rank())
    result: tuple[Tensor, Tensor, Tensor] = SplitMessage.apply(message, counts, sizes)  # type: ignore[no-untyped-call]
    return result


def head_to_seq(out: Tensor, group: ProcessGroup, split: HeadSplit | None = None) -> Tensor:
    """Exchanges heads for tokens in one collective.

    Args:
        out: `[B, h, S, Dv]`, all tokens of this rank's query heads.
        group: the P ranks of the sequence.
        split: the heads of each rank; evenly distributed when None.

    Returns:
        `[B, S / P, H, Dv]`, this rank's tokens of all heads.
    """
    result: Tensor
    if split is None or split.is_even:
        result = _HeadToSeq.apply(out, group)  # type: ignore[no-untyped-call]
    else:
        result = _UnevenHeadToSeq.apply(out, group, split)  # type: ignore[no-untyped-call]
    return result
