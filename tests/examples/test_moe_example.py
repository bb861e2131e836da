"""The mixture-of-experts example: two processes that share sequences and experts print what one
process prints.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "moe" / "train.py"
_LINE = re.compile(
    r"step (\d+): loss ([\d.]+), router loss ([\d.]+), tokens per expert \[([\d, ]+)\]"
)


def printed(num_processes: int, *flags: str) -> tuple[str, list[tuple[float, float, list[int]]]]:
    """Runs the example; returns all that it printed, and the numbers of each step."""
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(num_processes),
        "--standalone",
    ]
    command = [sys.executable, *(torchrun if num_processes > 1 else []), str(SCRIPT), *flags]
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    sizes = ("--steps", "4", "--print-every", "1", "--documents", "1")
    done = subprocess.run(
        [*command, *sizes],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = _LINE.findall(done.stdout)
    return done.stdout, [
        (float(loss), float(aux), [int(n) for n in counts.split(",")])
        for _, loss, aux, counts in found
    ]


def test_two_processes_train_as_one(support: Any) -> None:
    text, shared = printed(2)
    assert "2 processes, each with 4 of 8 experts of a layer" in text
    _, alone = printed(1, "--sp-size", "1", "--ep-size", "1")
    assert len(shared) == len(alone) == 4
    for (loss, aux, counts), (one_loss, one_aux, one_counts) in zip(shared, alone, strict=True):
        # Printed to four digits, in float32; two layers of 512 tokens choose two experts each.
        assert loss == pytest.approx(one_loss, abs=5e-4)
        assert aux == pytest.approx(one_aux, abs=5e-4)
        assert sum(counts) == 2 * 512 * 2
        assert sum(abs(count - other) for count, other in zip(counts, one_counts, strict=True)) <= 8
    support(
        "system",
        "Ulysses with experts dealt to ranks",
        "ep × sp",
        code="ParallelismConfig(sp_size=2, ep_size=2)",
    )
