"""Chooses the ring and Ulysses degrees for the ranks that share a sequence, by the time that their
bytes take.

Bytes are what a rank sends for one attention layer and one row, on average over the ranks. They are
counted by where they go: Ulysses ranks are neighbours, so their exchange stays inside a node as
long as they fit in one; a ring goes from Ulysses group to Ulysses group, all its ranks at once, so
that it is as slow as its slowest link. Units: u = one head of one rank's tokens, S / P × head_dim ×
element_bytes. With U = sp_size, R = cp_size, H query and K key/value heads, k = max(K, U) key/value
heads, with those that are replicated on several ranks counted for each: Ulysses `(2H + 2k)(U - 1) /
U` u forward and the same backward; ring `2k(R - 1)` u of keys forward, of keys again and of their
gradients (at least float32) backward, 0.75 of each where causal zigzag skips the half that is not
needed. Source: USP (arXiv 2405.07719) for the sum of both; latency and overlap with compute are not
counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ulysses_accel.errors import ConfigError

_GRADIENT_BYTES = 4
_CAUSAL_ZIGZAG = 0.75


@dataclass(frozen=True)
class SplitRequest:
    """What a split is chosen for.

    Args:
        num_ranks: ranks P that share a sequence.
        num_heads: query heads H of one rank: with tensor parallelism the model's divided by its
            degree.
        num_key_value_heads: key/value heads K, likewise; divides H.
        head_dim: size of a head.
        sequence_length: tokens S of the full sequence; None where the loader pads to the chosen
            split, then bytes are for one token on each rank.
        ranks_per_node: ranks on one node.
        bandwidth_inside: GB/s at which one rank sends to ranks of its node.
        bandwidth_between: GB/s at which one rank sends to ranks of other nodes.
        is_causal: whether attention is causal, so that a zigzag ring skips halves.
        is_training: whether there is a backward pass.
        element_bytes: bytes of one element that is sent, 2 for bfloat16.

    Raises:
        ConfigError: a value that is not legal.
    """

    num_ranks: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    sequence_length: int | None
    ranks_per_node: int
    bandwidth_inside: float
    bandwidth_between: float
    is_causal: bool = True
    is_training: bool = True
    element_bytes: int = 2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not isinstance(value, bool) and not value > 0:
                raise ConfigError(f"{name}={value} must be above 0. Pass the job's {name}.")
        if self.num_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_heads={self.num_heads}. Use head counts of a grouped-query attention."
            )


@dataclass(frozen=True)
class Split:
    """One way to use the ranks, and what it costs.

    Args:
        cp_size: ranks R of the ring.
        sp_size: Ulysses ranks U.
        bytes_inside: bytes a rank sends inside its node for one layer and one row, forward and
            backward.
        bytes_between: bytes it sends to other nodes.
        seconds: time of these bytes at the two bandwidths.
        head_excess: query heads of the busiest rank over the even share, 1 where they are even.
        reason: why it was chosen; empty for a candidate.
    """

    cp_size: int
    sp_size: int
    bytes_inside: float
    bytes_between: float
    seconds: float
    head_excess: float
    reason: str = ""


def ulysses_units(
    num_heads: int, num_key_value_heads: int, sp_size: int, is_training: bool = True
) -> float:
    """Returns what a rank sends in the Ulysses exchanges of one layer, in u.

    Args:
        num_heads: query heads H.
        num_key_value_heads: key/value heads K.
        sp_size: ranks U.
        is_training: whether the backward pass counts.
    """
    heads = 2 * num_heads + 2 * max(num_key_value_heads, sp_size)
    return (2 if is_training else 1) * heads * (sp_size - 1) / sp_size


def ring_units(request: SplitRequest, cp_size: int) -> float:
    """Returns what a rank sends around a ring of `cp_size` ranks in one layer, in u."""
    sp_size = request.num_ranks // cp_size
    factor = _CAUSAL_ZIGZAG if request.is_causal else 1.0
    keys = factor * 2 * max(request.num_key_value_heads, sp_size) * (cp_size - 1)
    gradients = max(_GRADIENT_BYTES, request.element_bytes) / request.element_bytes
    return keys * (2 + gradients) if request.is_training else keys


def length_multiple(cp_size: int, sp_size: int) -> int:
    """Returns what a sequence's length must be a multiple of, in zigzag layout over the ring."""
    return math.lcm(2 * cp_size if cp_size > 1 else 1, cp_size * sp_size)


def refusal(request: SplitRequest, cp_size: int, sp_size: int) -> str | None:
    """Returns why a split is not legal; None where it is."""
    if sp_size > request.num_heads:
        return f"sp_size={sp_size} is more than num_heads={request.num_heads}"
    multiple = length_multiple(cp_size, sp_size)
    if request.sequence_length is not None and request.sequence_length % multiple:
        return f"sequence_length={request.sequence_length} is no multiple of {multiple}"
    return None


def _factorizations(num_ranks: int) -> list[tuple[int, int]]:
    """Returns all (cp_size, sp_size) with that product, Ulysses alone first."""
    return [(cp, num_ranks // cp) for cp in range(1, num_ranks + 1) if num_ranks % cp == 0]


def _ulysses_share_between(request: SplitRequest, sp_size: int) -> float:
    """Returns the share of the worst-placed rank's Ulysses messages that leave its node."""
    size, node = request.num_ranks, request.ranks_per_node
    worst = 0
    # Sequence groups follow each other in rank; their places within nodes repeat.
    for first in range(0, math.lcm(size, node), sp_size):
        members = [rank // node for rank in range(first, first + sp_size)]
        worst = max(worst, sp_size - min(members.count(members[0]), members.count(members[-1])))
    return worst / (sp_size - 1) if sp_size > 1 else 0.0


def _ring_leaves_node(request: SplitRequest) -> bool:
    """Returns whether the ranks that share some sequence are on several nodes."""
    return request.ranks_per_node % request.num_ranks != 0


def _cost(request: SplitRequest, cp_size: int, sp_size: int) -> Split:
    tokens = (request.sequence_length or request.num_ranks) / request.num_ranks
    unit = tokens * request.head_dim * request.element_bytes
    ulysses = unit * ulysses_units(
        request.num_heads, request.num_key_value_heads, sp_size, request.is_training
    )
    ring = unit * ring_units(request, cp_size)
    share = _ulysses_share_between(request, sp_size)
    between = ulysses * share + (ring if _ring_leaves_node(request) else 0.0)
    inside = ulysses + ring - between
    seconds = (inside / request.bandwidth_inside + between / request.bandwidth_between) / 1e9
    return Split(cp_size, sp_size, inside, between, seconds, _head_excess(request, sp_size))


def _head_excess(request: SplitRequest, sp_size: int) -> float:
    """Returns the busiest rank's query heads over the even share; whole groups while there are
    enough of them.
    """
    heads, groups = request.num_heads, request.num_key_value_heads
    if groups >= sp_size:
        busiest = -(-groups // sp_size) * (heads // groups)
    else:
        # The key/value head that is replicated on the fewest ranks has the most query heads for
        # each.
        busiest = -(-(heads // groups) // (sp_size // groups))
    return busiest * sp_size / heads


def candidates(request: SplitRequest) -> tuple[Split, ...]:
    """Returns every legal split with its cost, the cheapest first.

    Equal costs are ordered by the evenness of the heads, then by the smaller ring.

    Raises:
        ConfigError: no split is legal.
    """
    factors = _factorizations(request.num_ranks)
    legal = [_cost(request, cp, sp) for cp, sp in factors if refusal(request, cp, sp) is None]
    if not legal:
        reasons = "; ".join(f"(cp={cp}, sp={sp}): {refusal(request, cp, sp)}" for cp, sp in factors)
        multiple = min(length_multiple(cp, sp) for cp, sp in factors if sp <= request.num_heads)
        raise ConfigError(
            f"no split of {request.num_ranks} ranks is legal: {reasons}. "
            f"Pad sequences to a multiple of {multiple} tokens."
        )
    return tuple(sorted(legal, key=lambda split: (split.seconds, split.head_excess, split.cp_size)))


def choose_split(request: SplitRequest) -> Split:
    """Returns the legal split whose bytes take the least time, with the reason.

    Raises:
        ConfigError: no split is legal.
    """
    best, *others = candidates(request)
    name = {(True, False): "Ulysses alone", (False, True): "a ring alone"}.get(
        (best.cp_size == 1, best.sp_size == 1), "Ulysses in a ring"
    )
    if best.cp_size == best.sp_size == 1:
        reason = "one rank holds the whole sequence"
    elif not others:
        reason = f"{name}: the only legal split"
    else:
        following = f"{_named(others[0])} with {_milliseconds(others[0])}"
        reason = f"{name}: {_milliseconds(best)} of bytes a layer; next is {following}"
    values = {field: getattr(best, field) for field in vars(best) if field != "reason"}
    return Split(**values, reason=reason)


def explain(request: SplitRequest) -> str:
    """Returns the table of all splits, legal or not, cheapest first, and why one is chosen.

    Raises:
        ConfigError: no split is legal.
    """
    chosen = choose_split(request)
    lines = [
        f"{request.num_ranks} ranks, {request.ranks_per_node} on a node; {request.num_heads} query "
        "and "
        f"{request.num_key_value_heads} key/value heads of {request.head_dim}; what a rank sends "
        "for a layer and row",
        f"{'cp':>4} {'sp':>4} {'MB inside':>12} {'MB between':>12} {'ms':>10} {'busiest':>8}",
    ]
    for split in candidates(request):
        mark = "  <-" if (split.cp_size, split.sp_size) == (chosen.cp_size, chosen.sp_size) else ""
        megabytes = f"{split.bytes_inside / 1e6:>12.3f} {split.bytes_between / 1e6:>12.3f}"
        times = f"{split.seconds * 1e3:>10.4f} {split.head_excess:>8.2f}"
        lines.append(f"{split.cp_size:>4} {split.sp_size:>4} {megabytes} {times}{mark}")
    for cp, sp in _factorizations(request.num_ranks):
        why = refusal(request, cp, sp)
        if why is not None:
            lines.append(f"{cp:>4} {sp:>4} not legal: {why}")
    return "\n".join([*lines, f"{_named(chosen)}: {chosen.reason}."])


def _named(split: Split) -> str:
    return f"cp_size={split.cp_size}, sp_size={split.sp_size}"


def _milliseconds(split: Split) -> str:
    return f"{split.seconds * 1e3:.4g} ms"
