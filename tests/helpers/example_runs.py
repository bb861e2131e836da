"""Runs an example's script as a user does, on two CPU processes."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    "ast",
    "argparse",
    "calendar",
    "configparser",
    "csv",
    "dataclasses",
    "difflib",
    "dis",
    "doctest",
    "enum",
)


def write_documents(folder: Path, size: int = 8_000) -> None:
    """Writes the beginnings of some modules of Python's own library, `size` characters of each."""
    for name in DOCUMENTS:
        source = Path(sysconfig.get_paths()["stdlib"], f"{name}.py")
        (folder / source.name).write_text(source.read_text()[:size])


def run_example(script: str, *flags: str) -> str:
    """Returns what a script under `examples/` prints; the package is this checkout's, installed or
    not.
    """
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
    ]
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launcher, str(ROOT / "examples" / script), *flags],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{script} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout
