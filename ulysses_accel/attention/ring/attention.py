"""Ring attention: keys and values are sent around a ring of ranks, block by block, in O(S / R)
memory.

There are two exchanges. `p2p` rotates keys to the rank below, the next hop started before the
block's computation; causal zigzag drops the half that no later rank sees, so that 0.75 of the usual
bytes are sent, and gradients are returned in R - 1 hops. `all_gather` sends each rank exactly the
keys it sees (with a sliding window: the halo) in one collective, one group of heads at a time. Only
output and log-sum-exp are saved. Merges and gradients accumulate in float32 (float64 for float64).

Shapes: B = rows, H / K = query / key-value heads, R = ranks, s = S / R tokens, D / Dv = head sizes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ulysses_accel.attention.alibi import check_slopes
from ulysses_accel.attention.call import AttentionCall
from ulysses_accel.attention.describe import describe
from ulysses_accel.attention.kernels.base import Block, BlockKernel, accumulation_dtype
from ulysses_accel.attention.kernels.choice import kernel_for
from ulysses_accel.attention.ring.accumulate import (
    BlockSum,
    KeyBlock,
    alibi_of,
    in_order,
    key_views,
    merge_softmax,
    query_views,
)
from ulysses_accel.attention.ring.exchange import (
    Exchange,
    GatheredKeys,
    GradientReturn,
    Rotation,
    pack,
    unpack,
)
from ulysses_accel.attention.ring.plan import RingPlan
from ulysses_accel.attention.ring.tiles import Tile
from ulysses_accel.attention.saved_results import kept
from ulysses_accel.attention.sinks import sinks_gradient, with_sinks
from ulysses_accel.errors import ConfigError, ShapeError
from ulysses_accel.sequence.description import SequenceDescription
from ulysses_accel.sequence.layout import Layout
from ulysses_accel.sequence.sharding import next_multiple, pad_sequence_dim


@dataclass(frozen=True)
class _Ring:
    """The settings of one call, the same in forward and backward."""

    plan: RingPlan
    group: ProcessGroup | None
    kernel: BlockKernel
    scale: float
    exchange: Exchange
    seed: int
    slopes: Tensor | None

    @property
    def is_alone(self) -> bool:
        """Whether there is no other rank to exchange keys with."""
        return self.group is None or self.plan.size == 1

    def total(self, *likes: Tensor) -> BlockSum:
        """Returns a sum over tiles of tensors of these shapes."""
        return BlockSum(likes, accumulation_dtype(likes[0].dtype), self.row_slices)

    @property
    def row_slices(self) -> list[slice]:
        """The rows that tiles are computed for together."""
        return [rows for rows, _ in self.plan.row_groups]

    def tiles_for(self, source: int) -> Iterator[tuple[slice, Tile, Block]]:
        """Yields the tiles with one rank's keys, each with its rows and its kernel settings."""
        slopes, number = self.slopes, 0
        positions = None if slopes is None else self.plan.positions(source, slopes.device)
        for rows, tiles in self.plan.tiles_for(source):
            for tile in tiles:
                seed = _mixed_seed(self.seed, self.plan.rank, source, number) if self.seed else 0
                alibi = None
                if slopes is not None and positions is not None:
                    alibi = alibi_of(slopes, tile, positions)
                yield rows, tile, Block(tile.shape != "full", self.scale, seed, alibi)
                number += 1

    def forward(self, query: Tensor, keys: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Returns output `[B, H, s, D]` and log-sum-exp `[B, H, s]` over all ranks' keys.

        Args:
            query: `[B, H, s, D]`.
            keys: of this rank, as they are saved for the backward pass: key and value, or one
                message of both where keys are exchanged.
        """
        likes = (query, query[..., 0])
        dtype = accumulation_dtype(query.dtype)
        total = BlockSum(likes, dtype, self.row_slices, merge_softmax, (0.0, -math.inf))
        for source, blocks in self._blocks(keys):
            self._attend(total, query, blocks, source)
        out, lse = total.full()
        return out, lse

    def _blocks(self, keys: tuple[Tensor, ...]) -> Iterator[tuple[int, list[KeyBlock]]]:
        """Yields each rank and the blocks of its keys that are seen, this rank first."""
        plan = self.plan
        if self.group is None or self.is_alone:
            yield 0, [KeyBlock(0, *keys)]
        elif self.exchange == "p2p":
            for hop, message in Rotation(self.group, plan).keys(keys[0]):
                yield (plan.rank + hop) % plan.size, [KeyBlock(0, *unpack(message))]
        else:
            gathered = GatheredKeys(keys[0], plan, self.group)
            yield plan.rank, [KeyBlock(0, *unpack(keys[0]))]
            for source in _others(plan):
                yield source, gathered.blocks(source)

    def _attend(self, total: BlockSum, query: Tensor, blocks: list[KeyBlock], source: int) -> None:
        """Adds attention to one rank's keys to `total`."""
        for rows, tile, block in self.tiles_for(source):
            key_block = next(candidate for candidate in blocks if candidate.has(tile))
            (q,) = query_views(tile, query[rows])
            k, v = key_views(
                tile.moved(0, -key_block.start), key_block.key[rows], key_block.value[rows]
            )
            total.add(rows, tile.q_start, *in_order(tile, *self.kernel.forward(q, k, v, block)))

    def backward(self, saved: _Saved, keys: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Accumulates the gradient of the queries, and returns those of this rank's keys and values
        `[B, K, k, D]`.
        """
        if self.group is None or self.is_alone:
            return self._gradients(saved, [KeyBlock(0, *keys)], 0)[0].full()
        if self.exchange == "p2p":
            return self._rotate_backward(saved, keys[0], self.group)
        gathered = GatheredKeys(keys[0], self.plan, self.group)
        gradients = gathered.empty_gradients(saved.dtype)
        for source in _others(self.plan):
            gathered.write(
                gradients, source, self._gradients(saved, gathered.blocks(source), source)
            )
        local = self._local_gradients(saved, keys[0])
        gathered.return_gradients(gradients, local)
        return local

    def _rotate_backward(
        self, saved: _Saved, keys: Tensor, group: ProcessGroup
    ) -> tuple[Tensor, ...]:
        """Rotates the keys again; a block's gradient follows it from rank to rank, and is returned
        by the last one.

        This rank's keys are computed last, while the last gradients are sent, which are more bytes
        than the first keys.
        """
        rotation = Rotation(group, self.plan)
        gradients = GradientReturn(rotation, keys, saved.dtype)
        self._rotate_others(saved, keys, rotation, gradients)
        local = self._local_gradients(saved, keys)
        gradients.finish(local)
        return local

    def _rotate_others(
        self, saved: _Saved, keys: Tensor, rotation: Rotation, gradients: GradientReturn
    ) -> None:
        for hop, message in rotation.keys(keys):
            if hop > 0:
                source = (self.plan.rank + hop) % self.plan.size
                (total,) = self._gradients(saved, [KeyBlock(0, *unpack(message))], source)
                gradients.pass_on(total, hop)

    def _local_gradients(self, saved: _Saved, keys: Tensor) -> tuple[Tensor, ...]:
        """Returns the gradients of this rank's keys and values from its queries, in the
        accumulation dtype.
        """
        (total,) = self._gradients(saved, [KeyBlock(0, *unpack(keys))], self.plan.rank)
        return tuple(tensor.to(saved.dtype) for tensor in total.full())

    def _gradients(self, saved: _Saved, blocks: list[KeyBlock], source: int) -> list[BlockSum]:
        """Accumulates the gradient of the queries, and returns for each block that of its keys and
        values.
        """
        totals = [self.total(block.key, block.value) for block in blocks]
        for rows, tile, block in self.tiles_for(source):
            index = next(i for i, candidate in enumerate(blocks) if candidate.has(tile))
            self._tile_gradients(saved, blocks[index], totals[index], rows, tile, block)
        return totals

    def _tile_gradients(
        self, saved: _Saved, keys: KeyBlock, total: BlockSum, rows: slice, tile: Tile, block: Block
    ) -> None:
        # The tile in the block's indices.
        here = tile.moved(0, -keys.start)
        grad, query, out, lse = query_views(
            tile, saved.grad[rows], saved.query[rows], saved.out[rows], saved.lse[rows]
        )
        key, value = key_views(here, keys.key[rows], keys.value[rows])
        dq, *dkv = self.kernel.backward(grad, query, key, value, out, lse, block)
        saved.grad_query.add(rows, tile.q_start, *in_order(tile, dq))
        total.add(rows, here.seen_keys[0], *in_order(tile, *dkv))


@dataclass(frozen=True)
class _Saved:
    """What the backward pass needs of this rank's queries; `grad_query` accumulates their
    gradient.
    """

    grad: Tensor
    query: Tensor
    out: Tensor
    lse: Tensor
    grad_query: BlockSum

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that gradients are accumulated in."""
        return accumulation_dtype(self.query.dtype)


def _others(plan: RingPlan) -> list[int]:
    """Returns the other ranks of a ring, beginning with the one above."""
    return [(plan.rank + hop) % plan.size for hop in range(1, plan.size)]


def _mixed_seed(*numbers: int) -> int:
    """Returns a different seed for each tuple of numbers."""
    # Hashed, because torch's CPU generator uses only the low 32 bits of a seed.
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "little")


class _RingAttention(torch.autograd.Function):
    """[B, H, s, D], [B, K, k, D], [B, K, k, D], [H] -> [B, H, s, D], exact over all ranks' keys."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, ring: _Ring
    ) -> Tensor:
        ctx.ring = ring
        keys = (key, value) if ring.is_alone else (pack(key, value),)

        def compute() -> tuple[Tensor, Tensor]:
            out, lse = ring.forward(query, keys)
            if sinks is not None:
                out, lse = with_sinks(out, lse, sinks)
            return out.to(query.dtype), lse

        out, lse = kept("attention", compute)
        ctx.save_for_backward(query, out, lse, sinks, *keys)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, out, lse, sinks, *keys = ctx.saved_tensors
        ring: _Ring = ctx.ring
        saved = _Saved(_dense(grad), query, out, lse, ring.total(query))
        grads = [tensor.to(query.dtype) for tensor in ring.backward(saved, tuple(keys))]
        grad_sinks = None if sinks is None else sinks_gradient(grad, out, lse, sinks)
        (grad_query,) = saved.grad_query.full()
        return grad_query.to(query.dtype), *grads, grad_sinks, None


def _dense(grad: Tensor) -> Tensor:
    """Returns a gradient `[B, H, s, D]` in a memory layout that the kernels accept: contiguous,
    with heads or tokens first.
    """
    return grad if grad.transpose(1, 2).is_contiguous() else grad.contiguous()


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: ProcessGroup,
    *,
    layout: Layout = "zigzag",
    exchange: Exchange = "p2p",
    is_causal: bool = True,
    window: int | None = None,
    document_ids: Tensor | SequenceDescription | None = None,
    scale: float | None = None,
    head_stride: int | None = None,
    key_lengths: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    block_kernel: str | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Computes exact attention over a sequence whose tokens are distributed over the ranks of a
    ring.

    Args:
        query: `[B, H, S / R, D]`, this rank's tokens in the order of `layout`
            (`sequence.layout.runs`).
        key: `[B, K, S / R, D]`; K divides H.
        value: `[B, K, S / R, Dv]`, Dv at most D.
        group: the R ranks.
        layout: `contiguous`, `zigzag` or `striped`.
        exchange: `p2p` rotates keys in O(S / R) memory; `all_gather` sends each rank the keys that
            it sees, in one collective.
        is_causal: whether a token sees only itself and the tokens before it.
        window: with causal attention, how many tokens each one sees, itself included; without, the
            largest distance on either side; None for all.
        document_ids: `[B, S]` of the full sequence in order, equal for the tokens of one document,
            negative for padding; or a `SequenceDescription`. None: each row is one document.
        scale: factor on the scores; 1 / sqrt(D) when None.
        head_stride: with `all_gather`, how many key/value heads are gathered at a time; all when
            None.
        key_lengths: `[B]`, tokens of each row; those after are padding.
        prefix_lengths: `[B]` or `[B, documents]`, the number of first tokens of a row's first, or
            of each, document that all of its tokens see.
        sinks: `[H]`, a learned per-head logit in the softmax denominator.
        softcap: bound of the scores through tanh; None for no bound.
        dropout: probability of dropping an attention weight.
        block_kernel: name of the kernel that computes the blocks (`kernels.choice`); chosen
            automatically when None.
        alibi_slopes: `[H]`; slope * (key position - query position) is added to the scores;
            constants.

    Returns:
        `[B, H, S / R, Dv]`, this rank's tokens; zeros for padding.

    Raises:
        ConfigError: an unknown layout, exchange, window or kernel.
        ShapeError: the shapes don't fit.
        UnsupportedModelError: the requested kernel does not support the call.

    Source: Ring Attention (arXiv 2310.01889).
    """
    size = group.size()
    description = describe(
        document_ids,
        key_lengths,
        prefix_lengths,
        (query.shape[0], query.shape[2] * size),
        size,
        size,
        layout,
    )
    plan = RingPlan(
        query.shape[2] * size,
        size,
        group.rank(),
        layout,
        description.rows,
        is_causal,
        window,
        description.holes,
        description.prefixes,
    )
    call = AttentionCall(is_causal, scale, dropout, softcap, sinks, alibi_slopes)
    return attend_in_ring(
        query,
        key,
        value,
        group,
        plan,
        call=call,
        exchange=exchange,
        head_stride=head_stride,
        block_kernel=block_kernel,
    )


def attend_in_ring(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: ProcessGroup | None,
    plan: RingPlan,
    *,
    scale: float | None = None,
    exchange: Exchange = "p2p",
    head_stride: int | None = None,
    call: AttentionCall | None = None,
    seed_offset: int = 0,
    block_kernel: str | None = None,
) -> Tensor:
    """Runs ring attention by a plan that was computed once for the batch; see `ring_attention`.

    Args:
        query: `[B, H, s, D]`.
        key: `[B, K, k, D]`.
        value: `[B, K, k, Dv]`.
        group: the R ranks; None for one.
        plan: of this rank for this batch; tells which tokens see which, causality included.
        scale: factor on the scores, where `call` has none.
        exchange: as for `ring_attention`.
        head_stride: as for `ring_attention`.
        call: scale, soft cap, dropout, and sinks and slopes `[H]` of these heads.
        seed_offset: differs between the same ranks of different rings, for their dropout masks.
        block_kernel: as for `ring_attention`.

    Returns:
        `[B, H, s, Dv]`.
    """
    call = call if call is not None else AttentionCall(plan.is_causal)
    if exchange not in ("p2p", "all_gather"):
        raise ConfigError(f"exchange={exchange!r} is not known. Use 'p2p' or 'all_gather'.")
    _check_shapes(query, key, value, plan)
    if call.alibi_slopes is not None:
        check_slopes(call.alibi_slopes, query.shape[1])
    head_dim, value_dim = query.shape[3], value.shape[3]
    if call.scale is not None:
        scale = call.scale
    # The kernels take one head size for query, key and value, a multiple of eight on GPUs; zeros
    # appended to the features change no score.
    width = next_multiple(head_dim, 8) if query.is_cuda else head_dim
    query, key, value = (
        pad_sequence_dim(tensor, width, 0.0, dim=3) for tensor in (query, key, value)
    )
    kernel = kernel_for(
        query, call.softcap, call.dropout, block_kernel, call.alibi_slopes is not None
    )
    scale = scale if scale is not None else head_dim**-0.5
    stride = head_stride if exchange == "all_gather" and head_stride else key.shape[1]
    groups = query.shape[1] // key.shape[1]
    outs = []
    for first in range(0, key.shape[1], stride):
        # From the CPU's generator, which activation checkpointing restores: the recompute gets the
        # same dropout masks.
        seed = _mixed_seed(int(torch.randint(2**62, ())), seed_offset) if call.dropout else 0
        part = call.for_heads(first * groups, (first + stride) * groups)
        slopes = None if part.alibi_slopes is None else part.alibi_slopes.to(query.device)
        ring = _Ring(plan, group, kernel, scale, exchange, seed, slopes)
        q = _heads(query, first * groups, stride * groups)
        k, v = (_heads(tensor, first, stride) for tensor in (key, value))
        outs.append(_RingAttention.apply(q, k, v, part.sinks, ring))  # type: ignore[no-untyped-call]
    out: Tensor = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
    return out[..., :value_dim] if value_dim < width else out


def _heads(tensor: Tensor, first: int, number: int) -> Tensor:
    """Returns some heads of `[B, N, s, D]`; the tensor itself for all of them, because the backward
    of a view copies the gradient.
    """
    return tensor if number >= tensor.shape[1] else tensor[:, first : first + number]


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, plan: RingPlan) -> None:
    fits = query.shape[3] == key.shape[3] >= value.shape[3]
    if key.shape[:3] != value.shape[:3] or not fits:
        raise ShapeError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} "
            "must agree in rows, tokens and head size, and value heads be no wider."
        )
    lengths, expected = (query.shape[2], key.shape[2]), (plan.shard_length, plan.key_shard_length)
    if lengths != expected or not query.shape[0] == key.shape[0] == len(plan.rows):
        raise ShapeError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} must have {expected[0]} and "
            f"{expected[1]} tokens in {len(plan.rows)} rows, as the batch was described. Describe "
            "the full sequence of each batch; with cross-attention also that of the keys "
            "(key_description)."
        )
    if query.shape[1] % key.shape[1]:
        raise ShapeError(
            f"{key.shape[1]} key/value heads do not divide {query.shape[1]} query heads."
        )
