"""The largest call of a fused kernel: from 2^31 elements on, its 32-bit indices overflow, and it is
wrong or fails.
"""

from __future__ import annotations

from torch import Tensor

from ulysses_accel.attention.heads import HeadSplit

MAX_ELEMENTS = 2**31 - 1

Part = tuple[slice, slice, slice]


def num_elements(query: Tensor, key: Tensor) -> int:
    """Returns the number of elements of the larger of query `[B, H, q, D]` and key `[B, K, k, D]`,
    the keys repeated to H heads.
    """
    batch, heads, length, size = query.shape
    return batch * heads * max(length, key.shape[2]) * size


def halves(query: Tensor, key: Tensor) -> tuple[Part, ...]:
    """Returns two halves of a call as (rows, query heads, key/value heads); none for a call of one
    row and one head.
    """
    batch, num_heads, num_key_heads = query.shape[0], query.shape[1], key.shape[1]
    everything = slice(None)
    if batch > 1:
        first, second = slice(0, batch // 2), slice(batch // 2, batch)
        return (first, everything, everything), (second, everything, everything)
    if num_heads == 1:
        return ()
    split = HeadSplit(2, num_heads, num_key_heads)
    return tuple(
        (everything, slice(*split.queries(half)), slice(*split.keys(half))) for half in range(2)
    )
