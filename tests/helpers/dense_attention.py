"""Attention written down with a mask and all scores, on one process: what the strategies are
compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ulysses_accel.sequence.description import SequenceDescription


def token_documents(description: SequenceDescription) -> Tensor:
    """Each token's document `[B, S]`, -1 for padding."""
    ids = torch.full((description.batch_size, description.sequence_length), -1)
    for row, documents in enumerate(description.rows):
        for index, (start, stop) in enumerate(documents):
            ids[row, start:stop] = index
        for start, stop in description.holes[row] if description.holes else ():
            ids[row, start:stop] = -1
    return ids


def self_mask(description: SequenceDescription, is_causal: bool, window: int | None) -> Tensor:
    """What sees what, `[B, S, S]`."""
    ids, places = token_documents(description), torch.arange(description.sequence_length)
    ahead = places[:, None] - places[None, :]
    mask = torch.ones(description.batch_size, len(places), len(places), dtype=torch.bool)
    if is_causal:
        mask &= ahead >= 0
    if window is not None:
        mask &= (ahead < window) if is_causal else (ahead.abs() <= window)
    for row, lengths in enumerate(description.prefixes if is_causal else ()):
        for (start, _), length in zip(description.rows[row], lengths):
            mask[row, :, start : start + length] = True
    return mask & (ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, :, None]


def cross_mask(description: SequenceDescription, encoder: SequenceDescription) -> Tensor:
    """What sees what, `[B, T, S]`."""
    return (token_documents(description) >= 0)[:, :, None] & (token_documents(encoder) >= 0)[
        :, None, :
    ]


def attention_weights(
    query: Tensor, key: Tensor, mask: Tensor, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """The softmax over all keys, `[B, H, T, S]`; zeros for tokens that see nothing."""
    scores = (
        query
        @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(2, 3)
        / query.shape[3] ** 0.5
    )
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], dim=3)
    sees = mask.any(dim=2)[:, None, :, None]
    # Rows of nothing but minus infinity would give NaN, in the gradient too.
    weights = scores.masked_fill(~sees, 0.0).softmax(dim=3).masked_fill(~sees, 0.0)
    return weights[..., : key.shape[2]]


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`[B, H, T, D]`, `[B, K, S, D]`, `[B, K, S, Dv]` -> `[B, H, T, Dv]`."""
    weights = attention_weights(query, key, mask, softcap, sinks)
    return weights @ value.repeat_interleave(query.shape[1] // value.shape[1], 1)
