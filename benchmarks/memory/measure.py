"""Measures functions of tensors that hold less: bytes, products and copies by the allocation
tracker, error, time.

Every contender gets the same tensors. Counters first, in one run; then times: round robin, each
round in another order, ratios within a round. Peaks are over what was there before: inputs,
weights, and the gradient that comes in.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.counters import CPU_KERNEL
from benchmarks.report import shorten
from ulysses_accel.memory import AllocationTracker, track_allocations

Forward = Callable[..., Tensor]
Counts = dict[str, Any]


@dataclass
class Problem:
    """What is computed, for all contenders of a table.

    Args:
        leaves: tensors by name, of which gradients are taken; the forward's arguments, in this
            order.
        upstream: the gradient of the output.
        unit_bytes: bytes of one u.
        reference: the gradients by name and, as `output`, the output, in float64.
        product_flops: floating-point operations of one matrix-product unit of the table.
    """

    leaves: dict[str, Tensor]
    upstream: Tensor
    unit_bytes: int
    product_flops: int = 1
    reference: dict[str, Tensor] = field(default_factory=dict)

    def refer_to(self, forward: Forward) -> None:
        """Computes the reference in float64."""
        wide = {name: leaf.detach().double().requires_grad_() for name, leaf in self.leaves.items()}
        output = forward(*wide.values())
        output.backward(self.upstream.double())
        self.reference = {name: leaf.grad for name, leaf in wide.items() if leaf.grad is not None}
        self.reference["output"] = output.detach()

    def clear(self) -> None:
        """Forgets gradients."""
        for leaf in self.leaves.values():
            leaf.grad = None


class Descend(TorchDispatchMode):
    """Runs a library's own operators so that a mode outside of this one sees what they do
    inside.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation, if it is torch's, or what it consists of."""
        if func.namespace in ("aten", "prim", "prims", "c10d"):
            return func(*args, **(kwargs or {}))
        with self:
            return func.redispatch(CPU_KERNEL, *args, **(kwargs or {}))


def run_once(problem: Problem, forward: Forward) -> Tensor:
    """Forward and backward; gradients are left in the leaves."""
    problem.clear()
    output = forward(*problem.leaves.values())
    output.backward(problem.upstream.to(output.dtype))
    return output.detach()


def count(
    problem: Problem, forward: Forward, on_host: Callable[[AllocationTracker], Any] = nullcontext
) -> Counts:
    """Returns what one forward and backward allocates, copies and multiplies.

    Args:
        problem: what is computed.
        forward: the contender.
        on_host: a context that takes what the contender puts away on the host out of the count.
    """
    problem.clear()
    unit = problem.unit_bytes
    with (
        track_allocations(unit_bytes=unit, device=problem.upstream.device) as tracker,
        Descend(),
        on_host(tracker),
    ):
        output = forward(*problem.leaves.values())
        forward_flops, saved = tracker.matmul_flops, tracker.saved_bytes
        output.backward(problem.upstream.to(output.dtype))
    problem.clear()
    peaks = tracker.peak_by_phase
    return {
        "forward_peak_u": peaks["forward"] / unit,
        "saved_u": saved / unit,
        "backward_peak_u": peaks["backward"] / unit,
        "forward_products": forward_flops / problem.product_flops,
        "backward_products": (tracker.matmul_flops - forward_flops) / problem.product_flops,
        "attention_forward_calls": tracker.attention_forward_calls,
        "attention_backward_calls": tracker.attention_backward_calls,
        "copied_u": tracker.copied_bytes / unit,
    }


def relative_error(found: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference, over that of the reference."""
    return float((found.double() - reference).norm() / reference.norm().clamp_min(1e-300))


def errors(problem: Problem, forward: Forward) -> dict[str, float]:
    """Returns the relative errors of output and gradients."""
    found: dict[str, Tensor | None] = {"output": run_once(problem, forward)}
    found |= {name: leaf.grad for name, leaf in problem.leaves.items()}
    nothing = float("nan")
    result = {
        name: nothing if (value := found[name]) is None else relative_error(value, reference)
        for name, reference in problem.reference.items()
    }
    problem.clear()
    return result


def seconds_by_round(
    runs: Mapping[str, Callable[[], object]], rounds: int
) -> list[dict[str, float]]:
    """Takes every contender's processor time once a round, in a new order each time.

    Other work on the machine disturbs it less than the time on the wall.
    """
    order = random.Random(0)
    names, found = list(runs), []
    for _ in range(rounds):
        order.shuffle(names)
        taken = {}
        for name in names:
            start = time.process_time()
            runs[name]()
            taken[name] = time.process_time() - start
        found.append(taken)
    return found


def ratio(rounds: Sequence[Mapping[str, float]], name: str, baseline: str) -> float | None:
    """Median over the rounds of one contender's time over the baseline's in the same round."""
    return statistics.median(taken[name] / taken[baseline] for taken in rounds) if rounds else None


def measure(
    problem: Problem,
    contenders: Mapping[str, Forward],
    rounds: int,
    hosts: Mapping[str, Callable[[AllocationTracker], Any]] | None = None,
) -> list[dict[str, Any]]:
    """Returns one row for each contender; the first one is the unit of time.

    A contender that raises is a row that says so.

    Args:
        problem: what is computed.
        contenders: by name.
        rounds: of the times.
        hosts: by name, `on_host` of `count`.
    """
    rows: list[dict[str, Any]] = []
    runs: dict[str, Callable[[], object]] = {}
    for name, forward in contenders.items():
        row: dict[str, Any] = {"implementation": name}
        try:
            # First, so that what a library sets up once is not counted.
            row["errors"] = errors(problem, forward)
            row |= count(problem, forward, (hosts or {}).get(name, nullcontext))
            runs[name] = lambda forward=forward: run_once(problem, forward)  # type: ignore[misc]
        except Exception as error:
            row["refused"] = shorten(f"{type(error).__name__}: {error}")
        rows.append(row)
    timed = seconds_by_round(runs, rounds)
    for row in rows:
        name = row["implementation"]
        if name in runs:
            row["time_ratio"] = ratio(timed, name, next(iter(contenders)))
            row["seconds"] = statistics.median(taken[name] for taken in timed) if timed else None
    problem.clear()
    return rows
