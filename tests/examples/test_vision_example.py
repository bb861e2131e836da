"""The example of images as a user runs it: two processes share each row, and the loss falls below
guessing.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_two_processes_learn_to_see() -> None:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
    ]
    command = [
        *torchrun,
        str(ROOT / "examples/vision/train.py"),
        "--sp-size",
        "2",
        "--steps",
        "40",
        "--cpu",
    ]
    # The package of this checkout, installed or not.
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    for process in range(2):
        assert f"process {process}: each layer saw 56 of a row's 112 tokens" in done.stdout
    found = re.search(r"first loss ([\d.]+), last loss ([\d.]+)", done.stdout)
    assert found is not None
    first, last = float(found[1]), float(found[2])
    # A model that does not see the images can only guess one color of four.
    assert last < 0.7 * math.log(4) < math.log(4) < first
