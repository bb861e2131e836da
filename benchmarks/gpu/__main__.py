"""The measurements that need a GPU: each case in a process of its own, with a time limit of its
own.

    python -m benchmarks.gpu [--cases NAME ...] [--dry]

Cases are ordered by worth, and each fits a command of ten minutes; `--list` says which there are.
`--dry` runs them on the CPU in tiny sizes, to see that they run. Results go to
`results/gpu-<device>.json`, case by case.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.gpu.cases import CASES

HEADINGS = ["case", "tokens", "peak (GiB)", "pinned host (GiB)", "seconds", "finding"]
# What a process needs to start and to build its model.
START_SECONDS = 60


def run_case(name: str, limit: float, dry: bool) -> dict[str, Any]:
    """Runs one case in a fresh process; one that fails or takes too long is a row that says so."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu.cases",
            name,
            str(path),
            "--limit",
            str(limit),
        ]
        settings = (
            {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
            if not dry
            else {"DS_ACCELERATOR": "cpu"}
        )
        row: dict[str, Any] = {"case": name}
        try:
            done = subprocess.run(
                command + ["--dry"] * dry,
                env={**os.environ, **settings},
                capture_output=True,
                text=True,
                timeout=limit + START_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return row | {
                "refused": f"not done within {limit + START_SECONDS:.0f} s",
                **_partial(path),
            }
        if done.returncode:
            last = [line for line in done.stderr.strip().splitlines() if line.strip()][-1:] or [
                "no output"
            ]
            return row | {"refused": report.shorten(last[0], 200), **_partial(path)}
        return row | _partial(path)


def _partial(path: Path) -> dict[str, Any]:
    """What a case has written so far."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table."""
    sizes = [report.number(row.get(name), 2**-30, 2) for name in ("peak_bytes", "host_bytes")]
    finding = row.get("finding", "")
    if "refused" in row:
        finding = f"{finding} refused: {row['refused']}".strip()
    tokens = f"{row['tokens']:,}" if "tokens" in row else ""
    return [row["case"], tokens, *sizes, report.number(row.get("seconds"), 1, 2), finding]


def device_name() -> str:
    """The device, as it goes into a file name."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def save(row: dict[str, Any]) -> None:
    """Keeps a row, in place of an earlier one of the same case."""
    path = report.FOLDER / "results" / f"gpu-{device_name()}.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [*(other for other in old if other["case"] != row["case"]), row]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"versions": report.versions(), "rows": rows}, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the cases; where there is no GPU, says so."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases", nargs="*", default=list(CASES), metavar="NAME", help="names, or how they begin"
    )
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU; nothing is kept")
    parser.add_argument(
        "--list", action="store_true", help="say which cases there are, and their limits in seconds"
    )
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{name}: {case.limit:.0f}" for name, case in CASES.items()))
        return
    if not options.dry and not torch.cuda.is_available():
        print("no CUDA device: nothing was measured. Use --dry to see that the cases run.")
        return
    names = [name for name in CASES if any(name.startswith(asked) for asked in options.cases)]
    rows = []
    for name in names:
        rows.append(run_case(name, CASES[name].limit, options.dry))
        print(" | ".join(cells(rows[-1])), flush=True)
        if not options.dry:
            save(rows[-1])
    print(report.table(HEADINGS, [cells(row) for row in rows]))


if __name__ == "__main__":
    main()
