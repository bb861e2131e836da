"""Ulysses attention: all tokens of some heads instead of some tokens of all heads, for the time of one core call.

Two collectives forward and two backward for a layer: query, key and value travel as one message. Each is packed with
one copy and read where it arrives: received rows are the whole sequence in order, so the core gets strided views of
the receive buffer. Shapes: B = rows, H / K = query / key-value heads, P = ranks, s = S / P tokens, D / Dv = head sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ulysses_accel.attention.kernels import AttentionCall, core_attention
from ulysses_accel.collectives import all_to_all
from ulysses_accel.errors import ShapeError
from ulysses_accel.sequence import SequenceDescription


@dataclass(frozen=True)
class HeadSplit:
    """How heads are dealt to the ranks of a Ulysses group.

    Args:
        size: ranks P.
        num_heads: query heads H.
        num_key_value_heads: key/value heads K.
    """

    size: int
    num_heads: int
    num_key_value_heads: int

    def __post_init__(self) -> None:
        if self.num_heads % self.num_key_value_heads:
            raise ShapeError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide num_attention_heads={self.num_heads}. "
                f"Grouped-query attention needs whole groups."
            )
        if self.size not in legal_sizes(self.num_heads, self.num_key_value_heads):
            legal = ", ".join(str(size) for size in legal_sizes(self.num_heads, self.num_key_value_heads))
            raise ShapeError(
                f"sp_size={self.size} does not fit num_attention_heads={self.num_heads} with "
                f"num_key_value_heads={self.num_key_value_heads}. Use one of: {legal}."
            )

    @property
    def heads(self) -> int:
        """Query heads on one rank while it holds the whole sequence."""
        return self.num_heads // self.size

    @property
    def key_value_heads(self) -> int:
        """Key/value heads on one rank while it holds the whole sequence."""
        return max(1, self.num_key_value_heads // self.size)

    @property
    def readers(self) -> int:
        """Ranks that need the same key/value head, 1 unless there are fewer of them than ranks."""
        return max(1, self.size // self.num_key_value_heads)


def legal_sizes(num_heads: int, num_key_value_heads: int) -> list[int]:
    """Returns the Ulysses degrees at which every rank gets as many query heads and whole groups of them."""
    return [
        size
        for size in range(1, num_heads + 1)
        if num_heads % size == 0 and (num_key_value_heads % size == 0 or size % num_key_value_heads == 0)
    ]


class _SeqToHead(torch.autograd.Function):
    """[B, H, s, D], [B, K, s, D], [B, K, s, Dv] -> [B, H/P, S, D], [B, K/P, S, D], [B, K/P, S, Dv]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, group: ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        split = HeadSplit(group.size(), query.shape[1], key.shape[1])
        ctx.group, ctx.split, ctx.sizes = group, split, (query.shape[3], key.shape[3], value.shape[3])
        batch, _, length, _ = query.shape
        send = query.new_empty(split.size, length, batch, _width(split, ctx.sizes))
        for part, tensor in zip(_parts(send, split, ctx.sizes), (query, key, value)):
            _deal(part, tensor, split.size)
        received = all_to_all(send, group).view(split.size * length, batch, -1)
        q, k, v = (part.permute(1, 2, 0, 3) for part in _parts(received, split, ctx.sizes))
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        split: HeadSplit = ctx.split
        batch, _, length, _ = grads[0].shape
        send = grads[0].new_empty(length, batch, _width(split, ctx.sizes))
        for part, grad in zip(_parts(send, split, ctx.sizes), grads):
            part.copy_(grad.permute(2, 0, 1, 3))
        received = all_to_all(send, ctx.group).view(split.size, length // split.size, batch, -1)
        q, k, v = _parts(received, split, ctx.sizes)
        return _collect(q, 1), _collect(k, split.readers), _collect(v, split.readers), None


class _HeadToSeq(torch.autograd.Function):
    """[B, H/P, S, Dv] -> [B, s, H, Dv]."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        send = out.permute(2, 0, 1, 3)
        size = group.size()
        received = all_to_all(send, group).view(size, send.shape[0] // size, *send.shape[1:])
        # [P, s, B, H/P, Dv] -> [B, s, P, H/P, Dv] -> [B, s, H, Dv]
        return received.permute(2, 1, 0, 3, 4).flatten(2, 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        size = ctx.group.size()
        # [B, s, H, Dv] -> [P, s, B, H/P, Dv]
        send = grad.unflatten(2, (size, -1)).permute(2, 1, 0, 3, 4)
        return all_to_all(send, ctx.group).flatten(0, 1).permute(1, 2, 0, 3), None


def _width(split: HeadSplit, sizes: tuple[int, int, int]) -> int:
    """Elements that one token of one row has in the message to one rank."""
    return split.heads * sizes[0] + split.key_value_heads * (sizes[1] + sizes[2])


def _parts(buffer: Tensor, split: HeadSplit, sizes: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Cuts a message `[..., width]` into views of its query, key and value heads, `[..., heads, size]` each."""
    heads = (split.heads, split.key_value_heads, split.key_value_heads)
    widths = [count * size for count, size in zip(heads, sizes)]
    q, k, v = (
        part.unflatten(-1, (count, size)) for part, count, size in zip(buffer.split(widths, dim=-1), heads, sizes)
    )
    return q, k, v


def _deal(part: Tensor, tensor: Tensor, size: int) -> None:
    """Copies `[B, N, s, D]` into the message `[P, s, B, N/P, D]`, or each head to all its readers where N < P."""
    num_heads = tensor.shape[1]
    if num_heads >= size:
        part.copy_(tensor.unflatten(1, (size, -1)).permute(1, 3, 0, 2, 4))
    else:
        readers = part.unflatten(0, (num_heads, -1))
        readers.copy_(tensor.permute(1, 2, 0, 3)[:, None, :, :, None])


def _collect(part: Tensor, readers: int) -> Tensor:
    """Returns gradients `[P, s, B, N/P, D]` as `[B, N, s, D]`, summed over the readers of each head."""
    if readers > 1:
        part = part.unflatten(0, (-1, readers)).sum(dim=1)
    # [P, s, B, N/P, D] -> [B, s, N, D] -> [B, N, s, D]
    return part.permute(2, 1, 0, 3, 4).flatten(2, 3).transpose(1, 2)


def seq_to_head(query: Tensor, key: Tensor, value: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Exchanges tokens for heads in one collective.

    Args:
        query: `[B, H, S / P, D]`, this rank's tokens of all heads.
        key: `[B, K, S / P, D]`.
        value: `[B, K, S / P, Dv]`.
        group: the P ranks of the sequence.

    Returns:
        `[B, H / P, S, D]`, `[B, max(K / P, 1), S, D]`, `[B, max(K / P, 1), S, Dv]`: all tokens of this rank's heads.

    Raises:
        ShapeError: the heads can't be dealt evenly, or the tensors don't belong together.
    """
    if not (query.dtype == key.dtype == value.dtype):
        raise ShapeError(
            f"query is {query.dtype}, key {key.dtype}, value {value.dtype}; they travel as one message. "
            f"Cast them to one dtype before attention."
        )
    if key.shape[:3] != value.shape[:3] or query.shape[::2] != key.shape[::2] or query.shape[3] != key.shape[3]:
        raise ShapeError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} must agree in rows, "
            f"tokens and head size. Cross-attention and key caches can't be sharded by Ulysses."
        )
    result: tuple[Tensor, Tensor, Tensor] = _SeqToHead.apply(query, key, value, group)  # type: ignore[no-untyped-call]
    return result


def head_to_seq(out: Tensor, group: ProcessGroup) -> Tensor:
    """Exchanges heads for tokens in one collective: `[B, H / P, S, Dv]` -> `[B, S / P, H, Dv]`."""
    result: Tensor = _HeadToSeq.apply(out, group)  # type: ignore[no-untyped-call]
    return result


def exchange_and_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: ProcessGroup,
    description: SequenceDescription,
    call: AttentionCall,
    core: str,
) -> Tensor:
    """Runs Ulysses attention in transformers' layout: `[B, H, S / P, D]` in, `[B, S / P, H, Dv]` out."""
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        # As the fused kernels do it, but before the exchange, so that the narrow dtype travels.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    # [B, H, S/P, D] -> [B, H/P, S, D]
    query, key, value = seq_to_head(query, key, value, group)
    with _per_rank_dropout(call.dropout, group):
        out = core_attention(core, query, key, value, description, call)
    # [B, H/P, S, Dv] -> [B, S/P, H, Dv]
    return head_to_seq(out, group)


@contextmanager
def _per_rank_dropout(dropout: float, group: ProcessGroup) -> Iterator[None]:
    """Gives each rank's heads a dropout mask of their own, even where all ranks were seeded alike.

    The seed comes from the host's generator, which activation checkpointing rewinds: the recompute gets the same masks.
    """
    if dropout == 0.0:
        yield
        return
    seed = int(torch.randint(2**62, ()))
    with torch.random.fork_rng():
        torch.manual_seed(seed + group.rank())
        yield


def ulysses_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: ProcessGroup,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    document_ids: Tensor | SequenceDescription | None = None,
    core: str = "sdpa",
) -> Tensor:
    """Computes exact attention over a sequence whose tokens are spread over the ranks of `group`.

    Args:
        query: `[B, H, S / P, D]`, this rank's consecutive tokens.
        key: `[B, K, S / P, D]`; K divides H, and P divides K or K divides P.
        value: `[B, K, S / P, Dv]`.
        group: the P ranks, in the order of the tokens.
        is_causal: whether a token sees only itself and the tokens before it.
        scale: factor on the scores; 1 / sqrt(D) when None.
        dropout: probability of dropping an attention weight, with a different mask on each rank's heads.
        softcap: bound of the scores through tanh, where the core has it.
        document_ids: `[B, S]` of the whole sequence, equal for the tokens of one document, negative for padding; or a
            `SequenceDescription`, made once for a batch and used for all layers. None: each row is one document.
        core: `sdpa`, `eager`, `flash_attention_2`, ...

    Returns:
        `[B, H, S / P, Dv]`, this rank's tokens.

    Raises:
        ShapeError: heads that can't be dealt evenly, or shapes that don't fit each other.

    Source: DeepSpeed Ulysses (arXiv 2309.14509).
    """
    description = _describe(document_ids, query, group.size())
    call = AttentionCall(is_causal=is_causal, scale=scale, dropout=dropout, softcap=softcap)
    return exchange_and_attend(query, key, value, group, description, call, core).transpose(1, 2)


def _describe(document_ids: Tensor | SequenceDescription | None, query: Tensor, size: int) -> SequenceDescription:
    batch, length = query.shape[0], query.shape[2] * size
    if document_ids is None:
        return SequenceDescription(length, size, (((0, length),),) * batch)
    if isinstance(document_ids, Tensor):
        if tuple(document_ids.shape) != (batch, length):
            raise ShapeError(
                f"document_ids has shape {tuple(document_ids.shape)}; the whole sequence is {(batch, length)} "
                f"({size} ranks with {query.shape[2]} tokens each). Give the ids of all ranks' tokens."
            )
        return SequenceDescription.from_document_ids(document_ids, size)
    if (document_ids.batch_size, document_ids.sequence_length) != (batch, length):
        raise ShapeError(
            f"the description is of {document_ids.batch_size} rows with {document_ids.sequence_length} tokens, the "
            f"query of {batch} rows with {length} tokens on {size} ranks. Describe each batch anew."
        )
    return document_ids
