"""`aggregate_loss` is the mean over the whole batch's counted tokens, in value and in gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.profiler import ProfilerActivity, profile

from tests.helpers.ranks import run_ranks
from ulysses_accel.sequence.labels import IGNORE_INDEX
from ulysses_accel.sequence.loss import aggregate_loss, count_items

VOCAB = 5
RANKS = 2
# float64 sums of a few dozen terms.
EXACT = 1e-13
Labels = list[list[int]]

PATTERNS = st.lists(
    st.lists(st.sampled_from([IGNORE_INDEX, 0, 1, VOCAB - 1]), min_size=6, max_size=6),
    min_size=1,
    max_size=3,
)
NOTHING, SOME = [IGNORE_INDEX] * 3, [0, IGNORE_INDEX, 2]
FIXED: list[Labels] = [
    [NOTHING + SOME],
    [SOME + NOTHING, SOME + NOTHING],
    [NOTHING + NOTHING],
    [[1, 2, 3, 4, 0, 1]],
    [NOTHING + SOME, SOME + NOTHING],
]


def drawn(count: int) -> list[Labels]:
    """Draws in the parent, the same in every run, so that one fork computes them all."""
    found: list[Labels] = []

    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(PATTERNS)
    def collect(labels: Labels) -> None:
        found.append(labels)

    collect()
    return found


def whole_logits(labels: Labels, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(len(labels))
    return torch.randn(len(labels), len(labels[0]), VOCAB, generator=generator, dtype=dtype)


def expected(labels: Labels) -> tuple[float, Tensor]:
    """One process's mean and gradient; zeros where no token counts."""
    logits, targets = whole_logits(labels).requires_grad_(), torch.tensor(labels)
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    mean = total / max(1, int((targets != IGNORE_INDEX).sum()))
    mean.backward()
    assert logits.grad is not None
    return float(mean.detach()), logits.grad


def own(whole: Tensor) -> Tensor:
    return whole.chunk(RANKS, dim=1)[dist.get_rank() % RANKS]


def errors(labels: Labels, group: ProcessGroup) -> list[float]:
    """Returns the errors in value and gradient, without and with a count that was made before."""
    value, gradient = expected(labels)
    found = []
    for counted in (False, True):
        logits, targets = (
            own(whole_logits(labels)).clone().requires_grad_(),
            own(torch.tensor(labels)),
        )
        items = count_items([{"shift_labels": targets}], group) if counted else None
        flat = (logits.flatten(0, 1), targets.flatten())
        # As transformers' loss functions: the mean, NaN without a counted token; or the sum over
        # the number given.
        loss = (
            F.cross_entropy(*flat)
            if items is None
            else F.cross_entropy(*flat, reduction="sum") / items
        )
        total = aggregate_loss(loss, targets, group, num_items_in_batch=items)
        # A later factor must reach the gradient.
        (total * 3).backward()
        assert logits.grad is not None
        # Every engine averages over the ranks: each carries the factor of the group.
        found += [
            abs(float(total.detach()) - value),
            float((logits.grad / 3 / RANKS - own(gradient)).abs().max()),
        ]
    return found


def all_errors(patterns: list[Labels]) -> list[list[float]]:
    group = dist.group.WORLD
    assert group is not None
    return [errors(labels, group) for labels in patterns]


def test_value_and_gradient_are_those_of_one_process() -> None:
    patterns = FIXED + drawn(60)
    for rank in run_ranks(all_errors, RANKS, patterns):
        assert len(rank) == len(patterns)
        for labels, found in zip(patterns, rank):
            # NaN on a rank without a counted token must not leak: no comparison with it is true.
            assert all(error <= EXACT for error in found), labels


def collectives_of(function: Any) -> list[str]:
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        function()
    return [event.name for event in trace.events() if event.name.startswith("c10d::")]


def counted_collectives() -> dict[str, Any]:
    """On a group that does not hold global rank 0, too."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = groups[dist.get_rank() // 2]
    loss = torch.tensor(2.0 + group.rank(), requires_grad=True)
    labels = torch.tensor([[1, IGNORE_INDEX, 2]] if group.rank() else [[1, 2, 3]])
    kept: list[Tensor] = []
    forward = collectives_of(lambda: kept.append(aggregate_loss(loss, labels, group)))
    backward = collectives_of(lambda: kept[0].backward())
    given = collectives_of(
        lambda: aggregate_loss(loss, labels, group, num_items_in_batch=torch.tensor(5))
    )
    items = collectives_of(lambda: kept.append(count_items([{"shift_labels": labels}] * 3, group)))
    return {
        "counts": [forward, backward, given, items],
        "values": [float(kept[0].detach()), int(kept[1])],
    }


def test_one_collective_on_the_groups_own_ranks() -> None:
    for rank in run_ranks(counted_collectives, 4):
        assert rank["counts"] == [
            ["c10d::allreduce_"],
            [],
            ["c10d::allreduce_"],
            ["c10d::allreduce_"],
        ]
        assert rank["values"] == [pytest.approx(2.0 * 3 / 5 + 3.0 * 2 / 5), 15]


def other_types() -> dict[str, Any]:
    group = dist.group.WORLD
    assert group is not None
    labels = torch.tensor([[1, 2, -1]])
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        loss = torch.tensor(1.0 + dist.get_rank(), dtype=dtype, requires_grad=True)
        total = aggregate_loss(loss, labels, group, ignore_index=-1)
        total.backward()
        assert loss.grad is not None
        found[str(dtype)] = [
            float(total.detach()),
            float(loss.grad),
            total.dtype == loss.grad.dtype == dtype,
        ]
    nothing = torch.full((1, 3), IGNORE_INDEX)
    found["nothing"] = int(count_items([{"shift_labels": nothing}], group))
    # 2^24 + 1 tokens are not a float32; the count must not be rounded to one.
    many = torch.zeros(1, 2**24 + dist.get_rank(), dtype=torch.int8)
    found["many"] = int(count_items([{"shift_labels": many}], group))
    return found


def test_types_other_ignored_labels_and_large_counts() -> None:
    for rank in run_ranks(other_types, RANKS):
        assert rank["torch.float32"] == [1.5, 1.0, True]
        assert rank["torch.bfloat16"] == [1.5, 1.0, True]
        assert rank["nothing"] == 1
        assert rank["many"] == 2**25 + 1
