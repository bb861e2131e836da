"""Calls of fused kernels stay under 2^31 elements: above, their 32-bit indices are wrong or they
fail.
"""

from __future__ import annotations

from torch import Tensor

from ulysses_accel.attention.heads import HeadSplit

MAX_ELEMENTS = 2**31 - 1

Part = tuple[slice, slice, slice]


def num_elements(query: Tensor, key: Tensor) -> int:
    """Returns the elements of the larger of query `[B, H, q, D]` and key `[B, K, k, D]`, keys
    repeated to H heads.
    """
    batch, heads, length, size = query.shape
    return batch * heads * max(length, key.shape[2]) * size


def halves(query: Tensor, key: Tensor) -> tuple[Part, ...]:
    """Returns two halves of a call as (rows, query heads, key/value heads); none where there is one
    row and head.
    """
    batch, num_heads, num_key_heads = query.shape[0], query.shape[1], key.shape[1]
    whole = slice(None)
    if batch > 1:
        return (slice(0, batch // 2), whole, whole), (slice(batch // 2, batch), whole, whole)
    if num_heads == 1:
        return ()
    split = HeadSplit(2, num_heads, num_key_heads)
    return tuple(
        (whole, slice(*split.queries(half)), slice(*split.keys(half))) for half in range(2)
    )
