"""The TRL jobs as a user runs them: two processes share each sequence, and what is logged does not
depend on that.
"""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import trl  # noqa: F401  imported before the fork, so that ranks start warm

from tests.helpers.ranks import run_ranks

ROOT = Path(__file__).parents[2]
# Weights and losses are float32, and so are their sums, in another order.
CLOSE = 1e-3


def steps_of(text: str) -> list[dict[str, Any]]:
    """Returns what a job printed of each step."""
    return [ast.literal_eval(line) for line in text.splitlines() if line.startswith("{'loss'")]


def run(script: str, folder: str, *flags: str) -> None:
    """Runs an example to its end in this process; its output goes into a file."""
    path = ROOT / "examples/trl" / script
    sys.argv = [str(path), "--steps", "3", "--output", folder, *flags]
    sys.path.insert(0, str(path.parent))
    with Path(f"{folder}-{os.environ['RANK']}.log").open("w") as log, redirect_stdout(log):
        runpy.run_path(str(path), run_name="__main__")


def launch(script: str, folder: Path, *flags: str) -> list[dict[str, Any]]:
    """Runs an example by torchrun on two processes, and returns its steps."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [
        sys.executable,
        *torchrun,
        str(ROOT / "examples/trl" / script),
        "--steps",
        "3",
        "--output",
        str(folder),
    ]
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *flags],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return steps_of(done.stdout)


def forked(script: str, folder: Path, num_processes: int, *flags: str) -> list[dict[str, Any]]:
    run_ranks(run, num_processes, script, str(folder), *flags, init=False)
    return steps_of(Path(f"{folder}-0.log").read_text())


def check_same(alone: list[dict[str, Any]], shared: list[dict[str, Any]]) -> None:
    assert len(alone) == len(shared) == 3
    for one, two in zip(alone, shared, strict=True):
        assert one["num_tokens"] == two["num_tokens"]
        for name in ("loss", "grad_norm", "entropy"):
            assert abs(float(one[name]) - float(two[name])) <= CLOSE * max(
                1.0, abs(float(one[name]))
            ), (name, one, two)


def test_an_adapter_on_packed_rows_and_a_ring(tmp_path: Path) -> None:
    alone = forked("sft.py", tmp_path / "one", 1, "--lora")
    check_same(alone, launch("sft.py", tmp_path / "two", "--lora", "--cp-size", "2"))


def test_preferences(tmp_path: Path) -> None:
    alone = forked("dpo.py", tmp_path / "one", 1)
    check_same(alone, forked("dpo.py", tmp_path / "two", 2, "--sp-size", "2"))
