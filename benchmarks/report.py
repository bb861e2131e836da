"""Tables of the benchmarks: printed, kept as JSON in `results/`, and put between the README's
markers.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "axolotl-ringmaster",
    "yunchang",
    "ring-attention-pytorch",
    "trl",
    "ulysses-accel",
)


def versions() -> dict[str, str]:
    """Versions of everything that takes part, and the number of cores."""
    found = {"python": platform.python_version(), "cores": str(os.cpu_count())}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def publish(
    name: str,
    headings: Sequence[str],
    lines: Sequence[Sequence[str]],
    rows: Sequence[dict[str, Any]],
    *,
    write: bool,
) -> None:
    """Print the table; with `write`, keep it as JSON and in the README."""
    taken = versions()
    text = f"{table(headings, lines)}\n\n{_measured_with(taken)}\n"
    print(text)
    if not write:
        return
    (FOLDER / "results").mkdir(exist_ok=True)
    path = FOLDER / "results" / f"{name}-cpu.json"
    path.write_text(json.dumps({"versions": taken, "rows": list(rows)}, indent=1) + "\n")
    update_readme(name, text)


@dataclass(frozen=True)
class Section:
    """One of several tables of a benchmark, with the raw rows behind it; each row names its section
    as `group`.
    """

    headings: Sequence[str]
    lines: Sequence[Sequence[str]]
    rows: Sequence[dict[str, Any]]


def publish_sections(name: str, sections: Mapping[str, Section], *, measured: bool = True) -> None:
    """Keeps several tables in one JSON and each in its README section; sections not made now stay
    as they are.

    Tables that are computed, not measured, are of no machine.
    """
    taken = versions() if measured else {"ulysses-accel": version("ulysses-accel")}
    path = FOLDER / "results" / (f"{name}-cpu.json" if measured else f"{name}.json")
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in old if row.get("group", name) not in sections]
    for group, section in sections.items():
        rows += section.rows
        source = f"\n\n{_measured_with(taken)}\n" if measured else "\n"
        update_readme(group, f"{table(section.headings, section.lines)}{source}")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"versions": taken, "rows": rows}, indent=1) + "\n")


def _measured_with(taken: Mapping[str, str]) -> str:
    return f"Measured with {', '.join(f'{key} {value}' for key, value in taken.items())}."


def table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    rule = ["---"] * len(headings)
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, rule, *lines))


def update_readme(name: str, text: str) -> None:
    """Replace what stands between the markers of this name."""
    path = FOLDER / "README.md"
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    old = path.read_text()
    if start not in old or end not in old:
        raise ValueError(f"{path.name} has no section {start} ... {end}: add the two markers.")
    section = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    path.write_text(section.sub(lambda _: f"{start}\n{text}{end}", old))


def number(value: float | None, scale: float, digits: int) -> str:
    """A scaled number, or nothing where there is none."""
    return "" if value is None else f"{value * scale:.{digits}f}"


def verdict(text: str, correct: bool) -> str:
    """The value, marked where it is wrong."""
    return text if correct else f"**wrong: {text}**"


def shorten(text: str, limit: int = 90) -> str:
    """The first line, cut to what fits in a table cell."""
    line = " ".join(text.split()).replace("|", "/")
    return line if len(line) <= limit else f"{line[: limit - 3]}..."
