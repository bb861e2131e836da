"""Core attention on whole sequences: one call where the rows are dense, one call per document where they are not.

An S × S mask is never made. Padding tokens belong to no document; they get zeros and give no gradient.
Shapes: B = rows, H = query heads, K = key/value heads, S = tokens, D = head size, Dv = value head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ulysses_accel.errors import UnsupportedModelError
from ulysses_accel.sequence import Rows, SequenceDescription

FLASH_CORES = ("flash_attention_2", "flash_attention_3", "flash_attention_4")


@dataclass(frozen=True)
class AttentionCall:
    """What one attention call asks for, apart from its tensors.

    Args:
        is_causal: whether a token sees only itself and the tokens before it.
        scale: factor on the scores; 1 / sqrt(D) when None.
        dropout: probability of dropping an attention weight.
        softcap: bound of the scores through tanh; None for no bound.
        sinks: `[H]` scores of a key of no value that every token sees, one for each query head; None for none.
    """

    is_causal: bool = True
    scale: float | None = None
    dropout: float = 0.0
    softcap: float | None = None
    sinks: Tensor | None = None


Core = Callable[[Tensor, Tensor, Tensor, AttentionCall], Tensor]


def sdpa(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
    """Runs torch's fused attention: `[B, H, S, D]`, `[B, K, S, D]`, `[B, K, S, Dv]` -> `[B, H, S, Dv]`."""
    if call.softcap is not None:
        raise UnsupportedModelError(
            f"sdpa has no soft cap, and the model asks for softcap={call.softcap}. "
            f"Use sp_attn_implementation='flash_attention_2' (or 'eager' for tests)."
        )
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=call.dropout,
        is_causal=call.is_causal,
        scale=call.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def eager(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, mask: Tensor | None = None) -> Tensor:
    """Runs attention with all scores in memory, for tests and small models; shapes as in `sdpa`, mask additive."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = call.scale if call.scale is not None else 1.0 / math.sqrt(query.shape[-1])
    scores = torch.matmul(query, key.transpose(-1, -2)) * scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.is_causal:
        length = query.shape[2]
        later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    if mask is not None:
        scores = scores + mask[..., : key.shape[2]]
    weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(dim=-1).to(query.dtype)
    return torch.matmul(F.dropout(weights, call.dropout), value)


def flash(implementation: str) -> Core:
    """Returns transformers' flash attention kernel of that name as a core; shapes as in `sdpa`."""

    def run(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, **lengths: Any) -> Tensor:
        from transformers.modeling_flash_attention_utils import _flash_attention_forward

        head_dim, value_dim = query.shape[-1], value.shape[-1]
        out: Tensor = _flash_attention_forward(
            query.transpose(1, 2),
            key.transpose(1, 2),
            # The kernels want one head size for all three.
            F.pad(value, (0, head_dim - value_dim)).transpose(1, 2),
            None,
            query_length=query.shape[2],
            is_causal=call.is_causal,
            dropout=call.dropout,
            softmax_scale=call.scale,
            softcap=call.softcap,
            attn_implementation=implementation,
            **lengths,
        )
        return out[..., :value_dim].transpose(1, 2)

    return run


def core_for(implementation: str) -> Core:
    """Returns the core of an attention implementation, by transformers' name for it.

    Args:
        implementation: `sdpa`, `eager`, `flash_attention_2/3/4`, or a kernel of the hub that transformers has loaded.
    """
    return {"sdpa": sdpa, "eager": eager}.get(implementation) or flash(implementation)


def core_attention(
    implementation: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    description: SequenceDescription,
    call: AttentionCall,
) -> Tensor:
    """Runs attention over whole sequences so that no token sees another document or padding.

    Args:
        implementation: name of the core.
        query: `[B, H, S, D]`.
        key: `[B, K, S, D]`.
        value: `[B, K, S, Dv]`.
        description: documents and padding of the batch.
        call: scale, causality, dropout, soft cap.

    Returns:
        `[B, H, S, Dv]`.
    """
    core = core_for(implementation)
    if description.is_dense or (call.is_causal and description.is_plain_causal):
        return core(query, key, value, call)
    if implementation not in ("sdpa", "eager"):
        return _flash_by_document(core, query, key, value, description, call)
    rows = [
        _row_by_document(core, q, k, v, segments, call)
        for q, k, v, segments in zip(query.split(1), key.split(1), value.split(1), description.rows)
    ]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _pieces(segments: tuple[tuple[int, int], ...], length: int) -> tuple[list[int], list[bool]]:
    """Cuts a row into consecutive pieces, documents and the padding between them: their lengths, and which count."""
    lengths, counted, end = [], [], 0
    for start, stop in segments:
        if start > end:
            lengths.append(start - end)
            counted.append(False)
        lengths.append(stop - start)
        counted.append(True)
        end = stop
    if end < length:
        lengths.append(length - end)
        counted.append(False)
    return lengths, counted


def _row_by_document(
    core: Core, query: Tensor, key: Tensor, value: Tensor, segments: tuple[tuple[int, int], ...], call: AttentionCall
) -> Tensor:
    """Runs the core on each document of one row, `[1, H, S, D]` -> `[1, H, S, Dv]`."""
    lengths, counted = _pieces(segments, query.shape[2])
    # `split`, not slices: its backward joins all gradients once, a slice's pads each one to the whole row.
    parts = zip(query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), counted)
    out = [core(q, k, v, call) if counts else q.new_zeros(*q.shape[:3], v.shape[3]) for q, k, v, counts in parts]
    return torch.cat(out, dim=2)


def _flash_by_document(
    core: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    description: SequenceDescription,
    call: AttentionCall,
) -> Tensor:
    """Runs one variable-length call over all rows laid end to end; padding is a document of its own."""
    batch, length = query.shape[0], query.shape[2]
    bounds, longest = cumulative_lengths(description.rows, length)
    cu_seq_lens = torch.tensor(bounds, dtype=torch.int32, device=query.device)
    # [B, H, S, D] -> [1, H, B * S, D]
    query, key, value = (t.transpose(0, 1).flatten(1, 2).unsqueeze(0) for t in (query, key, value))
    out: Tensor = core(
        query,
        key,
        value,
        call,
        cu_seq_lens_q=cu_seq_lens,
        cu_seq_lens_k=cu_seq_lens,
        max_length_q=longest,
        max_length_k=longest,
    )
    # [1, H, B * S, Dv] -> [B, H, S, Dv]
    rows: Tensor = out.squeeze(0).unflatten(1, (batch, length))
    return rows.transpose(0, 1)


def cumulative_lengths(rows: Rows, length: int) -> tuple[list[int], int]:
    """Returns `[0, end of first piece, ...]` over all rows laid end to end, and the longest piece, in tokens."""
    bounds, longest = [0], 0
    for segments in rows:
        for piece in _pieces(segments, length)[0]:
            bounds.append(bounds[-1] + piece)
            longest = max(longest, piece)
    return bounds, longest
