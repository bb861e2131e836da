"""How heads are partitioned over the ranks of a Ulysses group: groups of query heads with their
key/value head.

Pure arithmetic. With fewer key/value heads than ranks, KV heads are replicated on several ranks,
which split their query heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from ulysses_accel.errors import ShapeError

Range = tuple[int, int]


def spread(total: int, parts: int) -> list[Range]:
    """Returns ranges that partition `total` into consecutive parts, whose sizes differ by one at
    most, the larger ones first.
    """
    small, extra = divmod(total, parts)
    bounds = [small * part + min(part, extra) for part in range(parts + 1)]
    return list(pairwise(bounds))


@dataclass(frozen=True)
class HeadSplit:
    """Which heads each rank of a Ulysses group has while it holds the full sequence.

    Args:
        size: ranks P, at most one for each query head.
        num_heads: query heads H.
        num_key_value_heads: key/value heads K; divides H.
    """

    size: int
    num_heads: int
    num_key_value_heads: int

    def __post_init__(self) -> None:
        if self.num_heads % self.num_key_value_heads:
            raise ShapeError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_heads}. "
                f"Grouped-query attention needs complete groups."
            )
        if self.size > self.num_heads:
            raise ShapeError(
                f"sp_size={self.size} is more than num_attention_heads={self.num_heads}: a rank "
                "would have no head. "
                f"Use sp_size={self.num_heads} at most, and cp_size for the rest."
            )

    @cached_property
    def _ranges(self) -> tuple[tuple[Range, Range], ...]:
        """For each rank its query heads and its key/value heads."""
        group = self.num_heads // self.num_key_value_heads
        if self.num_key_value_heads >= self.size:
            parts = spread(self.num_key_value_heads, self.size)
            return tuple(((low * group, high * group), (low, high)) for low, high in parts)
        ranges: list[tuple[Range, Range]] = []
        for head, (first, last) in enumerate(spread(self.size, self.num_key_value_heads)):
            for low, high in spread(group, last - first):
                ranges.append(((head * group + low, head * group + high), (head, head + 1)))
        return tuple(ranges)

    def queries(self, rank: int) -> Range:
        """Returns the query heads (from, to) of a rank."""
        return self._ranges[rank][0]

    def keys(self, rank: int) -> Range:
        """Returns the key/value heads (from, to) of a rank; several ranks may have the same one."""
        return self._ranges[rank][1]

    @cached_property
    def is_even(self) -> bool:
        """True when every rank has as many heads as the others, and every key/value head is on as
        many ranks.
        """
        if self.num_heads % self.size:
            return False
        return (
            self.num_key_value_heads % self.size == 0 or self.size % self.num_key_value_heads == 0
        )

    @property
    def heads(self) -> int:
        """Query heads on each rank of an even split."""
        return self.num_heads // self.size

    @property
    def key_value_heads(self) -> int:
        """Key/value heads on each rank of an even split."""
        return max(1, self.num_key_value_heads // self.size)

    @property
    def readers(self) -> int:
        """Ranks that each key/value head of an even split is replicated on."""
        return max(1, self.size // self.num_key_value_heads)

    def counts(self, rank: int) -> tuple[int, int, int]:
        """Returns how many query, key and value heads a rank has."""
        (q_low, q_high), (k_low, k_high) = self._ranges[rank]
        return q_high - q_low, k_high - k_low, k_high - k_low

    def width(self, rank: int, sizes: tuple[int, int, int]) -> int:
        """Returns the elements that one token of one row has in the message to a rank, by head
        sizes (D, D, Dv).
        """
        return sum(count * size for count, size in zip(self.counts(rank), sizes))
