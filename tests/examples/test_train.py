"""The main job as a user runs it: two processes share each sequence, and the result does not depend
on that.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NUM_STEPS = 10
SAVE_EVERY = 5
METRICS = {"step", "loss", "num_tokens", "tokens_per_second", "grad_norm", "peak_bytes"}
SETTINGS = [
    *("--sequence-length", "256", "--steps", str(NUM_STEPS), "--warmup-steps", "2"),
    *("--gradient-accumulation-steps", "2", "--save-every", str(SAVE_EVERY)),
]
DOCUMENTS = [
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
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the documents to train on; runs are written beside them."""
    root = tmp_path_factory.mktemp("alst")
    (root / "documents").mkdir()
    for name in DOCUMENTS:
        source = Path(sysconfig.get_paths()["stdlib"], f"{name}.py")
        (root / "documents" / source.name).write_text(source.read_text()[:8_000])
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def shared(folder: Path) -> Path:
    """The uninterrupted run of two processes that share each sequence."""
    return train(folder, "shared", num_processes=2, sp_size=2)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The same run on one process."""
    return train(folder, "alone", num_processes=1, sp_size=1)


def train(folder: Path, name: str, num_processes: int, sp_size: int, *flags: str) -> Path:
    output = folder / name
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(num_processes),
        "--standalone",
    ]
    launcher = [sys.executable, *(torchrun if num_processes > 1 else [])]
    command = [
        *launcher,
        str(ROOT / "examples/alst/train.py"),
        "--sp-size",
        str(sp_size),
        *SETTINGS,
        *flags,
    ]
    paths = ["--data", str(folder / "documents"), "--output", str(output), "--eval-documents", "2"]
    # The package of this checkout, installed or not.
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *paths],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return output


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def summary(run: Path) -> dict[str, float]:
    text = json.loads((run / "summary.json").read_text())
    return {key: float(value) for key, value in text.items()}


def test_the_held_out_loss_falls_clearly(shared: Path) -> None:
    assert summary(shared)["held_out_after"] < 0.9 * summary(shared)["held_out_before"]


def test_every_step_is_recorded(shared: Path) -> None:
    steps = records(shared)
    assert [step["step"] for step in steps] == list(range(1, NUM_STEPS + 1))
    assert all(set(step) == METRICS for step in steps)
    assert all(507 <= step["num_tokens"] <= 510 for step in steps)
    assert all(
        step["tokens_per_second"] > 0 and step["grad_norm"] > 0 and step["peak_bytes"] > 0
        for step in steps
    )


def test_the_loss_is_drawn(shared: Path) -> None:
    assert (shared / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_sharing_a_sequence_changes_nothing(shared: Path, alone: Path) -> None:
    for key in ("loss", "grad_norm", "num_tokens"):
        expected = [step[key] for step in records(alone)]
        assert [step[key] for step in records(shared)] == pytest.approx(
            expected, abs=1e-4, rel=1e-4
        )
    assert summary(shared)["held_out_before"] == pytest.approx(
        summary(alone)["held_out_before"], abs=1e-5
    )
    assert summary(shared)["held_out_after"] == pytest.approx(
        summary(alone)["held_out_after"], abs=1e-4
    )


def test_a_resumed_run_repeats_the_uninterrupted_one(folder: Path, shared: Path) -> None:
    interrupted = folder / "resumed"
    interrupted.mkdir()
    shutil.copytree(shared / f"checkpoint-{SAVE_EVERY}", interrupted / f"checkpoint-{SAVE_EVERY}")
    shutil.copy(shared / "metrics.jsonl", interrupted)
    train(folder, "resumed", 2, 2, "--resume")
    assert [(step["step"], step["loss"], step["grad_norm"]) for step in records(interrupted)] == [
        (step["step"], step["loss"], step["grad_norm"]) for step in records(shared)
    ]
    assert summary(interrupted)["held_out_before"] == summary(shared)["held_out_before"]
    assert summary(interrupted)["held_out_after"] == summary(shared)["held_out_after"]


def test_saving_memory_changes_nothing_but_the_rounding_of_reduced_gradients(
    folder: Path, shared: Path
) -> None:
    saving = train(folder, "alst", 2, 2, "--memory", "alst")
    assert summary(saving)["held_out_before"] == pytest.approx(
        summary(shared)["held_out_before"], abs=1e-5
    )
    first, *_, last = (pytest.approx(step["loss"], rel=2e-2) for step in records(shared))
    assert (records(saving)[0]["loss"], records(saving)[-1]["loss"]) == (first, last)
    # bfloat16 has 8 bits: a norm of many rounded terms is off by far less than one of them, 2^-9.
    assert records(saving)[0]["grad_norm"] == pytest.approx(
        records(shared)[0]["grad_norm"], rel=2**-9
    )
