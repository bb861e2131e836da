"""What a block, a layer and a step need beside their inputs: ours beside plain transformers and
other libraries.

    python -m benchmarks.memory

Bytes, products and copies are those of `ulysses_accel.memory.track_allocations`, for everybody;
with `--no-write` the tables are only printed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from benchmarks import report
from benchmarks.memory.blocks import loss_rows, mlp_rows, norm_rows
from benchmarks.memory.layer import layer_rows
from benchmarks.memory.step import preload, step_rows

Row = dict[str, Any]
Cells = Callable[[Row], list[str]]
PEAKS = ["peak forward (u)", "saved (u)", "peak backward (u)"]
MLP_HEADINGS = [
    "implementation",
    *PEAKS,
    "products",
    "copied (u)",
    "error dX",
    "error dW",
    "CPU time / plain",
]
NORM_HEADINGS = [heading for heading in MLP_HEADINGS if heading != "products"]
LOSS_HEADINGS = [
    *(
        "implementation",
        *PEAKS,
        "products",
        "copied (u)",
        "error of the loss",
        "error dX",
        "error dW",
    ),
    *("error dX, dW where loss / 32", "CPU time / plain"),
]
LAYER_HEADINGS = [
    *(
        "implementation",
        "peak forward (u)",
        "saved (u)",
        "working set (u)",
        "MLP products",
        "attention calls",
    ),
    *("copied (u)", "error dX", "error dW", "CPU time / transformers"),
]
STEP_HEADINGS = [
    *(
        "implementation",
        "ranks",
        "peak (MiB per rank)",
        "of baseline",
        "peak forward (u)",
        "peak backward (u)",
    ),
    *(
        "saved (u)",
        "products (GFLOP)",
        "attention calls",
        "copied (u)",
        "error of the gradient's norm",
    ),
    "CPU time / baseline",
]
# Beyond this a gradient is not rounded differently, but another one.
WRONG = 0.1


def _error(value: float) -> str:
    return report.verdict(f"{value:.1e}", value < WRONG)


def _peaks(row: Row) -> list[str]:
    return [
        report.number(row[name], 1, 1) for name in ("forward_peak_u", "saved_u", "backward_peak_u")
    ]


def _products(row: Row) -> str:
    return f"{row['forward_products']:.1f} + {row['backward_products']:.1f}"


def mlp_cells(row: Row) -> list[str]:
    """One line of the MLP's table."""
    errors = [_error(row["errors"]["hidden"]), _error(row["weight_error"])]
    copied = report.number(row["copied_u"], 1, 1)
    return [row["implementation"], *_peaks(row), _products(row), copied, *errors, _ratio(row)]


def norm_cells(row: Row) -> list[str]:
    """One line of the norm's table."""
    cells = mlp_cells(row)
    del cells[MLP_HEADINGS.index("products")]
    return cells


def loss_cells(row: Row) -> list[str]:
    """One line of the loss's table."""
    found, later = row["errors"], row["scaled_errors"]
    errors = [_error(found[name]) for name in ("output", "hidden", "weight")]
    errors.append(", ".join(_error(later[name]) for name in ("hidden", "weight")))
    copied = report.number(row["copied_u"], 1, 1)
    return [row["implementation"], *_peaks(row), _products(row), copied, *errors, _ratio(row)]


def layer_cells(row: Row) -> list[str]:
    """One line of the layer's table."""
    sizes = [
        report.number(row[name], 1, 1)
        for name in ("forward_peak_u", "saved_u", "working_set_u", "mlp_products")
    ]
    errors = [_error(row["errors"]["hidden"]), _error(row["weight_error"])]
    return [
        row["implementation"],
        *sizes,
        _calls(row),
        report.number(row["copied_u"], 1, 1),
        *errors,
        _ratio(row),
    ]


def step_cells(row: Row, baseline: float) -> list[str]:
    """One line of the step's table."""
    sizes = [
        report.number(row[name], 1, 1) for name in ("forward_peak_u", "backward_peak_u", "saved_u")
    ]
    return [
        *(row["implementation"], str(row["ranks"]), report.number(row["peak_bytes"], 2**-20, 1)),
        *(
            f"{row['peak_bytes'] / baseline:.3f}",
            *sizes,
            report.number(row["matmul_flops"], 1e-9, 1),
            _calls(row),
        ),
        *(report.number(row["copied_u"], 1, 1), _error(row["gradient_norm_error"]), _ratio(row)),
    ]


def _calls(row: Row) -> str:
    return f"{row['attention_forward_calls']} + {row['attention_backward_calls']}"


def _ratio(row: Row) -> str:
    return report.number(row.get("time_ratio"), 1, 2)


def _lines(rows: Sequence[Row], cells: Cells, headings: Sequence[str]) -> list[list[str]]:
    def refused(row: Row) -> list[str]:
        return [row["implementation"], f"refused: {row['refused']}", *[""] * (len(headings) - 2)]

    return [refused(row) if "refused" in row else cells(row) for row in rows]


def measure_group(name: str, options: argparse.Namespace) -> report.Section:
    """Measures one table."""
    tokens, rounds = options.tokens, options.rounds
    if name == "memory-step":
        rows = step_rows(tokens // 2, rounds, steps=2)
        baseline = float(rows[0]["peak_bytes"])
        headings = STEP_HEADINGS
        cells: Cells = partial(step_cells, baseline=baseline)
    else:
        measured, headings, cells = BLOCKS[name]
        rows = measured(tokens, rounds)
    rows = [{"group": name} | row for row in rows]
    return report.Section(headings, _lines(rows, cells, headings), rows)


BLOCKS: dict[str, tuple[Callable[[int, int], list[Row]], list[str], Cells]] = {
    "memory-mlp": (mlp_rows, MLP_HEADINGS, mlp_cells),
    "memory-norm": (norm_rows, NORM_HEADINGS, norm_cells),
    "memory-loss": (loss_rows, LOSS_HEADINGS, loss_cells),
    "memory-layer": (layer_rows, LAYER_HEADINGS, layer_cells),
}
# The step comes first: it forks, which wants a process that has not computed yet.
GROUPS = ("memory-step", *BLOCKS)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--tokens", type=int, default=8192, help="of a block; a step has half as many"
    )
    parser.add_argument("--groups", nargs="*", default=GROUPS, choices=GROUPS)
    parser.add_argument("--no-write", action="store_true", help="print only")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write them to `results/` and to the README."""
    options = _options(arguments)
    torch.set_num_threads(1)
    preload()
    sections: dict[str, report.Section] = {}
    for name in options.groups:
        section = sections[name] = measure_group(name, options)
        print(f"{name}\n{report.table(section.headings, section.lines)}\n", flush=True)
    if not options.no_write:
        report.publish_sections("memory", sections)


if __name__ == "__main__":
    main()
