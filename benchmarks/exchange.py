"""One attention layer, forward and backward: our Ulysses beside DeepSpeed's and ringmaster's, in one run.

    python -m benchmarks.exchange

Every implementation starts from the projections' layout `[B, S/P, H * D]` and ends in it, so that no copy hides in
a view that the caller would have to straighten. All use the same sdpa core. Counters first, then times: round robin,
each round in another order, one barrier before each measurement; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks import contenders, report
from benchmarks.contenders import Attend, Case
from benchmarks.counters import OperationCounter
from benchmarks.ranks import run_ranks

CASES: dict[int, tuple[Case, ...]] = {
    2: (Case(8, 8), Case(8, 2)),
    4: (Case(8, 8), Case(8, 4), Case(8, 2)),
}
TOLERANCE = 1e-4
CORE = "core alone"
# gloo's worker threads may hold a message a moment after its exchange, at random: the smallest peak is without them.
PEAK_REPEATS = 5


class Bench:
    """One case on one rank: the same inputs for everybody, and the single-process answer."""

    def __init__(self, case: Case, rank: int, world_size: int) -> None:
        self.case, self.rank, self.world_size = case, rank, world_size
        torch.manual_seed(0)
        shapes = [(case.batch, case.tokens, heads, case.head_size) for heads in _head_counts(case)]
        full = [torch.randn(shape, requires_grad=True) for shape in shapes]
        gradient = torch.randn(shapes[0])
        query, key, value = (tensor.transpose(1, 2) for tensor in full)
        output = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=case.heads != case.kv_heads
        ).transpose(1, 2)
        gradients = torch.autograd.grad(output, full, gradient)
        self.expected = [self._shard(tensor) for tensor in (output, *gradients)]
        self.leaves = [self._shard(tensor).requires_grad_() for tensor in full]
        self.gradient = self._shard(gradient)

    def _shard(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's tokens with the heads merged: `[B, S/P, H * D]`, contiguous."""
        return tensor.detach().chunk(self.world_size, dim=1)[self.rank].flatten(2).clone()

    def forward(self, attend: Attend) -> torch.Tensor:
        """Projections in, input of the output projection out."""
        size = self.case.head_size
        query, key, value = (leaf.unflatten(-1, (-1, size)).transpose(1, 2) for leaf in self.leaves)
        return attend(query, key, value).flatten(2).contiguous()

    def backward(self, output: torch.Tensor) -> list[torch.Tensor]:
        """Gradients of the projections' outputs, as the projections' own backward needs them."""
        return [gradient.contiguous() for gradient in torch.autograd.grad(output, self.leaves, self.gradient)]

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
        return {"forward": forward.to_dict(), "backward": backward.to_dict(), "peak_bytes": min(peaks)}

    def seconds(self, attend: Attend) -> float:
        """Wall time of one forward and backward after a barrier."""
        dist.barrier()
        start = time.perf_counter()
        self.backward(self.forward(attend))
        return time.perf_counter() - start


def run_case(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """All implementations on one case, on one rank."""
    case = Case(**options["case"])
    bench = Bench(case, rank, world_size)
    rows: dict[str, dict[str, Any]] = {}
    runnable: dict[str, Attend] = {}
    for name, build in contenders.available().items():
        try:
            attend = build(case)
            rows[name] = {"max_error": bench.check(attend), **bench.count(attend)}
            runnable[name] = attend
        except Exception as error:
            rows[name] = {"refused": f"{type(error).__name__}: {error}"}
    times = measure(bench, runnable, options["rounds"])
    for name, series in times.items():
        rows.setdefault(name, {})["seconds"] = series
    return rows


def measure(bench: Bench, runnable: dict[str, Attend], rounds: int) -> dict[str, list[float]]:
    """Seconds per implementation and round, interleaved, and those of the attention core alone."""
    core = contenders.core_only(bench.case, bench.world_size)
    names = [*runnable, CORE]
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            elapsed = _core_seconds(core) if name == CORE else bench.seconds(runnable[name])
            if turn:  # the first round warms up
                times[name].append(elapsed)
    return times


def summarize(case: Case, world_size: int, ranks: Sequence[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of the table: counts of the busiest rank, and times of the slowest rank of each round."""
    times = {
        name: [max(values) for values in zip(*(rank[name]["seconds"] for rank in ranks))]
        for name, row in ranks[0].items()
        if "seconds" in row
    }
    rows = []
    for name in ranks[0]:
        row: dict[str, Any] = {"world_size": world_size, "case": asdict(case), "implementation": name}
        row["unit_bytes"] = case.unit(world_size)
        if name != CORE:
            row |= _refusal(ranks, name) or _counts(ranks, name)
        if name in times:
            row |= _timing(times, name)
        rows.append(row)
    return rows


def _refusal(ranks: Sequence[dict[str, dict[str, Any]]], name: str) -> dict[str, Any]:
    reasons = [rank[name]["refused"] for rank in ranks if "refused" in rank[name]]
    return {"refused": reasons[0]} if reasons else {}


def _counts(ranks: Sequence[dict[str, dict[str, Any]]], name: str) -> dict[str, Any]:
    counts: dict[str, Any] = {
        f"{direction}_{key}": max(rank[name][direction][key] for rank in ranks)
        for direction in ("forward", "backward")
        for key in ("collectives", "bytes_sent", "bytes_copied")
    }
    counts["operations"] = {d: ranks[0][name][d]["operations"] for d in ("forward", "backward")}
    counts["peak_bytes"] = max(rank[name]["peak_bytes"] for rank in ranks)
    counts["max_error"] = max(rank[name]["max_error"] for rank in ranks)
    counts["correct"] = counts["max_error"] <= TOLERANCE
    return counts


def _timing(times: dict[str, list[float]], name: str) -> dict[str, Any]:
    timing: dict[str, Any] = {"seconds": statistics.median(times[name]), "rounds": len(times[name])}
    base = times.get(contenders.DEEPSPEED)
    if base:
        timing["ratio"] = statistics.median(mine / theirs for mine, theirs in zip(times[name], base))
        if name != CORE:
            above = [max(t - c, 0.0) for t, c in zip(times[name], times[CORE])]
            timing["seconds_above_core"] = statistics.median(above)
    return timing


def _core_seconds(core: Any) -> float:
    dist.barrier()
    start = time.perf_counter()
    core()
    return time.perf_counter() - start


def _head_counts(case: Case) -> tuple[int, int, int]:
    return case.heads, case.kv_heads, case.kv_heads


HEADINGS = (
    "ranks",
    "heads q/kv",
    "implementation",
    "collectives fwd + bwd",
    "sent fwd + bwd (u)",
    "copied fwd + bwd (u)",
    "peak live (u)",
    "max error",
    "time (ms)",
    "above core (ms)",
    "time / DeepSpeed",
)


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table, in the order of `HEADINGS`."""
    case = row["case"]
    head = [str(row["world_size"]), f"{case['heads']}/{case['kv_heads']}", row["implementation"]]
    timing = [
        report.number(row.get("seconds"), 1e3, 1),
        report.number(row.get("seconds_above_core"), 1e3, 1),
        report.number(row.get("ratio"), 1, 2),
    ]
    if "refused" in row:
        return [*head, f"refused: {report.shorten(row['refused'])}", *[""] * 4, *timing]
    if row["implementation"] == CORE:
        return [*head, *[""] * 5, *timing]
    unit = row["unit_bytes"]
    sent, copied = (
        [row[f"{way}_bytes_{what}"] / unit for way in ("forward", "backward")] for what in ("sent", "copied")
    )
    return [
        *head,
        f"{row['forward_collectives']} + {row['backward_collectives']}",
        f"{sent[0]:.2f} + {sent[1]:.2f}",
        f"{copied[0]:.1f} + {copied[1]:.1f}",
        f"{row['peak_bytes'] / unit:.1f}",
        report.verdict(f"{row['max_error']:.1e}", row["correct"]),
        *timing,
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write it to `results/` and to the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--ranks", type=int, nargs="*", default=sorted(CASES))
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    contenders.preload()
    rows: list[dict[str, Any]] = []
    for world_size in options.ranks:
        for case in CASES[world_size]:
            work = {"case": asdict(case) | {"tokens": options.tokens}, "rounds": options.rounds}
            results = run_ranks(run_case, world_size, work, timeout=150)
            rows += summarize(Case(**work["case"]), world_size, results)
    report.publish("exchange", HEADINGS, [cells(row) for row in rows], rows, write=not options.no_write)


if __name__ == "__main__":
    main()
