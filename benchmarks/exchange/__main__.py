"""One attention layer, forward and backward: our Ulysses, ring and both, beside other
implementations in one run.

    python -m benchmarks.exchange

Every implementation starts from the projections' layout `[B, S/P, H * D]` and ends in it, so that
no copy hides in a view that the caller would have to straighten. Counters first, then times: round
robin, each round in another order, one barrier before each measurement; ratios are taken within a
round.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from benchmarks import contenders, report
from benchmarks.contenders import Case
from benchmarks.exchange.bench import run_case, summarize
from benchmarks.exchange.table import RING_HEADINGS, ULYSSES_HEADINGS, ring_cells, ulysses_cells
from benchmarks.ranks import run_ranks
from benchmarks.ring import contenders as ring_contenders
from benchmarks.ring import precision as ring_precision
from benchmarks.ring.contenders import Contender


@dataclass(frozen=True)
class Group:
    """One table.

    Args:
        cases: by the number of ranks.
        contenders: the implementations.
        baseline: whose time the others are divided by.
        ring_size: ranks of the ring; 0 for all.
        core: whether to time the attention operator alone as well.
        headings: of the table.
        cells: one line of it.
    """

    cases: Mapping[int, tuple[Case, ...]]
    contenders: Callable[[], Mapping[str, Contender]]
    baseline: str
    ring_size: int
    core: bool
    headings: Sequence[str]
    cells: Callable[[dict[str, Any]], list[str]]


def _ulysses() -> dict[str, Contender]:
    return {name: Contender("torch", build) for name, build in contenders.available().items()}


GROUPS = {
    "exchange": Group(
        cases={2: (Case(8, 8), Case(8, 2)), 4: (Case(8, 8), Case(8, 4), Case(8, 2))},
        contenders=_ulysses,
        baseline=contenders.DEEPSPEED,
        ring_size=1,
        core=True,
        headings=ULYSSES_HEADINGS,
        cells=ulysses_cells,
    ),
    "ring": Group(
        cases={2: (Case(8, 2),), 4: (Case(8, 8), Case(8, 2))},
        contenders=ring_contenders.rings,
        baseline=ring_contenders.TORCH,
        ring_size=0,
        core=False,
        headings=RING_HEADINGS,
        cells=ring_cells,
    ),
    "unified": Group(
        cases={4: (Case(8, 8), Case(8, 2))},
        contenders=ring_contenders.unified,
        baseline=ring_contenders.OURS_ULYSSES,
        ring_size=2,
        core=False,
        headings=RING_HEADINGS,
        cells=ring_cells,
    ),
}
PRECISION = "precision"


def measure_group(name: str, group: Group, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one table, in fresh processes for each case."""
    rows: list[dict[str, Any]] = []
    for world_size in (size for size in options.ranks if size in group.cases):
        for case in group.cases[world_size]:
            work = {
                "case": asdict(case) | {"tokens": options.tokens},
                "ring_size": group.ring_size or world_size,
                "rounds": options.rounds,
                "contenders": group.contenders(),
                "core": group.core,
            }
            results = run_ranks(run_case, world_size, work, timeout=400)
            rows += [
                {"group": name} | row
                for row in summarize(work, world_size, results, group.baseline)
            ]
    return rows


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument(
        "--groups", nargs="*", default=[*GROUPS, PRECISION], choices=[*GROUPS, PRECISION]
    )
    parser.add_argument("--no-write", action="store_true", help="print only")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write them to `results/` and to the README."""
    options = _options(arguments)
    contenders.preload()
    ring_contenders.preload()
    for name in options.groups:
        if name == PRECISION:
            rows = ring_precision.measure_precision()
            section = report.Section(ring_precision.HEADINGS, ring_precision.lines(rows), rows)
        else:
            rows = measure_group(name, GROUPS[name], options)
            section = report.Section(
                GROUPS[name].headings, [GROUPS[name].cells(row) for row in rows], rows
            )
        print(report.table(section.headings, section.lines), flush=True)
        if not options.no_write:
            report.publish_sections("exchange", {name: section})


if __name__ == "__main__":
    main()
