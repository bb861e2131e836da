"""How the tokens of a sequence are distributed over the ranks that share it: runs of equally spaced
tokens, and their order.

With a ring of R ranks of which each is a Ulysses group of U ranks, the tokens are put in ring order
first, and then sharded into R × U consecutive parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ulysses_accel.errors import ConfigError

Layout = Literal["contiguous", "zigzag", "striped"]
LAYOUTS: tuple[Layout, ...] = ("contiguous", "zigzag", "striped")


@dataclass(frozen=True)
class Run:
    """Equally spaced tokens of one rank: local index `offset + i` is the sequence's token `start +
    i * step`.

    Args:
        start: token position of the first one.
        step: distance between neighbours, in tokens.
        count: how many tokens.
        offset: local index of the first one.
    """

    start: int
    step: int
    count: int
    offset: int

    def indices_of(self, first: int, last: int) -> tuple[int, int]:
        """Returns the run's local indices (from, to) of its tokens with positions in [first,
        last).
        """
        low = max(0, -(-(first - self.start) // self.step))
        high = min(self.count, -(-(last - self.start) // self.step))
        return low, max(low, high)


def multiple_of(ring_size: int, layout: Layout, ulysses_size: int = 1) -> int:
    """Returns what the length of a sequence must be a multiple of to be distributed over
    `ring_size * ulysses_size` ranks.
    """
    halves = 2 if layout == "zigzag" and ring_size > 1 else 1
    return math.lcm(halves * ring_size, ring_size * ulysses_size)


def runs(length: int, ring_size: int, rank: int, layout: Layout) -> tuple[Run, ...]:
    """Returns the tokens that one rank of the ring holds, in local order.

    Args:
        length: tokens of the full sequence.
        ring_size: ranks R.
        rank: which of them.
        layout: `contiguous`: the rank-th part; `zigzag`: the rank-th part of 2R from the front and
            from the back, so that causal work is even; `striped`: every R-th token.

    Raises:
        ConfigError: the length can't be laid out so.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout={layout!r} is not known. Use one of: {', '.join(LAYOUTS)}.")
    if length % multiple_of(ring_size, layout):
        raise ConfigError(
            f"a sequence of {length} tokens can't be laid out {layout} over {ring_size} ranks. "
            f"Pad it to a multiple of {multiple_of(ring_size, layout)}."
        )
    if layout == "contiguous" or ring_size == 1:
        part = length // ring_size
        return (Run(rank * part, 1, part, 0),)
    if layout == "striped":
        return (Run(rank, ring_size, length // ring_size, 0),)
    part = length // (2 * ring_size)
    return Run(rank * part, 1, part, 0), Run((2 * ring_size - 1 - rank) * part, 1, part, part)


def ring_order(length: int, ring_size: int, layout: Layout) -> Tensor | None:
    """Returns the token positions in the order of the shards, `[S]`; None where that is the
    order of the sequence.
    """
    if layout == "contiguous" or ring_size == 1:
        return None
    parts = [
        torch.arange(run.start, run.start + run.count * run.step, run.step)
        for rank in range(ring_size)
        for run in runs(length, ring_size, rank, layout)
    ]
    return torch.cat(parts)


def in_ring_order(
    tensors: Mapping[str, Tensor],
    dims: Mapping[str, int | None],
    length: int,
    ring_size: int,
    layout: Layout,
) -> dict[str, Tensor]:
    """Returns tensors with their tokens in the order of the shards.

    Args:
        tensors: by name.
        dims: for each tensor the dim of its S tokens, None where it is not sharded.
        length: tokens S of the padded sequence.
        ring_size: ranks R.
        layout: as for `runs`.
    """
    order = ring_order(length, ring_size, layout)
    if order is None:
        return dict(tensors)
    ordered = {}
    for name, tensor in tensors.items():
        dim = dims[name]
        ordered[name] = tensor
        if dim is not None:
            ordered[name] = tensor.index_select(dim, order.to(tensor.device))
    return ordered
