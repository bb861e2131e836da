"""Unified sequence parallel attention: Ulysses within a ring, each alone being the other at degree
1.

The tokens are partitioned over the ring first, and over the Ulysses ranks of each ring place. The
Ulysses exchange gives a rank all tokens of its ring place for some heads; the ring then attends
over the full sequence. Shapes: B = rows, H / K = query / key-value heads, U = Ulysses ranks, R =
ring ranks, P = U × R, D / Dv = head sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ulysses_accel.attention.alibi import check_slopes
from ulysses_accel.attention.call import AttentionCall
from ulysses_accel.attention.core import core_attention, core_cross_attention
from ulysses_accel.attention.cross import (
    check_lengths,
    encoder_of,
    local_description,
    sequences_to_heads,
)
from ulysses_accel.attention.describe import describe
from ulysses_accel.attention.heads import HeadSplit
from ulysses_accel.attention.ring.attention import attend_in_ring
from ulysses_accel.attention.ring.exchange import Exchange
from ulysses_accel.attention.ring.plan import RingPlan
from ulysses_accel.attention.saved_results import is_keeping
from ulysses_accel.attention.ulysses.exchange import head_to_seq, seq_to_head
from ulysses_accel.attention.ulysses.head_chunks import attend_in_chunks, chunks_of
from ulysses_accel.errors import ConfigError, ShapeError
from ulysses_accel.sequence.description import SequenceDescription, visible_rows
from ulysses_accel.sequence.layout import Layout


@dataclass(frozen=True)
class SequenceAttention:
    """The attention of one model: which ranks share its sequences, and how.

    Args:
        ulysses_group: the U ranks that exchange tokens for heads; None for one rank.
        ring_group: the R ranks that rotate keys; None for one rank.
        core: transformers' name of the attention that runs on full sequences, where there is no
            ring.
        exchange: how keys travel around the ring.
        head_stride: how many key/value heads an `all_gather` takes at a time; all when None.
        head_chunks: in how many parts the heads of a Ulysses rank are exchanged and attended to,
            one after another, in less memory; cross-attention is exchanged at once.
    """

    ulysses_group: ProcessGroup | None
    ring_group: ProcessGroup | None = None
    core: str = "sdpa"
    exchange: Exchange = "p2p"
    head_stride: int | None = None
    head_chunks: int = 1

    @property
    def ring_size(self) -> int:
        """Ranks R of the ring."""
        return self.ring_group.size() if self.ring_group is not None else 1

    @property
    def ulysses_size(self) -> int:
        """Ranks U that exchange tokens for heads."""
        return self.ulysses_group.size() if self.ulysses_group is not None else 1

    @property
    def shard(self) -> int:
        """Which of the sequence's P shards this rank holds."""
        ring_rank = self.ring_group.rank() if self.ring_group is not None else 0
        return ring_rank * self.ulysses_size + (
            self.ulysses_group.rank() if self.ulysses_group is not None else 0
        )

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        description: SequenceDescription,
        call: AttentionCall,
        window: int | None = None,
        *,
        crosses: bool = False,
    ) -> Tensor:
        """Runs exact attention in transformers' layout.

        Args:
            query: `[B, H, S / P, D]`, this rank's tokens.
            key: `[B, K, S / P, D]`; with cross-attention the tokens that this rank has of
                `description.encoder`.
            value: `[B, K, S / P, Dv]`.
            description: the whole batch's documents and layout.
            call: scale, causality, dropout, soft cap, sinks and ALiBi slopes of all heads.
            window: with causal attention, how many tokens one sees, itself included; without, how
                far away on either side they may be; None for all.
            crosses: whether every token sees every token of `description.encoder`, whatever `call`
                says of causality.

        Returns:
            `[B, S / P, H, Dv]`.
        """
        if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
            # As the fused kernels do it, but before the exchange, so that the narrow dtype travels.
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if call.alibi_slopes is not None:
            check_slopes(call.alibi_slopes, query.shape[1])
        if crosses:
            return self._cross(query, key, value, description, call, window)
        group = self.ulysses_group
        if group is None or group.size() == 1:
            return self._attend(query, key, value, description, call, window).transpose(1, 2)
        split = HeadSplit(group.size(), query.shape[1], key.shape[1])
        chunks = chunks_of(query, value, split, self.head_chunks)
        if chunks.number > 1:
            return attend_in_chunks(
                query,
                key,
                value,
                group,
                chunks,
                lambda q, k, v, heads: self._attend(
                    q, k, v, description, call.for_heads(*heads), window
                ),
            )
        # [B, H, S/P, D] -> [B, H/U, S/R, D]
        query, key, value = seq_to_head(query, key, value, group)
        out = self._attend(
            query, key, value, description, call.for_heads(*split.queries(group.rank())), window
        )
        # [B, H/U, S/R, Dv] -> [B, S/P, H, Dv]
        return head_to_seq(out, group, split)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        description: SequenceDescription,
        call: AttentionCall,
        window: int | None,
    ) -> Tensor:
        """Attends over the full sequence with this rank's heads, `[B, h, S / R, D]` -> `[B, h, S /
        R, Dv]`.
        """
        if window is not None and window >= description.sequence_length:
            window = None
        if description.ring_size != self.ring_size:
            raise ShapeError(
                f"the batch was laid out for a ring of {description.ring_size} ranks, this model's "
                "ring has "
                f"{self.ring_size}. Prepare loader and model with the same configuration."
            )
        has_prefixes = call.is_causal and description.has_prefixes
        if (
            self.ring_size == 1
            and window is None
            and not has_prefixes
            and self._core_computes(call)
        ):
            with _per_rank_dropout(call.dropout, self.shard):
                return core_attention(self.core, query, key, value, description, call)
        return self._by_blocks(query, key, value, description, call, window)

    def _cross(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        description: SequenceDescription,
        call: AttentionCall,
        window: int | None,
    ) -> Tensor:
        """Runs cross-attention, `[B, H, T / P, D]` -> `[B, T / P, H, Dv]`; see `__call__`."""
        if window is not None:
            raise ConfigError(
                f"window={window} with cross-attention is not computed. Use window=None."
            )
        if call.alibi_slopes is not None:
            raise ConfigError(
                "alibi_slopes with cross-attention are not computed. Use alibi_slopes=None."
            )
        encoder = encoder_of(description, key)
        check_lengths(query, key, description, encoder)
        call, group = replace(call, is_causal=False), self.ulysses_group
        if encoder.num_shards == 1:
            # Every rank has all keys, so its tokens can attend by themselves.
            local = local_description(description, self.shard)
            return self._attend_across(query, key, value, local, encoder, call).transpose(1, 2)
        if group is None or group.size() == 1:
            return self._attend_across(query, key, value, description, encoder, call).transpose(
                1, 2
            )
        split = HeadSplit(group.size(), query.shape[1], key.shape[1])
        # [B, H, T/P, D], [B, K, S/P, D] -> [B, H/U, T/R, D], [B, K/U, S/R, D]
        query, key, value = sequences_to_heads(query, key, value, group, split)
        call = call.for_heads(*split.queries(group.rank()))
        # [B, H/U, T/R, Dv] -> [B, T/P, H, Dv]
        return head_to_seq(
            self._attend_across(query, key, value, description, encoder, call), group, split
        )

    def _attend_across(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        description: SequenceDescription,
        encoder: SequenceDescription,
        call: AttentionCall,
    ) -> Tensor:
        """Attends to `encoder` with this rank's heads, `[B, h, T / R, D]` -> `[B, h, T / R,
        Dv]`.
        """
        if description.ring_size == 1 and self._core_computes(call):
            seen = (visible_rows(description), visible_rows(encoder))
            with _per_rank_dropout(call.dropout, self.shard):
                return core_cross_attention(self.core, query, key, value, seen, call)
        return self._by_blocks(query, key, value, description, call, None, encoder)

    def _core_computes(self, call: AttentionCall) -> bool:
        """Whether the core computes all that a call requests; the block kernels do, and return what
        a checkpoint keeps.
        """
        is_plain = call.sinks is None and call.alibi_slopes is None
        return is_plain and (call.softcap is None or self.core != "sdpa") and not is_keeping()

    def _by_blocks(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        description: SequenceDescription,
        call: AttentionCall,
        window: int | None,
        encoder: SequenceDescription | None = None,
    ) -> Tensor:
        """Attends in blocks, around the ring where there is one, by a plan that the batch's first
        such layer computes.
        """
        group = self.ring_group if description.ring_size > 1 else None
        rank = group.rank() if group is not None else 0
        plan_key = (rank, call.is_causal, window, encoder is not None and encoder.sequence_length)
        if plan_key not in description.cache:
            description.cache[plan_key] = RingPlan.of(
                description, rank, call.is_causal, window, encoder
            )
        return attend_in_ring(
            query,
            key,
            value,
            group,
            description.cache[plan_key],
            exchange=self.exchange,
            head_stride=self.head_stride,
            call=call,
            seed_offset=self.shard,
        )


@contextmanager
def _per_rank_dropout(dropout: float, shard: int) -> Iterator[None]:
    """Gives each rank a different dropout mask, even where all ranks have the same seed.

    The seed comes from the host's generator, which activation checkpointing rewinds: the recompute
    gets the same masks.
    """
    if dropout == 0.0:
        yield
        return
    seed = int(torch.randint(2**62, ()))
    with torch.random.fork_rng():
        torch.manual_seed(seed + shard)
        yield


def usp_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ulysses_group: ProcessGroup | None,
    ring_group: ProcessGroup | None,
    *,
    is_causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    document_ids: Tensor | SequenceDescription | None = None,
    layout: Layout = "zigzag",
    exchange: Exchange = "p2p",
    core: str = "sdpa",
    key_lengths: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    sinks: Tensor | None = None,
    key_description: SequenceDescription | None = None,
    head_chunks: int = 1,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Computes exact attention over a sequence partitioned over a ring of Ulysses groups.

    Args:
        query: `[B, H, S / P, D]`; U is at most H.
        key: `[B, K, S / P, D]`; K divides H.
        value: `[B, K, S / P, Dv]`.
        ulysses_group: the U ranks that hold one ring place's tokens, in order; None for one.
        ring_group: the R ranks of the ring; None for one.
        is_causal: whether a token sees only itself and the tokens before it.
        window: with causal attention, how many tokens one sees, itself included; without, how far
            away on either side they may be; None for all.
        scale: factor on the scores; 1 / sqrt(D) when None.
        dropout: probability of dropping an attention weight, with a different mask on each rank.
        softcap: bound of the scores through tanh; None for no bound.
        document_ids: `[B, S]` of the full sequence in its original order, equal for the tokens of
            one document, negative for padding; or a `SequenceDescription`, computed once for a
            batch. None: each row is one document.
        layout: how the tokens are distributed over the ring: `contiguous`, `zigzag` or `striped`.
        exchange: how keys travel around the ring: `p2p` or `all_gather`.
        core: the attention on full sequences, where there is no ring: `sdpa`, `eager`,
            `flash_attention_2`, ...
        key_lengths: `[B]` tokens of each row; those after are padding.
        prefix_lengths: `[B]` or `[B, documents]` first tokens of a row's first or of each document
            that all tokens of the document see.
        sinks: `[H]`, a learned per-head logit in the softmax denominator.
        key_description: for cross-attention, the sequence that `key` and `value` are of; every
            token sees all of it. It has one shard where every rank has it in full. None for
            self-attention.
        head_chunks: in how many parts a Ulysses rank's heads are exchanged and attended to, one
            after another: less memory, the same result and bytes.
        alibi_slopes: `[H]`, constants; slope * (key position - query position) is added to the
            scores.

    Returns:
        `[B, H, S / P, Dv]`, this rank's tokens.

    Raises:
        ShapeError: heads or tokens that can't be partitioned, or shapes that don't fit each
            other.

    Source: USP (arXiv 2405.07719).
    """
    attention = SequenceAttention(
        ulysses_group, ring_group, core, exchange, head_chunks=head_chunks
    )
    num_shards = attention.ring_size * attention.ulysses_size
    shape = (query.shape[0], query.shape[2] * num_shards)
    description = describe(
        document_ids, key_lengths, prefix_lengths, shape, num_shards, attention.ring_size, layout
    )
    if key_description is not None and description.encoder is not key_description:
        description = replace(description, encoder=key_description, cache={})
    call = AttentionCall(is_causal, scale, dropout, softcap, sinks, alibi_slopes)
    crosses = key_description is not None
    return attention(query, key, value, description, call, window, crosses=crosses).transpose(1, 2)


def ulysses_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: ProcessGroup,
    *,
    is_causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    document_ids: Tensor | SequenceDescription | None = None,
    core: str = "sdpa",
    key_lengths: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    sinks: Tensor | None = None,
    key_description: SequenceDescription | None = None,
    head_chunks: int = 1,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Computes exact attention over a sequence whose tokens are partitioned over the ranks of
    `group`.

    Args:
        query: `[B, H, S / P, D]`, this rank's consecutive tokens; P is at most H.
        key: `[B, K, S / P, D]`; K divides H.
        value: `[B, K, S / P, Dv]`.
        group: the P ranks, in the order of the tokens.
        is_causal: whether a token sees only itself and the tokens before it.
        window: with causal attention, how many tokens one sees, itself included; without, how far
            away on either side they may be; None for all.
        scale: factor on the scores; 1 / sqrt(D) when None.
        dropout: probability of dropping an attention weight, with a different mask on each rank's
            heads.
        softcap: bound of the scores through tanh; None for no bound.
        document_ids: as for `usp_attention`.
        core: `sdpa`, `eager`, `flash_attention_2`, ...
        key_lengths: as for `usp_attention`.
        prefix_lengths: as for `usp_attention`.
        sinks: as for `usp_attention`.
        key_description: as for `usp_attention`.
        head_chunks: as for `usp_attention`.
        alibi_slopes: as for `usp_attention`.

    Returns:
        `[B, H, S / P, Dv]`, this rank's tokens.

    Raises:
        ShapeError: heads that can't be partitioned, or shapes that don't fit each other.

    Source: DeepSpeed Ulysses (arXiv 2309.14509).
    """
    return usp_attention(
        query,
        key,
        value,
        group,
        None,
        is_causal=is_causal,
        window=window,
        scale=scale,
        dropout=dropout,
        softcap=softcap,
        document_ids=document_ids,
        core=core,
        key_lengths=key_lengths,
        prefix_lengths=prefix_lengths,
        sinks=sinks,
        key_description=key_description,
        head_chunks=head_chunks,
        alibi_slopes=alibi_slopes,
    )
