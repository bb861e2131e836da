"""`ulysses-accel launch` carries the memory settings to the workers, from flags and from both kinds
of file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands import launch as stock

from ulysses_accel.cli import launch as module
from ulysses_accel.cli.launch import LaunchPlan, plan_launch
from ulysses_accel.config.memory import MemoryConfig
from ulysses_accel.config.parallelism import ParallelismConfig
from ulysses_accel.errors import ConfigError

WORKER = """
import json, os, sys
from ulysses_accel import ParallelismConfig
config = ParallelismConfig()
said = {"memory": config.memory_config.to_dict(), "explained": config.explain()}
said["allocator"] = os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
open(f"{sys.argv[1]}/rank{os.environ['RANK']}.json", "w").write(json.dumps(said))
"""
FILE = """distributed_type: MULTI_GPU
num_processes: 2
use_cpu: true
parallelism_config:
  sp_size: 2
memory_config:
  tiled_mlp: true
  checkpoint: true
  expandable_segments: true
"""


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for owner in (module, stock):
        monkeypatch.setattr(owner, "default_config_file", str(tmp_path / "none.yaml"))
    ours = (
        "PARALLELISM_CONFIG_",
        "MEMORY_CONFIG_",
        "ACCELERATE_",
        "ULYSSES_",
        "PYTORCH_ALLOC",
        "PYTORCH_CUDA_ALLOC",
    )
    for variable in list(os.environ):
        if variable.startswith(ours):
            monkeypatch.delenv(variable)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(FILE)
    return path


def _worker_config(plan: LaunchPlan, monkeypatch: pytest.MonkeyPatch) -> ParallelismConfig:
    with monkeypatch.context() as patch:
        for name, value in plan.environment.items():
            patch.setenv(name, value)
        return ParallelismConfig()


def test_a_section_and_a_flag_reach_every_worker(tmp_path: Path, file: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    code = "import sys; from ulysses_accel.cli import main; sys.exit(main(sys.argv[1:]))"
    flags = [
        "--config_file",
        str(file),
        "--memory-config-tiled-mlp",
        "false",
        "--memory-config-save-attention",
        "host",
    ]
    command = [sys.executable, "-c", code, "launch", *flags, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    ranks: list[dict[str, Any]] = [
        json.loads(path.read_text()) for path in tmp_path.glob("rank*.json")
    ]
    assert (done.returncode, len(ranks)) == (0, 2), done.stderr
    expected = MemoryConfig(
        checkpoint=True, save_attention="host", expandable_segments=True
    ).to_dict()
    for rank in ranks:
        assert (rank["memory"], rank["allocator"]) == (expected, "expandable_segments:True")
        assert "tiled_mlp = False (command line --memory-config-tiled-mlp)" in rank["explained"]
        assert f"checkpoint = True ({file}:8 (checkpoint))" in rank["explained"]


def test_precedence(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMORY_CONFIG_TILED_NORM", "true")
    monkeypatch.setenv("MEMORY_CONFIG_CHECKPOINT", "false")
    flags = [
        "--config_file",
        str(file),
        "--memory_config_tiled_norm=false",
        "--memory-config-tiled-mlp-bytes",
        "4096",
    ]
    plan = plan_launch([*flags, "train.py"])
    assert plan.arguments.config_file == str(file)
    config = _worker_config(plan, monkeypatch)
    assert config.memory_config == plan.config.memory_config
    assert config.memory_config == MemoryConfig(
        tiled_mlp=True,
        tiled_mlp_bytes=4096,
        tiled_norm=False,
        checkpoint=False,
        expandable_segments=True,
    )
    for name in ("tiled_mlp", "tiled_norm", "checkpoint"):
        assert str(config.source_of(name)) == str(plan.config.source_of(name))
    assert str(config.source_of("checkpoint")) == "env MEMORY_CONFIG_CHECKPOINT"


def test_without_any_setting_nothing_is_exported() -> None:
    plan = plan_launch(["--cpu", "--parallelism-config-sp-size", "2", "train.py"])
    assert plan.config.memory_config is None
    assert not [
        name for name in plan.environment if name.startswith(("MEMORY_CONFIG_", "PYTORCH_"))
    ]


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_users_allocator_settings_stay(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["--num_processes", "2", "--memory-config-expandable-segments", "true", "train.py"]
    assert plan_launch(argv).environment["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv(variable, "max_split_size_mb:512")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in plan_launch(argv).environment


def test_a_file_whose_other_sections_accelerate_refuses_is_named(file: Path) -> None:
    file.write_text(FILE + "surprise: 1\n")
    with pytest.raises(
        ConfigError, match=r"job\.yaml: accelerate can't use .*unknown keys \(\['surprise'\]\)"
    ):
        plan_launch(["--config_file", str(file), "train.py"])


def test_a_json_file_may_have_the_section(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    content = {
        "distributed_type": "MULTI_GPU",
        "num_processes": 2,
        "memory_config": {"tiled_loss": "true"},
    }
    path.write_text(json.dumps(content))
    plan = plan_launch(["--config_file", str(path), "train.py"])
    assert (plan.arguments.num_processes, plan.config.memory_config) == (
        2,
        MemoryConfig(tiled_loss=True),
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--memory-config-tiled-mpl", "true"], "Did you mean '--memory-config-tiled-mlp'"),
        (
            ["--memory-config-tiled-mlp", "maybe"],
            r"\(from command line --memory-config-tiled-mlp\) must be true",
        ),
        (
            ["--memory-config-checkpoint-offload", "true"],
            r"\(from command line --memory-config-checkpoint-offload\) means nothing with "
            r"checkpoint=False",
        ),
    ],
)
def test_wrong_flags_start_nothing(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_launch([*argv, "train.py"])
