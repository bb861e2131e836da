"""One attention layer on one rank: the inputs for every token order, the counts and the interleaved
times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks import contenders
from benchmarks.contenders import Attend, Case
from benchmarks.counters import OperationCounter
from benchmarks.ring.contenders import Contender
from ulysses_accel.sequence.layout import Layout, ring_order

TOLERANCE = 1e-4
CORE = "core alone"
DIRECTIONS = ("forward", "backward")
# gloo's worker threads may hold a message a moment after its exchange, at random: the smallest peak
# is without them.
PEAK_REPEATS = 5


def single_process(
    case: Case, dtype: torch.dtype = torch.float32
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The whole inputs and the output's gradient `[B, S, N, D]`, and the output and gradients of
    one process.

    Inputs are drawn in float32 and rounded to bfloat16 for float64, whose answer is that of half
    precision's inputs.
    """
    torch.manual_seed(0)
    counts = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    drawn = [torch.randn(case.batch, case.tokens, heads, case.head_size) for heads in counts]
    if dtype == torch.float64:
        drawn = [tensor.bfloat16().double() for tensor in drawn]
    full = [tensor.requires_grad_() for tensor in drawn[:3]]
    query, key, value = (tensor.transpose(1, 2) for tensor in full)
    gqa = case.heads != case.kv_heads
    output = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=gqa
    ).transpose(1, 2)
    gradients = torch.autograd.grad(output, full, drawn[3])
    return [*(tensor.detach() for tensor in full), drawn[3]], [output.detach(), *gradients]


class Bench:
    """One rank's part of a case in one token order."""

    def __init__(
        self, case: Case, rank: int, world_size: int, ring_size: int, layout: Layout
    ) -> None:
        self.case = case
        order = ring_order(case.tokens, ring_size, layout)
        positions = torch.arange(case.tokens) if order is None else order
        self.positions = positions.chunk(world_size)[rank]
        inputs, expected = single_process(case)
        self.expected = [self.shard(tensor) for tensor in expected]
        self.leaves = [self.shard(tensor).requires_grad_() for tensor in inputs[:3]]
        self.gradient = self.shard(inputs[3])

    def shard(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's tokens with the heads merged: `[B, S/P, H * D]`, contiguous."""
        return tensor[:, self.positions].flatten(2)

    def forward(self, attend: Attend) -> torch.Tensor:
        """Projections in, input of the output projection out."""
        size = self.case.head_size
        query, key, value = (leaf.unflatten(-1, (-1, size)).transpose(1, 2) for leaf in self.leaves)
        return attend(query, key, value).flatten(2).contiguous()

    def backward(self, output: torch.Tensor) -> list[torch.Tensor]:
        """Gradients of the projections' outputs, as the projections' own backward needs them."""
        return [
            gradient.contiguous()
            for gradient in torch.autograd.grad(output, self.leaves, self.gradient)
        ]

    def check(self, attend: Attend) -> float:
        """Largest absolute error of the output and the three gradients."""
        output = self.forward(attend)
        actual = [output, *self.backward(output)]
        return max((a - e).abs().max().item() for a, e in zip(actual, self.expected))

    def count(self, attend: Attend) -> dict[str, Any]:
        """Exact counts of one forward and one backward, and the peak over both."""
        peaks = []
        for _ in range(PEAK_REPEATS):
            with OperationCounter() as counter:
                output = self.forward(attend)
                forward = counter.take()
                gradients = self.backward(output)
                backward = counter.take()
                del output, gradients
            peaks.append(max(forward.peak_bytes, backward.peak_bytes))
        return {
            "forward": forward.to_dict(),
            "backward": backward.to_dict(),
            "peak_bytes": min(peaks),
        }

    def seconds(self, attend: Attend) -> float:
        """Wall time of one forward and backward after a barrier."""
        return _seconds(lambda: self.backward(self.forward(attend)))


def run_case(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """All implementations on one case, on one rank.

    Args:
        rank: this rank.
        world_size: all of them.
        options: `case`, `ring_size`, `rounds`, `contenders` by name, and `core`, whether to time
            the kernel alone.
    """
    case = Case(**options["case"])
    found: Mapping[str, Contender] = options["contenders"]
    layouts = {contender.layout for contender in found.values()}
    benches = {
        layout: Bench(case, rank, world_size, options["ring_size"], layout) for layout in layouts
    }
    rows: dict[str, dict[str, Any]] = {}
    turns: dict[str, Callable[[], float]] = {}
    for name, contender in found.items():
        bench = benches[contender.layout]
        try:
            attend = contender.build(case)
            rows[name] = {"max_error": bench.check(attend), **bench.count(attend)}
            turns[name] = _turn(bench, attend)
        except Exception as error:
            rows[name] = {"refused": f"{type(error).__name__}: {error}"}
    if options["core"]:
        core = contenders.core_only(case, world_size)
        turns[CORE] = lambda: _seconds(core)
    for name, series in measure(turns, options["rounds"]).items():
        rows.setdefault(name, {})["seconds"] = series
    return rows


def _turn(bench: Bench, attend: Attend) -> Callable[[], float]:
    return lambda: bench.seconds(attend)


def measure(turns: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds per implementation and round: each round starts with another one."""
    names = list(turns)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            elapsed = turns[name]()
            if number:  # the first round warms up
                times[name].append(elapsed)
    return times


def _seconds(function: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def summarize(
    options: dict[str, Any],
    world_size: int,
    ranks: Sequence[dict[str, dict[str, Any]]],
    baseline: str,
) -> list[dict[str, Any]]:
    """Rows of the table: counts of the busiest rank and sent bytes of the mean one, times of the
    slowest rank.
    """
    case, found = Case(**options["case"]), options["contenders"]
    times = {
        name: [max(values) for values in zip(*(rank[name]["seconds"] for rank in ranks))]
        for name, row in ranks[0].items()
        if "seconds" in row
    }
    rows = []
    for name in ranks[0]:
        row: dict[str, Any] = {
            "world_size": world_size,
            "case": asdict(case),
            "implementation": name,
        }
        row |= {"unit_bytes": case.unit(world_size), "ring_size": options["ring_size"]}
        if name != CORE:
            row |= {"shares_kernel": found[name].shares_kernel}
            row |= _refusal(ranks, name) or _counts(ranks, name)
        if name in times:
            row |= _timing(times, name, baseline)
        rows.append(row)
    return rows


def _refusal(ranks: Sequence[dict[str, dict[str, Any]]], name: str) -> dict[str, Any]:
    reasons = [rank[name]["refused"] for rank in ranks if "refused" in rank[name]]
    return {"refused": reasons[0]} if reasons else {}


def _counts(ranks: Sequence[dict[str, dict[str, Any]]], name: str) -> dict[str, Any]:
    counts: dict[str, Any] = {
        f"{direction}_{key}": max(rank[name][direction][key] for rank in ranks)
        for direction in DIRECTIONS
        for key in ("collectives", "bytes_sent", "bytes_copied")
    }
    for direction in DIRECTIONS:
        sent = [rank[name][direction]["bytes_sent"] for rank in ranks]
        counts[f"{direction}_mean_bytes_sent"] = statistics.mean(sent)
        counts[f"{direction}_transfers"] = max(
            _transfers(rank[name][direction]["operations"]) for rank in ranks
        )
    counts["operations"] = {d: ranks[0][name][d]["operations"] for d in DIRECTIONS}
    counts["peak_bytes"] = max(rank[name]["peak_bytes"] for rank in ranks)
    counts["max_error"] = max(rank[name]["max_error"] for rank in ranks)
    counts["correct"] = counts["max_error"] <= TOLERANCE
    return counts


def _transfers(operations: dict[str, int]) -> int:
    """Collectives and messages sent; a message is not counted again where it is received."""
    return sum(count for name, count in operations.items() if "recv" not in name)


def _timing(times: dict[str, list[float]], name: str, baseline: str) -> dict[str, Any]:
    timing: dict[str, Any] = {"seconds": statistics.median(times[name]), "rounds": len(times[name])}
    base = times.get(baseline)
    if base:
        timing["ratio"] = statistics.median(
            mine / theirs for mine, theirs in zip(times[name], base)
        )
    if CORE in times and name != CORE:
        above = [max(t - c, 0.0) for t, c in zip(times[name], times[CORE])]
        timing["seconds_above_core"] = statistics.median(above)
    return timing
