"""How the error of bfloat16 grows with the ring: every ring's output and gradients against float64,
1 to 8 ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import report
from benchmarks.contenders import Case
from benchmarks.exchange.bench import single_process
from benchmarks.ranks import RanksFailedError, run_ranks
from benchmarks.ring.contenders import Contender, rings
from ulysses_accel.sequence.layout import ring_order

SIZES = (1, 2, 4, 8)
CASE = Case(heads=4, kv_heads=4, tokens=1024)
TENSORS = ("output", "query", "key", "value")
HEADINGS = (
    "implementation",
    *(f"{size} ranks" if size > 1 else "1 rank" for size in SIZES),
    "8 / 2 ranks",
)
# A relative error above this is no rounding of bfloat16, whose half step is 2e-3.
ROUNDING = 0.03


def squared_errors(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """Sums over this rank's tokens of squared errors and squares, for output and gradients."""
    case, contender = options["case"], options["contender"]
    order = ring_order(case.tokens, world_size, contender.layout)
    positions = (torch.arange(case.tokens) if order is None else order).chunk(world_size)[rank]
    inputs, expected = single_process(case, torch.float64)
    attend = contender.build(case)
    leaves = [
        tensor[:, positions].bfloat16().transpose(1, 2).requires_grad_() for tensor in inputs[:3]
    ]
    output = attend(*leaves)
    gradients = torch.autograd.grad(output, leaves, inputs[3][:, positions].bfloat16())
    actual = [output.detach(), *(gradient.transpose(1, 2) for gradient in gradients)]
    pairs = [(a.double(), e[:, positions]) for a, e in zip(actual, expected)]
    return {"sums": [[float((a - e).square().sum()), float(e.square().sum())] for a, e in pairs]}


def relative_errors(name: str, contender: Contender) -> dict[str, Any]:
    """One row for the JSON: errors by ring size and tensor, or why there is none."""
    row: dict[str, Any] = {
        "group": "precision",
        "implementation": name,
        "case": asdict(CASE),
        "errors": {},
    }
    for size in SIZES:
        try:
            ranks = run_ranks(
                squared_errors, size, {"case": CASE, "contender": contender}, timeout=60
            )
        except RanksFailedError as error:
            row["errors"][size] = {"refused": str(error).strip().splitlines()[-1]}
            continue
        totals = torch.tensor([rank["sums"] for rank in ranks], dtype=torch.float64).sum(0)
        row["errors"][size] = dict(zip(TENSORS, (totals[:, 0] / totals[:, 1]).sqrt().tolist()))
    return row


def measure_precision() -> list[dict[str, Any]]:
    """Rows of every ring."""
    chosen: Mapping[str, Contender] = rings()
    return [relative_errors(name, contender) for name, contender in chosen.items()]


def lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Lines of the table, in units of 1e-3: output, query, and the worse of key and value."""
    found = []
    for row in rows:
        worst = {size: _worst(row["errors"][size]) for size in SIZES}
        growth = ["" if not (worst[2] and worst[8]) else f"{max(worst[8]) / max(worst[2]):.2f}"]
        found.append([row["implementation"], *(_cell(worst[size]) for size in SIZES), *growth])
    return found


def _worst(errors: dict[str, float]) -> list[float]:
    """Errors of output, query, and key and value; nothing where it did not run."""
    return (
        []
        if "refused" in errors
        else [errors["output"], errors["query"], max(errors["key"], errors["value"])]
    )


def _cell(worst: list[float]) -> str:
    if not worst:
        return "does not run"
    return report.verdict(
        " / ".join(f"{value * 1e3:.1f}" for value in worst), max(worst) <= ROUNDING
    )
