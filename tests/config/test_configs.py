"""Every file in configs/ is loaded by both launchers, and the workers get what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands import launch as stock
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from ulysses_accel.cli.launch import plan_launch
from ulysses_accel.config.memory import MemoryConfig
from ulysses_accel.config.parallelism import ParallelismConfig

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))
# Data parallel, Ulysses and all processes.
SIZES = {
    "alst_ddp": (1, 8, 8),
    "alst_fsdp2": (1, 8, 8),
    "alst_zero3": (1, 8, 8),
    "cpu_sp2": (1, 2, 2),
    "ddp_sp2": (1, 2, 2),
    "ddp_sp8": (1, 8, 8),
    "deepspeed_zero2_sp2": (1, 2, 2),
    "deepspeed_zero3_offload_sp8": (1, 8, 8),
    "deepspeed_zero3_sp2": (1, 2, 2),
    "fsdp2_dp2_sp4": (2, 4, 8),
    "fsdp2_sp2": (1, 2, 2),
    "fsdp2_tp2_sp4": (1, 4, 8),
    "fsdp2_usp_cp2_sp4": (1, 4, 8),
    "multinode_fsdp2_sp8": (2, 8, 16),
    "ring_zigzag": (1, 1, 2),
}
RINGS = {"fsdp2_usp_cp2_sp4": 2, "ring_zigzag": 2}
TENSORS = {"fsdp2_tp2_sp4": 2}
MACHINE = ["--machine_rank", "1", "--main_process_ip", "10.0.0.1"]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.startswith(
            ("PARALLELISM_CONFIG_", "MEMORY_CONFIG_", "ACCELERATE_", "ULYSSES_")
        ):
            monkeypatch.delenv(variable)


def _machine(file: Path) -> list[str]:
    return MACHINE if file.stem.startswith("multinode") else []


def test_the_list_is_complete() -> None:
    assert [file.stem for file in FILES] == sorted(SIZES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_header_says_what_for_and_how(file: Path) -> None:
    text = file.read_text()
    assert text.startswith("# ")
    assert f"#   ulysses-accel launch --config_file configs/{file.name}" in text
    assert f"#   accelerate launch --config_file configs/{file.name}" in text


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_our_launcher_and_our_config_read_it(file: Path) -> None:
    data, degree, processes = SIZES[file.stem]
    plan = plan_launch(["--config_file", str(file), *_machine(file), "train.py"])
    assert plan.notices == []
    assert plan.arguments.num_processes == processes
    for config in (plan.config, ParallelismConfig.from_yaml(file)):
        config.fit_world_size(processes)
        assert (config.data_parallel_size, config.sp_size) == (data, degree)
        assert (config.cp_size, config.cp_backend) == (RINGS.get(file.stem, 1), "ring")
        assert config.tp_size == TENSORS.get(file.stem, 1)
        assert (config.cp_handler.layout, config.cp_handler.exchange) == ("zigzag", "p2p")
        name = "cp_size" if file.stem in RINGS else "sp_size"
        assert str(config.source_of(name)).startswith(f"{file}:")
        assert config.memory_config == (
            MemoryConfig.alst() if file.stem.startswith("alst_") else None
        )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_stock_accelerate_takes_it_with_a_size_flag(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _, processes = SIZES[file.stem]
    if file.stem in ("ddp_sp8", "deepspeed_zero3_offload_sp8") or file.stem.startswith("alst_"):
        data = (
            processes // 2
        )  # nobody sets data parallelism there: what the smaller degree leaves is derived
    ring = RINGS.get(file.stem, 1)
    world_size = data * 2 * ring * TENSORS.get(file.stem, 1)
    flags = ["--config_file", str(file), *_machine(file), "--num_processes", str(world_size)]
    flags += ["--parallelism-config-sp-size", "2", "--main_process_port", "29517"]
    arguments, defaults, _ = stock._validate_launch_command(
        stock.launch_command_parser().parse_args([*flags, "train.py"])
    )
    assert arguments.use_parallelism_config
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        environment = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        assert arguments.use_fsdp or arguments.multi_gpu
        environment = prepare_multi_gpu_env(arguments)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = ParallelismConfig()
    config.fit_world_size(world_size)
    assert (config.sp_size, config.data_parallel_size, config.sp_backend) == (2, data, "ulysses")
    # accelerate exports a strategy that nobody chose.
    assert (config.cp_size, config.cp_backend, config.cp_handler.exchange) == (ring, "ring", "p2p")
    assert config.sp_handler.sp_attn_implementation == "sdpa"
    assert config.sp_handler.sp_seq_length_is_variable is True
    assert config.sp_handler.sp_seq_length is None


def test_stock_accelerate_starts_it(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, json, sys\n"
        "keep = {k: v for k, v in os.environ.items() if k.startswith(('PARALLELISM_CONFIG_', "
        "'WORLD_SIZE'))}\n"
        "open(f\"{sys.argv[1]}/{os.environ['RANK']}.json\", 'w').write(json.dumps(keep))\n"
    )
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--config_file",
    ]
    command += [
        str(FOLDER / "cpu_sp2.yaml"),
        "--main_process_port",
        "0",
        "--parallelism-config-sp-size",
        "2",
    ]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    ranks = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert len(ranks) == 2, done.stderr
    for rank in ranks:
        assert (rank["WORLD_SIZE"], rank["PARALLELISM_CONFIG_SP_SIZE"]) == ("2", "2")
        assert rank["PARALLELISM_CONFIG_SP_BACKEND"] == "ulysses"
