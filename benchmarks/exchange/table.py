"""The columns of `benchmarks.exchange`'s tables."""

from __future__ import annotations

from typing import Any

from benchmarks import report
from benchmarks.exchange.bench import CORE, DIRECTIONS

ULYSSES_HEADINGS = (
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
RING_HEADINGS = (
    "ranks",
    "heads q/kv",
    "implementation",
    "transfers fwd + bwd",
    "sent fwd + bwd (u)",
    "of usual",
    "busiest rank (u)",
    "copied fwd + bwd (u)",
    "peak live (u)",
    "max error",
    "time (ms)",
    "ratio",
)
NOT_COMPARABLE = "–"


def ulysses_cells(row: dict[str, Any]) -> list[str]:
    """One line of the table of Ulysses, in the order of `ULYSSES_HEADINGS`."""
    timing = [
        report.number(row.get("seconds"), 1e3, 1),
        report.number(row.get("seconds_above_core"), 1e3, 1),
        report.number(row.get("ratio"), 1, 2),
    ]
    if "refused" in row:
        return [*_head(row), _refused(row), *[""] * 4, *timing]
    if row["implementation"] == CORE:
        return [*_head(row), *[""] * 5, *timing]
    return [
        *_head(row),
        _both(row, "collectives", 1, 0),
        _both(row, "bytes_sent", row["unit_bytes"], 2),
        *_inside(row),
        *timing,
    ]


def ring_cells(row: dict[str, Any]) -> list[str]:
    """One line of the tables with rings, in the order of `RING_HEADINGS`."""
    timing = [report.number(row.get("seconds"), 1e3, 1), report.number(row.get("ratio"), 1, 2)]
    if "refused" in row:
        return [*_head(row), _refused(row), *[""] * 6, *timing]
    return [
        *_head(row),
        _both(row, "transfers", 1, 0),
        _both(row, "mean_bytes_sent", row["unit_bytes"], 2),
        _of_usual(row),
        _both(row, "bytes_sent", row["unit_bytes"], 2),
        *_inside(row),
        *(timing if row["shares_kernel"] else [NOT_COMPARABLE] * 2),
    ]


def _of_usual(row: dict[str, Any]) -> str:
    """Sent bytes over those of a plain ring: 2K(P - 1) u forward, twice that backward; nothing with
    Ulysses inside.
    """
    world_size, unit = row["world_size"], row["unit_bytes"]
    if row["ring_size"] != world_size:
        return ""
    usual = 2 * row["case"]["kv_heads"] * (world_size - 1) * unit
    shares = [
        row[f"{way}_mean_bytes_sent"] / (usual * times) for way, times in zip(DIRECTIONS, (1, 2))
    ]
    return f"{shares[0]:.2f} + {shares[1]:.2f}"


def _head(row: dict[str, Any]) -> list[str]:
    case = row["case"]
    return [str(row["world_size"]), f"{case['heads']}/{case['kv_heads']}", row["implementation"]]


def _inside(row: dict[str, Any]) -> list[str]:
    """Copies, peak and error."""
    error = report.verdict(f"{row['max_error']:.1e}", row["correct"])
    if not row["shares_kernel"]:
        return [NOT_COMPARABLE, NOT_COMPARABLE, error]
    unit = row["unit_bytes"]
    return [_both(row, "bytes_copied", unit, 1), f"{row['peak_bytes'] / unit:.1f}", error]


def _both(row: dict[str, Any], what: str, unit: float, digits: int) -> str:
    forward, backward = (row[f"{way}_{what}"] / unit for way in DIRECTIONS)
    return f"{forward:.{digits}f} + {backward:.{digits}f}"


def _refused(row: dict[str, Any]) -> str:
    return f"refused: {report.shorten(row['refused'])}"
