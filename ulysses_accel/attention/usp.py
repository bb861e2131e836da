"""Unified sequence parallel attention: Ulysses within a ring, each alone being the other at degree 1.

The tokens are dealt over the ring first and over the Ulysses ranks within. The Ulysses exchange gives a rank all tokens
of its ring place for some heads; the ring then attends over the whole sequence.
Shapes: B = rows, H / K = query / key-value heads, U = Ulysses ranks, R = ring ranks, P = U × R, D / Dv = head sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ulysses_accel.attention.heads import HeadSplit
from ulysses_accel.attention.kernels import AttentionCall, core_attention
from ulysses_accel.attention.plan import RingPlan
from ulysses_accel.attention.ring import Exchange, attend_in_ring
from ulysses_accel.attention.ulysses import head_to_seq, seq_to_head
from ulysses_accel.errors import ShapeError, UnsupportedModelError
from ulysses_accel.sequence import SequenceDescription
from ulysses_accel.sequence_layout import Layout


@dataclass(frozen=True)
class SequenceAttention:
    """The attention of one model: which ranks share its sequences, and how.

    Args:
        ulysses_group: the U ranks that exchange tokens for heads; None for one rank.
        ring_group: the R ranks that rotate keys; None for one rank.
        core: transformers' name of the attention that runs on whole sequences, where there is no ring.
        exchange: how keys travel around the ring.
    """

    ulysses_group: ProcessGroup | None
    ring_group: ProcessGroup | None = None
    core: str = "sdpa"
    exchange: Exchange = "p2p"

    @property
    def ring_size(self) -> int:
        """Ranks R of the ring."""
        return self.ring_group.size() if self.ring_group is not None else 1

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        description: SequenceDescription,
        call: AttentionCall,
        window: int | None = None,
    ) -> Tensor:
        """Runs exact attention in transformers' layout.

        Args:
            query: `[B, H, S / P, D]`, this rank's tokens.
            key: `[B, K, S / P, D]`.
            value: `[B, K, S / P, Dv]`.
            description: the whole batch's documents and layout.
            call: scale, causality, dropout, soft cap.
            window: with causal attention, how many tokens one sees, itself included; None for all.

        Returns:
            `[B, S / P, H, Dv]`.
        """
        if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
            # As the fused kernels do it, but before the exchange, so that the narrow dtype travels.
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        group = self.ulysses_group
        if group is None or group.size() == 1:
            return self._attend(query, key, value, description, call, window).transpose(1, 2)
        split = HeadSplit(group.size(), query.shape[1], key.shape[1])
        # [B, H, S/P, D] -> [B, H/U, S/R, D]
        query, key, value = seq_to_head(query, key, value, group)
        out = self._attend(query, key, value, description, call, window)
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
        """Attends over the whole sequence with the heads at hand, `[B, h, S / R, D]` -> `[B, h, S / R, Dv]`."""
        if self.ring_size == 1 and window is None:
            with _per_rank_dropout(call.dropout, self.ulysses_group):
                return core_attention(self.core, query, key, value, description, call)
        if call.dropout or call.softcap is not None:
            raise UnsupportedModelError(
                f"attention dropout ({call.dropout}) or a soft cap ({call.softcap}) is not computed in a ring or with "
                f"a sliding window. Set them to 0 and None, or use cp_size=1 and full attention."
            )
        plan = self._plan(description, call.is_causal, window)
        return attend_in_ring(query, key, value, self.ring_group, plan, scale=call.scale, exchange=self.exchange)

    def _plan(self, description: SequenceDescription, is_causal: bool, window: int | None) -> RingPlan:
        """Returns the batch's plan, made at the first layer that asks for it."""
        if description.ring_size != self.ring_size:
            raise ShapeError(
                f"the batch was laid out for a ring of {description.ring_size} ranks, this model's ring has "
                f"{self.ring_size}. Prepare loader and model with the same configuration."
            )
        rank = self.ring_group.rank() if self.ring_group is not None else 0
        wanted = (rank, is_causal, window)
        if wanted not in description.cache:
            description.cache[wanted] = RingPlan(
                description.sequence_length,
                self.ring_size,
                rank,
                description.layout,
                description.rows,
                is_causal,
                window,
            )
        plan: RingPlan = description.cache[wanted]
        return plan


@contextmanager
def _per_rank_dropout(dropout: float, group: ProcessGroup | None) -> Iterator[None]:
    """Gives each rank's heads a dropout mask of their own, even where all ranks were seeded alike.

    The seed comes from the host's generator, which activation checkpointing rewinds: the recompute gets the same masks.
    """
    if dropout == 0.0:
        yield
        return
    seed = int(torch.randint(2**62, ()))
    with torch.random.fork_rng():
        torch.manual_seed(seed + (group.rank() if group is not None else 0))
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
) -> Tensor:
    """Computes exact attention over a sequence spread over a ring whose every place is a Ulysses group.

    Args:
        query: `[B, H, S / P, D]`; U is at most H.
        key: `[B, K, S / P, D]`; K divides H.
        value: `[B, K, S / P, Dv]`.
        ulysses_group: the U ranks that hold one ring place's tokens, in order; None for one.
        ring_group: the R ranks of the ring; None for one.
        is_causal: whether a token sees only itself and the tokens before it.
        window: with causal attention, how many tokens one sees, itself included; None for all.
        scale: factor on the scores; 1 / sqrt(D) when None.
        dropout: probability of dropping an attention weight; only without ring and window.
        softcap: bound of the scores through tanh, where the core has it; only without ring and window.
        document_ids: `[B, S]` of the whole sequence in its own order, equal for the tokens of one document, negative
            for padding; or a `SequenceDescription`, made once for a batch. None: each row is one document.
        layout: how the tokens are dealt over the ring: `contiguous`, `zigzag` or `striped`.
        exchange: how keys travel around the ring: `p2p` or `all_gather`.
        core: the attention on whole sequences, where there is no ring: `sdpa`, `eager`, `flash_attention_2`, ...

    Returns:
        `[B, H, S / P, Dv]`, this rank's tokens.

    Raises:
        ShapeError: heads or tokens that can't be dealt, or shapes that don't fit each other.

    Source: USP (arXiv 2405.07719).
    """
    attention = SequenceAttention(ulysses_group, ring_group, core, exchange)
    ulysses_size = ulysses_group.size() if ulysses_group is not None else 1
    description = _describe(document_ids, query, attention.ring_size, ulysses_size, layout)
    call = AttentionCall(is_causal=is_causal, scale=scale, dropout=dropout, softcap=softcap)
    return attention(query, key, value, description, call, window).transpose(1, 2)


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
) -> Tensor:
    """Computes exact attention over a sequence whose tokens are spread over the ranks of `group`.

    Args:
        query: `[B, H, S / P, D]`, this rank's consecutive tokens; P is at most H.
        key: `[B, K, S / P, D]`; K divides H.
        value: `[B, K, S / P, Dv]`.
        group: the P ranks, in the order of the tokens.
        is_causal: whether a token sees only itself and the tokens before it.
        window: with causal attention, how many tokens one sees, itself included; None for all.
        scale: factor on the scores; 1 / sqrt(D) when None.
        dropout: probability of dropping an attention weight, with a different mask on each rank's heads.
        softcap: bound of the scores through tanh, where the core has it.
        document_ids: as for `usp_attention`.
        core: `sdpa`, `eager`, `flash_attention_2`, ...

    Returns:
        `[B, H, S / P, Dv]`, this rank's tokens.

    Raises:
        ShapeError: heads that can't be dealt, or shapes that don't fit each other.

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
    )


def _describe(
    document_ids: Tensor | SequenceDescription | None, query: Tensor, ring_size: int, ulysses_size: int, layout: Layout
) -> SequenceDescription:
    size = ring_size * ulysses_size
    batch, length = query.shape[0], query.shape[2] * size
    if document_ids is None:
        return SequenceDescription(length, size, (((0, length),),) * batch, ring_size, layout)
    if isinstance(document_ids, Tensor):
        document_ids = SequenceDescription.from_document_ids(document_ids, size, ring_size, layout)
    if (document_ids.batch_size, document_ids.sequence_length) != (batch, length):
        raise ShapeError(
            f"the documents are of {document_ids.batch_size} rows with {document_ids.sequence_length} tokens, the "
            f"query of {batch} rows with {length} tokens on {size} ranks. Describe the whole sequence, each batch anew."
        )
    return document_ids
