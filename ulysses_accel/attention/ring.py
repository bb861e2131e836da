"""Ring attention: keys and values travel past every rank's queries, block by block, in O(S / R) memory.

Two exchanges. `p2p` rotates downwards, the next hop started before the block's compute; causal zigzag drops the half
that no later rank sees, so 0.75 of the usual bytes travel, and gradients come home in R - 1 hops. `all_gather` sends
each rank exactly the keys it sees (with a sliding window: the halo) in one collective, one group of heads at a time.
Only output and log-sum-exp are saved. Merging and gradients accumulate in float32 (float64 for float64).

Shapes: B = rows, H / K = query / key-value heads, R = ranks, s = S / R tokens, D / Dv = head sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from ulysses_accel.attention.blocks import (
    accumulation_dtype,
    add_tile,
    empty_accumulators,
    kernel_for,
    merge_tile,
    tile_views,
)
from ulysses_accel.attention.plan import RingPlan, total_length
from ulysses_accel.attention.tiles import Tile
from ulysses_accel.collectives import all_to_all
from ulysses_accel.errors import ConfigError, ShapeError
from ulysses_accel.sequence import Rows, SequenceDescription
from ulysses_accel.sequence_layout import Layout

Exchange = Literal["p2p", "all_gather"]


def attend(out: Tensor, lse: Tensor, query: Tensor, keys: Tensor, plan: RingPlan, source: int, scale: float) -> None:
    """Merges attention to one rank's keys `[2, B, K, k, D]` into `out` `[B, H, s, D]` and `lse` `[B, H, s]`."""
    kernel = kernel_for(query)
    for rows, row_tiles in plan.tiles_for(source):
        for tile in row_tiles:
            q, k, v = tile_views(tile, query[rows], keys[0, rows], keys[1, rows], is_query=(True, False, False))
            part, part_lse = kernel.forward(q, k, v, tile.shape != "full", scale)
            merge_tile(out[rows], lse[rows], tile, part, part_lse)


@dataclass(frozen=True)
class _Saved:
    """What a rank keeps of its queries for the backward pass; `grad_query` is the running total."""

    grad: Tensor
    query: Tensor
    out: Tensor
    lse: Tensor
    grad_query: Tensor

    def attend_backward(self, keys: Tensor, grad_keys: Tensor, plan: RingPlan, source: int, scale: float) -> None:
        """Adds the gradients of attention to one rank's keys to `grad_query` and to `grad_keys` `[2, B, K, k, D]`."""
        kernel = kernel_for(self.query)
        for rows, row_tiles in plan.tiles_for(source):
            for tile in row_tiles:
                self._tile_backward(kernel, rows, tile, keys, grad_keys, scale)

    def _tile_backward(
        self, kernel: Any, rows: slice, tile: Tile, keys: Tensor, grad_keys: Tensor, scale: float
    ) -> None:
        grad, query, key, value, out, lse = tile_views(
            tile,
            self.grad[rows],
            self.query[rows],
            keys[0, rows],
            keys[1, rows],
            self.out[rows],
            self.lse[rows],
            is_query=(True, True, False, False, True, True),
        )
        dq, dk, dv = kernel.backward(grad, query, key, value, out, lse, tile.shape != "full", scale)
        add_tile(self.grad_query[rows], tile, dq, is_query=True)
        add_tile(grad_keys[0, rows], tile, dk, is_query=False)
        add_tile(grad_keys[1, rows], tile, dv, is_query=False)


class _Rotation:
    """The messages of one pass around the ring; all of a hop's go in one batch, in the same order on every rank."""

    def __init__(self, group: ProcessGroup, plan: RingPlan) -> None:
        self.group, self.plan = group, plan
        members = dist.get_process_group_ranks(group)
        self.members = members
        self.below = members[(plan.rank - 1) % plan.size]
        self.above = members[(plan.rank + 1) % plan.size]

    def post(self, sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]]) -> list[Any]:
        """Starts sends and receives with global ranks; returns what to wait for."""
        operations = [dist.P2POp(dist.isend, tensor, peer, self.group) for tensor, peer in sends]
        operations += [dist.P2POp(dist.irecv, tensor, peer, self.group) for tensor, peer in receives]
        return dist.batch_isend_irecv(operations) if operations else []

    def keys_for_hop(self, keys: Tensor, hop: int) -> tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]]]:
        """Returns the sends and receives that bring hop `hop`'s keys `[2, B, K, k, D]`, with `keys` those at hand."""
        plan = self.plan
        reader = (plan.rank - 1) % plan.size
        outgoing = keys[:, :, :, : plan.carried_length(reader, hop)].contiguous()
        shape = [*keys.shape[:3], plan.carried_length(plan.rank, hop), keys.shape[4]]
        return [(outgoing, self.below)], [(keys.new_empty(shape), self.above)]


def _wait(work: list[Any]) -> None:
    for handle in work:
        handle.wait()


def _rotate_forward(
    query: Tensor, keys: Tensor, plan: RingPlan, group: ProcessGroup, scale: float
) -> tuple[Tensor, Tensor]:
    """Runs the p2p forward: `[B, H, s, D]`, `[2, B, K, s, D]` -> output `[B, H, s, D]`, log-sum-exp `[B, H, s]`."""
    out, lse = empty_accumulators(query, query.shape[3])
    rotation = _Rotation(group, plan)
    for hop in range(plan.size):
        work: list[Any] = []
        if hop + 1 < plan.size:
            sends, receives = rotation.keys_for_hop(keys, hop + 1)
            work = rotation.post(sends, receives)
        attend(out, lse, query, keys, plan, (plan.rank + hop) % plan.size, scale)
        _wait(work)
        if work:
            keys = receives[0][0]
    return out, lse


def _rotate_backward(saved: _Saved, keys: Tensor, plan: RingPlan, group: ProcessGroup, scale: float) -> Tensor:
    """Runs the p2p backward; returns the gradient of this rank's keys `[2, B, K, s, D]`.

    A block's gradient follows its keys from their first reader on, and comes home from the last one.
    """
    rotation = _Rotation(group, plan)
    own = torch.zeros_like(keys, dtype=saved.grad_query.dtype)
    home = _GradientsHome(rotation, own)
    for hop in range(plan.size):
        sends, receives = rotation.keys_for_hop(keys, hop + 1) if hop + 1 < plan.size else ([], [])
        work = rotation.post(sends, receives)
        grad_keys = own if hop == 0 else torch.zeros_like(keys, dtype=own.dtype)
        saved.attend_backward(keys, grad_keys, plan, (plan.rank + hop) % plan.size, scale)
        if hop > 0:
            home.pass_on(grad_keys, hop)
        _wait(work)
        if receives:
            keys = receives[0][0]
    home.finish()
    return own


class _GradientsHome:
    """Carries the gradients of travelling keys to the ranks that the keys came from."""

    def __init__(self, rotation: _Rotation, own: Tensor) -> None:
        self.rotation, self.plan, self.own = rotation, rotation.plan, own
        self.work: list[Any] = []
        self.arriving: Tensor | None = None
        self.late: Tensor | None = None

    def pass_on(self, grad_keys: Tensor, hop: int) -> None:
        """Adds what earlier readers found to this reader's part `[2, B, K, k, D]` and sends the sum on."""
        _wait(self.work)
        if self.arriving is not None:
            grad_keys[:, :, :, : self.arriving.shape[3]] += self.arriving
        plan, last = self.plan, hop + 1 == self.plan.size
        below, above = (plan.rank - 1) % plan.size, (plan.rank + 1) % plan.size
        # The last reader's neighbour below is home: it gets all that the last reader was brought.
        length = plan.carried_length(plan.rank, hop) if last else plan.carried_length(below, hop + 1)
        self.arriving = self._buffer(
            plan.carried_length(above, hop) if last else plan.carried_length(plan.rank, hop + 1)
        )
        sends = [(grad_keys[:, :, :, :length].contiguous(), self.rotation.below)]
        receives = [(self.arriving, self.rotation.above)]
        if plan.drops_late_half and not last:
            self._late_half(grad_keys, hop, sends, receives)
        self.work = self.rotation.post(sends, receives)

    def _late_half(
        self, grad_keys: Tensor, hop: int, sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]]
    ) -> None:
        """Adds the transfer of a late half's gradient, which ends its way at rank 0, straight to its home."""
        half = self.plan.shard_length // 2
        if self.plan.rank == 0:
            sends.append((grad_keys[:, :, :, half:].contiguous(), self.rotation.members[hop]))
        elif self.plan.rank == hop:
            self.late = self._buffer(half)
            receives.append((self.late, self.rotation.members[0]))

    def _buffer(self, length: int) -> Tensor:
        return self.own.new_empty([*self.own.shape[:3], length, self.own.shape[4]])

    def finish(self) -> None:
        """Adds what came home to this rank's gradient."""
        _wait(self.work)
        if self.arriving is not None:
            self.own[:, :, :, : self.arriving.shape[3]] += self.arriving
        if self.late is not None:
            self.own[:, :, :, self.plan.shard_length // 2 :] += self.late


def _gather_keys(keys: Tensor, plan: RingPlan, group: ProcessGroup) -> list[Tensor]:
    """Returns for each rank its keys `[2, B, K, s, D]` where this rank sees them; the rest is not filled.

    One collective moves exactly the tokens that are seen.
    """
    # [2, B, K, s, D] -> [tokens seen elsewhere, 2, B, K, D]
    token_major = keys.permute(3, 0, 1, 2, 4)
    parts = [token_major[start:stop] for ranges in plan.outgoing for start, stop in ranges]
    send = torch.cat(parts) if parts else token_major[:0]
    sizes = [total_length(ranges) for ranges in plan.outgoing]
    received = all_to_all(send.contiguous(), group, sizes, [total_length(ranges) for ranges in plan.incoming])
    gathered, offset = [], 0
    for rank, ranges in enumerate(plan.incoming):
        if rank == plan.rank:
            gathered.append(keys)
            continue
        block = keys.new_empty(keys.shape if ranges else (*keys.shape[:3], 0, keys.shape[4]))
        for start, stop in ranges:
            block[:, :, :, start:stop] = received[offset : offset + stop - start].permute(1, 2, 3, 0, 4)
            offset += stop - start
        gathered.append(block)
    return gathered


def _scatter_gradients(grads: list[Tensor], plan: RingPlan, group: ProcessGroup) -> Tensor:
    """Returns the gradient of this rank's keys, from each rank's gradients of all keys: the adjoint of the gather."""
    own = grads[plan.rank]
    parts = [
        grads[rank][:, :, :, start:stop].permute(3, 0, 1, 2, 4)
        for rank, ranges in enumerate(plan.incoming)
        for start, stop in ranges
    ]
    send = torch.cat(parts) if parts else own.new_empty(0, *own.shape[:3], own.shape[4])
    sizes = [total_length(ranges) for ranges in plan.incoming]
    received = all_to_all(send, group, sizes, [total_length(ranges) for ranges in plan.outgoing])
    offset = 0
    for ranges in plan.outgoing:
        for start, stop in ranges:
            own[:, :, :, start:stop] += received[offset : offset + stop - start].permute(1, 2, 3, 0, 4)
            offset += stop - start
    return own


class _RingAttention(torch.autograd.Function):
    """[B, H, s, D], [B, K, s, D], [B, K, s, D] -> [B, H, s, D], exact over all ranks' keys."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: RingPlan,
        group: ProcessGroup,
        scale: float,
        exchange: Exchange,
    ) -> Tensor:
        ctx.plan, ctx.group, ctx.scale, ctx.exchange = plan, group, scale, exchange
        keys = torch.stack([key, value])
        if plan.size == 1:
            out, lse = empty_accumulators(query, query.shape[3])
            attend(out, lse, query, keys, plan, 0, scale)
        elif exchange == "p2p":
            out, lse = _rotate_forward(query, keys, plan, group, scale)
        else:
            out, lse = empty_accumulators(query, query.shape[3])
            for source, block in enumerate(_gather_keys(keys, plan, group)):
                attend(out, lse, query, block, plan, source, scale)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, keys, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, out, lse = ctx.saved_tensors
        total = torch.zeros_like(query, dtype=accumulation_dtype(query.dtype))
        saved = _Saved(grad.contiguous(), query, out, lse, total)
        if ctx.plan.size == 1:
            grad_keys = torch.zeros_like(keys, dtype=total.dtype)
            saved.attend_backward(keys, grad_keys, ctx.plan, 0, ctx.scale)
        elif ctx.exchange == "p2p":
            grad_keys = _rotate_backward(saved, keys, ctx.plan, ctx.group, ctx.scale)
        else:
            grads = []
            for source, block in enumerate(_gather_keys(keys, ctx.plan, ctx.group)):
                grads.append(torch.zeros_like(block, dtype=total.dtype))
                saved.attend_backward(block, grads[-1], ctx.plan, source, ctx.scale)
            grad_keys = _scatter_gradients(grads, ctx.plan, ctx.group)
        grad_key, grad_value = grad_keys.to(keys.dtype).unbind(0)
        return total.to(query.dtype), grad_key, grad_value, None, None, None, None


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
) -> Tensor:
    """Computes exact attention over a sequence whose tokens are laid out over the ranks of a ring.

    Args:
        query: `[B, H, S / R, D]`, this rank's tokens in the order of `layout` (`tiles.runs`).
        key: `[B, K, S / R, D]`; K divides H.
        value: `[B, K, S / R, Dv]`, Dv at most D.
        group: the R ranks.
        layout: `contiguous`, `zigzag` or `striped`.
        exchange: `p2p` rotates keys in O(S / R) memory; `all_gather` sends each rank what it sees, in one collective.
        is_causal: whether a token sees only itself and the tokens before it.
        window: with causal attention, how many tokens one sees, itself included; None for all.
        document_ids: `[B, S]` of the whole sequence in its own order, equal for the tokens of one document, negative
            for padding; or a `SequenceDescription`. None: each row is one document.
        scale: factor on the scores; 1 / sqrt(D) when None.
        head_stride: with `all_gather`, how many key/value heads are gathered at a time; all when None.

    Returns:
        `[B, H, S / R, Dv]`, this rank's tokens; zeros for padding.

    Raises:
        ConfigError: a layout, exchange or window that is not computed.
        ShapeError: shapes that don't fit each other.

    Source: Ring Attention (arXiv 2310.01889).
    """
    if exchange not in ("p2p", "all_gather"):
        raise ConfigError(f"exchange={exchange!r} is not known. Use 'p2p' or 'all_gather'.")
    rows = _rows(document_ids, query.shape[0], query.shape[2] * group.size())
    plan = RingPlan(query.shape[2] * group.size(), group.size(), group.rank(), layout, rows, is_causal, window)
    return attend_in_ring(query, key, value, group, plan, scale=scale, exchange=exchange, head_stride=head_stride)


def attend_in_ring(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: ProcessGroup | None,
    plan: RingPlan,
    *,
    scale: float | None,
    exchange: Exchange,
    head_stride: int | None = None,
) -> Tensor:
    """Runs ring attention by a plan that was made once for the batch; see `ring_attention`."""
    _check_shapes(query, key, value)
    head_dim, value_dim = query.shape[3], value.shape[3]
    scale = scale if scale is not None else head_dim**-0.5
    # The kernels take one head size for all three; zeros behind the values change nothing.
    value = F.pad(value, (0, head_dim - value_dim))
    stride = head_stride if exchange == "all_gather" and head_stride else key.shape[1]
    groups = query.shape[1] // key.shape[1]
    outs = [
        _RingAttention.apply(q, k, v, plan, group, scale, exchange)  # type: ignore[no-untyped-call]
        for q, k, v in zip(query.split(stride * groups, dim=1), key.split(stride, dim=1), value.split(stride, dim=1))
    ]
    out: Tensor = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
    return out[..., :value_dim]


def _rows(document_ids: Tensor | SequenceDescription | None, batch: int, length: int) -> Rows:
    if document_ids is None:
        return (((0, length),),) * batch
    if isinstance(document_ids, Tensor):
        document_ids = SequenceDescription.from_document_ids(document_ids, 1)
    if (document_ids.batch_size, document_ids.sequence_length) != (batch, length):
        raise ShapeError(
            f"the documents are of {document_ids.batch_size} rows with {document_ids.sequence_length} tokens, the "
            f"query of {batch} rows with {length} tokens on all ranks. Describe the whole sequence, each batch anew."
        )
    return document_ids.rows


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    if key.shape[:3] != value.shape[:3] or query.shape[2:] != key.shape[2:] or value.shape[3] > key.shape[3]:
        raise ShapeError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} must agree in rows, "
            f"tokens and head size, and value heads be no wider. Cross-attention in a ring is not computed."
        )
    if query.shape[1] % key.shape[1]:
        raise ShapeError(f"{key.shape[1]} key/value heads do not divide {query.shape[1]} query heads.")
