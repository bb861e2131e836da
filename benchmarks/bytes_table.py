"""What a rank sends by ring, Ulysses and both together, for many models and degrees at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ulysses_accel.config.split_cost import SplitRequest, ring_units, ulysses_units


@dataclass(frozen=True)
class BytesRow:
    """One model's heads on one number of ranks; volumes are in u, one head of one rank's tokens.

    Args:
        num_heads: query heads H.
        num_key_value_heads: key/value heads K.
        num_ranks: ranks P that share a sequence.
        ring: what a ring of P ranks sends.
        ulysses: what P Ulysses ranks send; None where there are fewer query heads.
        usp: what the cheapest mixture of both sends; None where P has no divisor for one.
        usp_cp_size: the ring degree of that mixture; None likewise.
        cheapest: `ring`, `ulysses` or `usp`; at equal volumes the first of ulysses, usp, ring.
    """

    num_heads: int
    num_key_value_heads: int
    num_ranks: int
    ring: float
    ulysses: float | None
    usp: float | None
    usp_cp_size: int | None
    cheapest: str


def bytes_table(
    heads: Iterable[tuple[int, int]],
    ranks: Iterable[int],
    *,
    is_causal: bool = True,
    is_training: bool = True,
    element_bytes: int = 2,
) -> list[BytesRow]:
    """Returns what each way sends for one attention layer and row, for every pair of heads and
    ranks.

    Where a ring drops nothing, it sends less than Ulysses forward for P < 1 + H / K; the causal
    zigzag ring, which drops a quarter, for P < 4/3 (1 + H / K) as long as P is at most K.

    Args:
        heads: (query heads H, key/value heads K); K divides H.
        ranks: numbers P of ranks that share a sequence, above 1.
        is_causal: whether attention is causal, so that a zigzag ring drops halves.
        is_training: whether the backward pass counts; a ring's key gradients travel in float32 at
            least.
        element_bytes: bytes of one number that travels, 2 for bfloat16.

    Raises:
        ConfigError: heads or ranks that are not legal.
    """
    sizes = list(ranks)
    return [
        _row(
            SplitRequest(
                size, queries, keys, 1, None, size, 1.0, 1.0, is_causal, is_training, element_bytes
            )
        )
        for queries, keys in heads
        for size in sizes
    ]


def _row(request: SplitRequest) -> BytesRow:
    size = request.num_ranks
    ring = ring_units(request, size)
    ulysses = _ulysses(request, size) if size <= request.num_heads else None
    mixtures = [
        (ring_units(request, cp) + _ulysses(request, size // cp), cp)
        for cp in range(2, size)
        if size % cp == 0 and size // cp <= request.num_heads
    ]
    usp, usp_cp_size = min(mixtures, default=(None, None))
    volumes = {"ulysses": ulysses, "usp": usp, "ring": ring}
    known = {name: volume for name, volume in volumes.items() if volume is not None}
    cheapest = min(known, key=lambda name: known[name])
    return BytesRow(
        request.num_heads,
        request.num_key_value_heads,
        size,
        ring,
        ulysses,
        usp,
        usp_cp_size,
        cheapest,
    )


def _ulysses(request: SplitRequest, sp_size: int) -> float:
    return ulysses_units(
        request.num_heads, request.num_key_value_heads, sp_size, request.is_training
    )
