"""The Ulysses exchange: all tokens of some heads instead of some tokens of all heads, for the time
of one core call.

Two collectives forward and two backward for a layer: query, key and value travel as one message.
Each is packed with one copy and read where it arrives: received rows are the whole sequence in
order, so the core gets strided views of the receive buffer. Heads are dealt in whole groups; where
that is uneven, ranks get messages of different widths. Shapes: B = rows, H / K = query / key-value
heads, P = ranks, s = S / P tokens, D / Dv = head sizes, h / k = the query and key/value heads of
one rank.
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


class _DealHeads(torch.autograd.Function):
    """[B, s, P, H/P, D] and the same of key and value -> all tokens of this rank's heads, one
    message [S, B, width].

    Packing with the collective and cutting the message are two nodes, so that in the backward pass
    the packed gradients are freed before what arrived is copied out.
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
            _deal(part, tensor)
        return kept("exchange", lambda: (all_to_all(send, group),))[0].view(
            split.size * length, batch, -1
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        split: HeadSplit = ctx.split
        received = all_to_all(grad, ctx.group).view(
            split.size, grad.shape[0] // split.size, *grad.shape[1:]
        )
        q, k, v = message_parts(received, split.counts(0), ctx.sizes)
        return (
            _collect(q, 1),
            _collect(k, split.readers),
            _collect(v, split.readers),
            None,
            None,
            None,
        )


class CutHeads(torch.autograd.Function):
    """[S, B, width] -> views [B, h, S, D], [B, k, S, D], [B, k, S, Dv]; its backward packs one
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


class _DealUnevenHeads(torch.autograd.Function):
    """[B, s, 1, H, D] and the same of key and value -> one message [S, B, width], its width this
    rank's own.
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
        own = lengths[group.rank()]
        (received,) = kept(
            "exchange", lambda: (all_to_all(send, group, lengths, [own] * split.size),)
        )
        return received.view(split.size * length, batch, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        split: HeadSplit = ctx.split
        batch, length = ctx.shapes[0][:2]
        lengths = [length * batch * split.width(rank, ctx.sizes) for rank in range(split.size)]
        own = lengths[ctx.group.rank()]
        received = all_to_all(grad.flatten(), ctx.group, [own] * split.size, lengths)
        totals = [grad.new_zeros(shape) for shape in ctx.shapes]
        for rank, buffer in enumerate(received.split(lengths)):
            parts = message_parts(buffer.view(length, batch, -1), split.counts(rank), ctx.sizes)
            for part, total, heads in zip(parts, totals, _heads_of(split, rank)):
                total[:, :, 0, heads] += part.transpose(0, 1)
        return totals[0], totals[1], totals[2], None, None, None


class _UnevenHeadToSeq(torch.autograd.Function):
    """[B, h, S, Dv] -> [B, s, H, Dv], h this rank's own."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, group: ProcessGroup, split: HeadSplit) -> Tensor:
        ctx.group, ctx.split = group, split
        batch, own, whole, value_dim = out.shape
        length = whole // split.size
        unit = length * batch * value_dim
        counts = [split.counts(rank)[0] for rank in range(split.size)]
        send = out.permute(2, 0, 1, 3).flatten()
        sizes = [unit * count for count in counts]
        (received,) = kept(
            "exchange", lambda: (all_to_all(send, group, [unit * own] * split.size, sizes),)
        )
        parts = received.split(sizes)
        # P times [s, B, h, Dv] -> [B, s, H, Dv]
        return torch.cat(
            [part.view(length, batch, -1, value_dim) for part in parts], dim=2
        ).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        split: HeadSplit = ctx.split
        batch, length, _, value_dim = grad.shape
        unit = length * batch * value_dim
        counts = [split.counts(rank)[0] for rank in range(split.size)]
        own = counts[ctx.group.rank()]
        # [B, s, H, Dv] -> P times [s, B, h, Dv]
        send = torch.cat([part.transpose(0, 1).flatten() for part in grad.split(counts, dim=2)])
        received = all_to_all(
            send, ctx.group, [unit * count for count in counts], [unit * own] * split.size
        )
        return (
            received.view(split.size * length, batch, own, value_dim).permute(1, 2, 0, 3),
            None,
            None,
        )


def _heads_of(split: HeadSplit, rank: int) -> tuple[slice, slice, slice]:
    """Returns a rank's query, key and value heads."""
    queries, keys = slice(*split.queries(rank)), slice(*split.keys(rank))
    return queries, keys, keys


def message_parts(buffer: Tensor, counts: Counts, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Cuts a message `[..., width]` into views of its query, key and value heads, `[..., count,
    size]` each.
    """
    widths = [count * size for count, size in zip(counts, sizes)]
    q, k, v = (
        part.unflatten(-1, (count, size))
        for part, count, size in zip(buffer.split(widths, dim=-1), counts, sizes)
    )
    return q, k, v


def _deal(part: Tensor, tensor: Tensor) -> None:
    """Copies `[B, s, n, N/n, D]` into the message `[P, s, B, N/n, D]`, each of the n parts to all
    P/n readers.
    """
    readers = part.unflatten(0, (tensor.shape[2], -1))
    readers.copy_(tensor.permute(2, 1, 0, 3, 4).unsqueeze(1))


def _collect(part: Tensor, readers: int) -> Tensor:
    """Returns gradients `[P, s, B, N/n, D]` as a view `[B, s, n, N/n, D]`, summed over the readers
    of each part.
    """
    if readers > 1:
        part = part.unflatten(0, (-1, readers)).sum(dim=1)
    return part.permute(2, 1, 0, 3, 4)


def check_exchange(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuses tensors that can't travel as one message.

    Raises:
        ShapeError: their dtypes, rows, tokens or head sizes differ.
    """
    if not (query.dtype == key.dtype == value.dtype):
        raise ShapeError(
            f"query is {query.dtype}, key {key.dtype}, value {value.dtype}; they travel as one "
            "message. "
            f"Cast them to one dtype before attention."
        )
    if (
        key.shape[:3] != value.shape[:3]
        or query.shape[::2] != key.shape[::2]
        or query.shape[3] != key.shape[3]
    ):
        raise ShapeError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} "
            "must agree in rows, "
            f"tokens and head size. Cross-attention and key caches can't be sharded by Ulysses."
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
        ShapeError: there are fewer query heads than ranks, or the tensors don't belong together.
    """
    check_exchange(query, key, value)
    split = HeadSplit(group.size(), query.shape[1], key.shape[1])
    sizes = (query.shape[3], key.shape[3], value.shape[3])
    deal: type[torch.autograd.Function] = _DealHeads if split.is_even else _DealUnevenHeads
    parts = split.size if split.is_even else 1
    # [B, N, s, D] -> [B, s, n, N/n, D]
    dealt = [
        t.transpose(1, 2).unflatten(2, (min(parts, t.shape[1]), -1)) for t in (query, key, value)
    ]
    message = deal.apply(*dealt, group, split, sizes)
    counts = split.counts(group.rank())
    result: tuple[Tensor, Tensor, Tensor] = CutHeads.apply(message, counts, sizes)  # type: ignore[no-untyped-call]
    return result


def head_to_seq(out: Tensor, group: ProcessGroup, split: HeadSplit | None = None) -> Tensor:
    """Exchanges heads for tokens in one collective.

    Args:
        out: `[B, h, S, Dv]`, all tokens of this rank's query heads.
        group: the P ranks of the sequence.
        split: how the heads were dealt; evenly when None.

    Returns:
        `[B, S / P, H, Dv]`, this rank's tokens of all heads.
    """
    function, args = (
        (_HeadToSeq, ()) if split is None or split.is_even else (_UnevenHeadToSeq, (split,))
    )
    result: Tensor = function.apply(out, group, *args)  # type: ignore[no-untyped-call]
    return result
