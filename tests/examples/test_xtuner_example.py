"""The document's loop as a user runs it: two processes that share each sequence print what one
process prints.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.support import Support

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples/xtuner"
# Odd, so that padding is needed; the second sample of a batch is shorter.
FLAGS = ["--sequence-length", "127", "--documents", "8", "--steps", "4"]
NAMES = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("xtuner_example", FOLDER / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("documents")
    for number, name in enumerate(NAMES):
        (folder / f"{name}.txt").write_text(f"{name} {number} " * 40)
    return [*FLAGS, "--data", str(folder)]


def losses(example: ModuleType, flags: list[str], slurm: bool) -> list[float]:
    if slurm:
        # As srun leaves them; run_ranks sets torchrun's.
        names = {
            "RANK": "SLURM_PROCID",
            "WORLD_SIZE": "SLURM_NTASKS",
            "LOCAL_RANK": "SLURM_LOCALID",
        }
        os.environ.update(
            {name: os.environ.pop(old) for old, name in names.items()},
            SLURM_NODELIST="127.0.0.1,b[2-3]",
        )
        del os.environ["MASTER_ADDR"]
        flags = ["--launcher", "slurm", *flags]
    found: list[float] = example.train(example.parse_args(flags))
    return found


@pytest.fixture(scope="module")
def alone(example: ModuleType, flags: list[str]) -> list[float]:
    """The losses of one process."""
    (found,) = run_ranks(losses, 1, example, flags, False, init=False)
    return list(found)


def test_two_processes_train_as_one(alone: list[float], flags: list[str], support: Support) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
    ]
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(FOLDER / "train.py"), "--sequence-parallel-size", "2", *flags],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    shared = [float(text) for text in re.findall(r"^step \d+: loss (\S+)$", done.stdout, re.M)]
    assert len(shared) == len(alone) == 4
    # Four printed places, of steps in float32.
    assert shared == pytest.approx(alone, abs=2e-4)
    assert shared[-1] < 0.9 * shared[0]
    support(
        "system",
        "XTuner: the five functions",
        "sp",
        code="from ulysses_accel.compat.xtuner import dispatch_modules",
    )


def test_slurm_tasks_train_as_one_process(
    example: ModuleType, alone: list[float], flags: list[str]
) -> None:
    for rank in run_ranks(
        losses, 2, example, ["--sequence-parallel-size", "2", *flags], True, init=False
    ):
        assert rank == pytest.approx(alone, abs=2e-4)


def test_the_slurm_file_starts_the_script(example: ModuleType) -> None:
    script = (FOLDER / "slurm.sh").read_text()
    subprocess.run(["bash", "-n", str(FOLDER / "slurm.sh")], check=True)
    (line,) = [line for line in script.splitlines() if line.startswith("srun ")]
    command = shlex.split(line.replace("${SLURM_NTASKS:-16}", "16").replace('"$@"', "--steps 3"))
    assert (ROOT / command[2]).samefile(FOLDER / "train.py")
    args = example.parse_args(command[3:])
    assert (args.launcher, args.sequence_parallel_size, args.steps) == ("slurm", 16, 3)
    # One task for each process.
    nodes, tasks = (
        int(re.findall(rf"^#SBATCH --{name}=(\d+)$", script, re.M)[0])
        for name in ("nodes", "ntasks-per-node")
    )
    assert nodes * tasks == args.sequence_parallel_size
