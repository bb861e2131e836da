"""A gathered, re-sharded or pooled sequence is one process's, in value and in the mean of all
ranks' gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from tests.helpers.ranks import run_ranks
from ulysses_accel import gather_sequence, pool_sequence, shard_sequence
from ulysses_accel.errors import ConfigError, ShapeError
from ulysses_accel.sequence.description import SequenceDescription
from ulysses_accel.sequence.documents import Rows
from ulysses_accel.sequence.gather import Pooling, Unit
from ulysses_accel.sequence.layout import Layout

RANKS, LENGTH, WIDTH = 4, 16, 3
# float64 sums of a few dozen terms.
EXACT = 1e-14
LAYOUTS: list[tuple[int, Layout]] = [
    (1, "contiguous"),
    (4, "zigzag"),
    (2, "zigzag"),
    (4, "striped"),
]
# Padded left, right and not, packed, a hole, nothing but padding; with 4 tokens a rank, first and
# last lie on each.
ROWS: Rows = (((5, 16),), ((0, 3),), ((0, 7), (7, 8), (8, 14)), ((2, 12),), (), ((13, 15),))
HOLES: Rows = ((), (), (), ((4, 9),), (), ())
POOLINGS: list[Pooling] = ["first", "last", "mean", "max"]


def described(ring_size: int, layout: Layout) -> SequenceDescription:
    return SequenceDescription(LENGTH, RANKS, ROWS, ring_size, layout, HOLES)


def whole_hidden() -> Tensor:
    # Small whole numbers, so that maxima are tied, also between ranks.
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randint(-3, 4, (len(ROWS), LENGTH, WIDTH), generator=generator)
        .double()
        .requires_grad_()
    )


def weights_of(result: Tensor) -> Tensor:
    return torch.linspace(-1, 2, result.numel(), dtype=torch.float64).view_as(result)


def pooled(hidden: Tensor, how: Pooling, of: Unit) -> Tensor:
    """Returns what one process makes of the whole, one row or document at a time."""
    found = []
    for row, (segments, holes) in enumerate(zip(ROWS, HOLES)):
        hollow = {place for start, stop in holes for place in range(start, stop)}
        units = [
            [place for place in range(start, stop) if place not in hollow]
            for start, stop in segments
        ]
        for places in [list(chain(*units))] if of == "row" else units:
            tokens = hidden[row, places]
            reduced = {
                "first": lambda x: x[0],
                "last": lambda x: x[-1],
                "mean": lambda x: x.mean(0),
            }
            reduce = {**reduced, "max": lambda x: torch.amax(x, 0)}[how]
            found.append(reduce(tokens) if places else hidden.new_zeros(WIDTH))
    return torch.stack(found)


def distance(
    function: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor], group: ProcessGroup
) -> float:
    """Returns how far a function of the sharded sequence is from that of the whole, with its
    gradient.
    """
    whole, expected_of = whole_hidden(), whole_hidden()
    result, expected = function(whole), reference(expected_of)
    (result * weights_of(result)).sum().backward()
    (expected * weights_of(expected)).sum().backward()
    assert whole.grad is not None
    assert expected_of.grad is not None
    dist.all_reduce(whole.grad, group=group)
    errors = (result - expected).abs().max(), (whole.grad / RANKS - expected_of.grad).abs().max()
    return max(float(error.detach()) for error in errors)


def all_functions() -> dict[str, float]:
    group, found = dist.group.WORLD, {}
    assert group is not None
    for ring_size, layout in LAYOUTS:
        description = described(ring_size, layout)

        def own(whole: Tensor, description: SequenceDescription = description) -> Tensor:
            part = shard_sequence(whole, description, group)
            assert part.shape == (len(ROWS), LENGTH // RANKS, WIDTH)
            return part

        name = f"{layout} {ring_size}"
        found[f"gather, {name}"] = distance(
            lambda whole, one=description: gather_sequence(own(whole, one), one, group),
            lambda whole: whole,
            group,
        )
        for how in POOLINGS:
            for of in ("row", "document"):
                found[f"{how} of {of}, {name}"] = distance(
                    lambda whole, one=description, how=how, of=of: pool_sequence(
                        own(whole, one), one, group, how, of=of
                    ),
                    lambda whole, how=how, of=of: pooled(whole, how, of),
                    group,
                )
    return found


def other_shapes() -> list[str]:
    """Integers, another dim, tokens that every rank has all of, and what is refused."""
    group = dist.group.WORLD
    assert group is not None
    description = described(4, "zigzag")
    ids = torch.arange(len(ROWS) * LENGTH).view(len(ROWS), LENGTH)
    part = shard_sequence(ids, description, group)
    positions = ids.expand(3, -1, -1)
    deep = shard_sequence(positions, description, group, dim=-1)
    assert torch.equal(gather_sequence(part, description, group), ids)
    assert torch.equal(gather_sequence(deep, description, group, dim=-1), positions)
    one_shard = replace(description, num_shards=1, ring_size=1, layout="contiguous")
    hidden = whole_hidden()
    assert gather_sequence(hidden, one_shard, group) is hidden
    assert shard_sequence(hidden, one_shard, group) is hidden
    assert torch.equal(
        pool_sequence(hidden, one_shard, group, "mean"), pooled(hidden, "mean", "row")
    )
    messages = []
    for wrong in (
        lambda: gather_sequence(hidden, description, group),
        lambda: shard_sequence(hidden, replace(description, num_shards=2), group),
        lambda: pool_sequence(part, description, group, "median"),  # type: ignore[arg-type]
    ):
        with pytest.raises((ShapeError, ConfigError)) as caught:
            wrong()
        messages.append(str(caught.value))
    return messages


def test_every_layout_equals_one_process() -> None:
    for found in run_ranks(all_functions, RANKS):
        assert len(found) == len(LAYOUTS) * (1 + 2 * len(POOLINGS))
        assert not {name: error for name, error in found.items() if error > EXACT}


def test_other_shapes_and_refusals() -> None:
    for tokens, ranks, pooling in run_ranks(other_shapes, RANKS):
        assert (
            "of shape (6, 16, 3) was given for 4 tokens in dim 1 (16 tokens over 4 ranks)" in tokens
        )
        assert "is of 2 ranks that share a sequence, the group given has 4" in ranks
        assert "to return the 'median' of each 'row'" in pooling


def penalised(result: Tensor, hidden: Tensor) -> Tensor:
    """Returns the gradient of a penalty on the gradient of what is made of the result."""
    (grad,) = torch.autograd.grad(result.pow(3).sum(), hidden, create_graph=True)
    (second,) = torch.autograd.grad(grad.pow(2).sum(), hidden)
    return second


def second_order() -> list[float]:
    group = dist.group.WORLD
    assert group is not None
    description, found = described(4, "zigzag"), []
    for how in POOLINGS:
        whole = whole_hidden()
        own = shard_sequence(whole, description, group).detach().requires_grad_()
        second = penalised(pool_sequence(own, description, group, how), own)
        # Every rank's gradient is that of all ranks' losses together.
        expected = penalised(pooled(whole, how, "row"), whole) * RANKS**2
        found.append(float((second - shard_sequence(expected, description, group)).abs().max()))
    return found


def test_gradients_of_gradients() -> None:
    # Some thousands in size.
    assert max(chain(*run_ranks(second_order, RANKS))) <= 1e-10
