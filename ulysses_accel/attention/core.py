"""Core attention on whole sequences: one call where the rows are dense, one call per document where
they are not.

An S × S mask is never made. Padding tokens belong to no document; they get zeros and give no
gradient. Shapes: B = rows, H = query heads, K = key/value heads, S = tokens, D = head size, Dv =
value head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ulysses_accel import _private_api
from ulysses_accel.attention.call import AttentionCall
from ulysses_accel.attention.kernels.limits import MAX_ELEMENTS, halves, num_elements
from ulysses_accel.errors import UnsupportedModelError
from ulysses_accel.sequence.description import SequenceDescription
from ulysses_accel.sequence.documents import Rows, Segment, document_pieces, equal_neighbours

FLASH_CORES = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
Core = Callable[[Tensor, Tensor, Tensor, AttentionCall], Tensor]


def sdpa(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
    """Runs torch's fused attention: `[B, H, S, D]`, `[B, K, S, D]`, `[B, K, S, Dv]` -> `[B, H, S,
    Dv]`.
    """
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


def eager(
    query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, mask: Tensor | None = None
) -> Tensor:
    """Runs attention with all scores in memory, for tests and small models; shapes as in `sdpa`,
    mask additive.
    """
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
    weights = (
        scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(dim=-1).to(query.dtype)
    )
    return torch.matmul(F.dropout(weights, call.dropout), value)


def flash(implementation: str) -> Core:
    """Returns transformers' flash attention kernel of that name as a core; shapes as in `sdpa`."""

    def run(
        query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, **lengths: Any
    ) -> Tensor:
        head_dim, value_dim = query.shape[-1], value.shape[-1]
        out = _private_api.flash_attention(
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
        implementation: `sdpa`, `eager`, `flash_attention_2/3/4`, or a kernel of the hub that
            transformers has loaded.
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
        description: documents, holes and padding of the batch.
        call: scale, causality, dropout, soft cap.

    Returns:
        `[B, H, S, Dv]`.
    """
    core = partial(bounded, core_for(implementation))
    if description.is_dense or (call.is_causal and description.is_plain_causal):
        return core(query, key, value, call)
    if implementation not in ("sdpa", "eager") and not description.has_holes:
        return _flash_by_document(core, query, key, value, description, call)
    rows = []
    for row, (q, k, v) in enumerate(zip(query.split(1), key.split(1), value.split(1))):
        pieces = _pieces(
            description.rows[row],
            query.shape[2],
            description.holes[row] if description.holes else (),
        )
        rows.append(_by_document(core, (q, k, v), pieces, pieces, call))
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def core_cross_attention(
    implementation: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: tuple[Rows, Rows],
    call: AttentionCall,
) -> Tensor:
    """Runs attention of every token of one sequence to every token of another, padding of either
    left out.

    Args:
        implementation: name of the core.
        query: `[B, H, T, D]`.
        key: `[B, K, S, D]`.
        value: `[B, K, S, Dv]`.
        seen: each row's segments without padding, of the queries and of the keys.
        call: scale, dropout, soft cap; causality is not asked for.

    Returns:
        `[B, H, T, Dv]`; zeros for padding.
    """
    core, call = partial(bounded, core_for(implementation)), replace(call, is_causal=False)
    lengths = (query.shape[2], key.shape[2])
    if all(row == ((0, length),) for rows, length in zip(seen, lengths) for row in rows):
        return core(query, key, value, call)
    out = []
    for rows, (queries, keys) in equal_neighbours(list(zip(*seen))):
        pieces = [
            _pieces(row, length, joined=True) for row, length in zip((queries, keys), lengths)
        ]
        out.append(
            _by_document(core, (query[rows], key[rows], value[rows]), pieces[0], pieces[1], call)
        )
    return out[0] if len(out) == 1 else torch.cat(out)


def bounded(
    core: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: AttentionCall,
    limit: int = MAX_ELEMENTS,
    **lengths: Any,
) -> Tensor:
    """Runs a core in as many calls as it takes for each to have `limit` elements at most; shapes as
    in `sdpa`.
    """
    parts = halves(query, key) if num_elements(query, key) > limit else ()
    if not parts:
        return core(query, key, value, call, **lengths)
    outs = [
        bounded(
            core, query[rows, heads], key[rows, keys], value[rows, keys], call, limit, **lengths
        )
        for rows, heads, keys in parts
    ]
    return torch.cat(outs, dim=0 if query.shape[0] > 1 else 1)


def _pieces(
    documents: tuple[Segment, ...],
    length: int,
    holes: tuple[Segment, ...] = (),
    joined: bool = False,
) -> tuple[list[int], list[int | None]]:
    """Cuts a row into consecutive pieces: their lengths, and the document of each, None for
    padding.

    With `joined` all documents count as one.
    """
    lengths: list[int] = []
    owners: list[int | None] = []
    end = 0
    for document, pieces in enumerate(document_pieces(documents, holes)):
        for start, stop in pieces:
            if start > end:
                lengths.append(start - end)
                owners.append(None)
            lengths.append(stop - start)
            owners.append(0 if joined else document)
            end = stop
    if end < length:
        lengths.append(length - end)
        owners.append(None)
    return lengths, owners


def _by_document(
    core: Core,
    tensors: tuple[Tensor, Tensor, Tensor],
    queries: tuple[list[int], list[int | None]],
    keys: tuple[list[int], list[int | None]],
    call: AttentionCall,
) -> Tensor:
    """Runs the core on each document of rows that are cut alike, `[B, H, S, D]` -> `[B, H, S,
    Dv]`.
    """
    # `split`, not slices: its backward joins all gradients once, a slice's pads each one to the
    # whole row.
    q_parts, k_parts, v_parts = (
        tensor.split(lengths, dim=2) for tensor, (lengths, _) in zip(tensors, (queries, keys, keys))
    )
    out = [part.new_zeros(*part.shape[:3], tensors[2].shape[3]) for part in q_parts]
    q_places, k_places = _places(queries[1]), _places(keys[1])
    if q_places.keys().isdisjoint(k_places):
        nothing: Tensor = _SeesNothing.apply(*tensors)  # type: ignore[no-untyped-call]
        return nothing
    for document, places in q_places.items():
        if document not in k_places:
            continue
        q = _joined([q_parts[place] for place in places])
        k, v = (
            _joined([parts[place] for place in k_places[document]]) for parts in (k_parts, v_parts)
        )
        found = core(q, k, v, call).split([queries[0][place] for place in places], dim=2)
        for place, part in zip(places, found):
            out[place] = part
    return _joined(out)


class _SeesNothing(torch.autograd.Function):
    """[B, H, q, D], [B, K, k, D], [B, K, k, Dv] -> zeros [B, H, q, Dv]: attention of padding alone.

    Its gradients are zeros, not absent: ranks must not differ in which parameters have one.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return tensors[0].new_zeros(*tensors[0].shape[:3], tensors[2].shape[3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(tensor) for tensor in ctx.saved_tensors)


def _places(owners: list[int | None]) -> dict[int, list[int]]:
    """Returns the places of each document's pieces."""
    places: dict[int, list[int]] = {}
    for place, owner in enumerate(owners):
        if owner is not None:
            places.setdefault(owner, []).append(place)
    return places


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Joins pieces along the sequence, dim 2; one piece is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=2)


def _flash_by_document(
    core: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    description: SequenceDescription,
    call: AttentionCall,
) -> Tensor:
    """Runs one variable-length call over all rows laid end to end; padding is a document of its
    own.
    """
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
    """Returns `[0, end of first piece, ...]` over all rows laid end to end, and the longest piece,
    in tokens.
    """
    bounds, longest = [0], 0
    for segments in rows:
        for piece in _pieces(segments, length)[0]:
            bounds.append(bounds[-1] + piece)
            longest = max(longest, piece)
    return bounds, longest
