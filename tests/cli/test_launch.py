"""`ulysses-accel launch`: what the flags say is what the workers get."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands import launch as stock
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from ulysses_accel.cli import launch as module
from ulysses_accel.cli import main
from ulysses_accel.cli.launch import LaunchPlan, plan_launch
from ulysses_accel.config.parallelism import ParallelismConfig
from ulysses_accel.config.settings import FIELDS
from ulysses_accel.errors import ConfigError, MeshError

CONFIGS = Path(__file__).parents[2] / "configs"
WORKER = """
import json, os, sys, time
wanted = ("PARALLELISM_CONFIG_", "ACCELERATE_", "FSDP_", "ULYSSES_", "DS_ACC", "RANK", "WORLD_SIZE", "OMP_")
line = json.dumps({"argv": sys.argv[2:]} | {k: v for k, v in os.environ.items() if k.startswith(wanted)})
file = f"{sys.argv[1]}/rank{os.environ.get('RANK', '0')}.json"
with open(f"{file}.part", "w") as part:
    part.write(line)
os.replace(f"{file}.part", file)
if "--fail" in sys.argv:
    # The launcher kills the other workers when one fails: all write their file before that.
    size, end = int(os.environ.get("WORLD_SIZE", "1")), time.monotonic() + 60
    while time.monotonic() < end and len([f for f in os.listdir(sys.argv[1]) if f.endswith(".json")]) < size:
        time.sleep(0.01)
    sys.exit(int(sys.argv[-1]))
"""


@pytest.fixture(autouse=True)
def _no_default_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for owner in (module, stock):
        monkeypatch.setattr(owner, "default_config_file", str(tmp_path / "none.yaml"))
    for variable in list(os.environ):
        if variable.startswith(
            ("PARALLELISM_CONFIG_", "MEMORY_CONFIG_", "ACCELERATE_", "ULYSSES_")
        ):
            monkeypatch.delenv(variable)


def _worker_config(plan: LaunchPlan, monkeypatch: pytest.MonkeyPatch) -> ParallelismConfig:
    with monkeypatch.context() as patch:
        for name, value in plan.environment.items():
            patch.setenv(name, value)
        return ParallelismConfig()


def _worker_environment(plan: LaunchPlan, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    with monkeypatch.context() as patch:
        for name, value in plan.environment.items():
            patch.setenv(name, value)
        prepare = {
            "torchrun": prepare_multi_gpu_env,
            "deepspeed": lambda a: prepare_deepspeed_cmd_env(a)[1],
        }
        return dict(prepare[plan.starter](plan.arguments))


def _run(folder: Path, *argv: str) -> tuple[int, list[dict[str, Any]], str]:
    script = folder / "worker.py"
    script.write_text(WORKER)
    flags = [str(script) if word == "SCRIPT" else word for word in argv]
    code = "import sys; from ulysses_accel.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "launch", *flags],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    ranks = [json.loads(file.read_text()) for file in sorted(folder.glob("rank*.json"))]
    return done.returncode, ranks, done.stderr


def test_flags_alone_reach_every_worker(tmp_path: Path) -> None:
    code, ranks, log = _run(
        tmp_path,
        "--cpu",
        "--parallelism-config-sp-size",
        "2",
        "SCRIPT",
        str(tmp_path),
        "--lr",
        "1e-4",
    )
    assert code == 0, log
    assert [rank["RANK"] for rank in ranks] == ["0", "1"]
    for rank in ranks:
        assert rank["WORLD_SIZE"] == "2"
        assert rank["PARALLELISM_CONFIG_SP_SIZE"] == "2"
        assert rank["ACCELERATE_USE_CPU"] == "true"
        assert rank["argv"] == ["--lr", "1e-4"]


def test_exit_code_of_the_workers_is_ours(tmp_path: Path) -> None:
    code, ranks, log = _run(
        tmp_path, "--cpu", "--num_processes", "2", "SCRIPT", str(tmp_path), "--fail", "7"
    )
    assert (code, len(ranks)) == (7, 2), log
    code, ranks, log = _run(
        tmp_path, "--cpu", "--num_processes", "1", "SCRIPT", str(tmp_path), "--fail", "5"
    )
    assert code == 5, log


def test_deepspeed_on_cpu_ranks_beside_a_yaml(tmp_path: Path) -> None:
    file = str(CONFIGS / "deepspeed_zero2_sp2.yaml")
    code, ranks, log = _run(
        tmp_path, "--use_deepspeed", "--cpu", "--config_file", file, "SCRIPT", str(tmp_path)
    )
    assert (code, len(ranks)) == (0, 2), log
    for rank in ranks:
        assert rank["PARALLELISM_CONFIG_SP_SIZE"] == "2"
        assert rank["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert rank["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
        assert rank["DS_ACCELERATOR"] == "cpu"
        assert "ACCELERATE_USE_CPU" not in rank


def test_a_yaml_section_stays_beside_use_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(CONFIGS / "fsdp2_sp2.yaml")
    plan = plan_launch(["--use_deepspeed", "--zero_stage", "1", "--config_file", file, "train.py"])
    environment = _worker_environment(plan, monkeypatch)
    assert (plan.engine, environment["ACCELERATE_USE_DEEPSPEED"]) == ("deepspeed", "true")
    assert environment["PARALLELISM_CONFIG_SP_SIZE"] == "2"
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "1"
    assert f"{file}:" in str(_worker_config(plan, monkeypatch).source_of("sp_size"))


def test_use_parallelism_config_without_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_launch(
        ["--use_parallelism_config", "--parallelism_config_sp_size=4", "--cpu", "train.py"]
    )
    assert (plan.arguments.num_processes, plan.engine, plan.starter) == (4, "ddp", "torchrun")
    environment = _worker_environment(plan, monkeypatch)
    assert environment["PARALLELISM_CONFIG_SP_SIZE"] == "4"
    assert environment["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true"
    assert environment["PARALLELISM_CONFIG_SP_BACKEND"] == "ulysses"


def test_fsdp2_on_cpu_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_launch(
        [
            "--cpu",
            "--use_fsdp",
            "--num_processes",
            "4",
            "--parallelism-config-sp-size",
            "2",
            "train.py",
        ]
    )
    environment = _worker_environment(plan, monkeypatch)
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["FSDP_VERSION"] == "2"
    assert environment["ACCELERATE_USE_CPU"] == "true"
    assert "FSDP version 2" in plan.notices[0]
    config = _worker_config(plan, monkeypatch)
    assert (config.dp_shard_size, config.sp_size, config.total_size) == (2, 2, 4)
    assert str(config.source_of("dp_shard_size")).startswith("derived: 4 processes / 2")
    with pytest.raises(ConfigError, match="fsdp_version=1"):
        plan_launch(
            ["--use_fsdp", "--fsdp_version", "1", "--parallelism-config-sp-size", "2", "train.py"]
        )


def test_cpu_is_forced_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_accelerator_count", lambda: 2)
    flags = ["--parallelism-config-sp-size", "2"]
    assert "ACCELERATE_USE_CPU" not in plan_launch([*flags, "train.py"]).environment
    assert plan_launch(["train.py"]).arguments.num_processes == 2
    for argv in (["--cpu", *flags], ["--config_file", str(CONFIGS / "cpu_sp2.yaml")]):
        assert plan_launch([*argv, "train.py"]).environment["ACCELERATE_USE_CPU"] == "true"
    environment = plan_launch(["--cpu", "--use_deepspeed", *flags, "train.py"]).environment
    assert (environment["DS_ACCELERATOR"], environment["CUDA_VISIBLE_DEVICES"]) == ("cpu", "")
    assert "DS_ACCELERATOR" not in plan_launch(["--use_deepspeed", *flags, "train.py"]).environment


def test_the_boolean_flag_means_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [
        "--parallelism_config_sp_size",
        "2",
        "--parallelism_config_sp_seq_length_is_variable",
        "False",
    ]
    plan = plan_launch([*flags, "--parallelism_config_sp_seq_length", "64", "train.py"])
    handler = _worker_config(plan, monkeypatch).sp_handler
    assert (handler.sp_seq_length_is_variable, handler.sp_seq_length) == (False, 64)
    with pytest.raises(
        ConfigError, match="command line --parallelism-config-sp-seq-length-is-variable"
    ):
        plan_launch([*flags, "train.py"])
    with pytest.raises(ConfigError, match="Use 64 or 66 tokens"):
        plan_launch([*flags, "--parallelism_config_sp_seq_length", "65", "train.py"])


def test_precedence_and_provenance_reach_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "4")
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SEQ_LENGTH", "4096")
    file = str(CONFIGS / "ddp_sp2.yaml")
    plan = plan_launch(["--config_file", file, "--parallelism-config-sp-size", "8", "train.py"])
    config = _worker_config(plan, monkeypatch)
    assert (config.sp_size, config.sp_handler.sp_seq_length, plan.arguments.num_processes) == (
        8,
        4096,
        8,
    )
    assert str(config.source_of("sp_size")) == "command line --parallelism-config-sp-size"
    assert str(config.source_of("sp_seq_length")) == "env PARALLELISM_CONFIG_SP_SEQ_LENGTH"
    assert str(config.source_of("sp_attn_implementation")).startswith(f"{file}:")
    assert "not num_processes=2" in plan.notices[0]


def test_flags_of_settings_that_accelerate_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--parallelism-config-cp-size", "2", "--parallelism-config-cp-layout", "striped"]
    flags += [
        "--parallelism_config_cp_exchange",
        "all_gather",
        "--parallelism-config-cp-head-stride=2",
    ]
    flags += ["--parallelism-config-sp-head-chunks", "4"]
    config = _worker_config(plan_launch([*flags, "train.py"]), monkeypatch)
    ring = config.cp_handler
    assert (ring.layout, ring.exchange, ring.head_stride) == ("striped", "all_gather", 2)
    assert config.sp_handler.sp_head_chunks == 4
    assert str(config.source_of("cp_layout")) == "command line --parallelism-config-cp-layout"
    stock_flag = [
        "--parallelism_config_cp_size",
        "2",
        "--parallelism_config_cp_comm_strategy",
        "allgather",
    ]
    assert (
        _worker_config(plan_launch([*stock_flag, "train.py"]), monkeypatch).cp_handler.exchange
        == "all_gather"
    )
    with pytest.raises(
        ConfigError, match=r"cp_layout='spiral' .*command line --parallelism-config-cp-layout"
    ):
        plan_launch(["--parallelism-config-cp-layout", "spiral", "train.py"])
    for setting in FIELDS.values():
        with pytest.raises(
            ConfigError, match=rf"{setting.name}='\?!' \(from command line {setting.flag}\)"
        ):
            plan_launch([setting.flag, "?!", "train.py"])


def test_degrees_are_chosen_before_the_workers_start(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--parallelism-config-sp-size", "auto", "--parallelism-config-sp-auto-heads", "32/32"]
    plan = plan_launch([*flags, "--num_processes", "8", "train.py"])
    assert (plan.arguments.num_processes, plan.config.cp_size, plan.config.sp_size) == (8, 1, 8)
    assert plan.notices[0].startswith(
        "sp_size=8, cp_size=1: auto from command line --parallelism-config-sp-size"
    )
    config = _worker_config(plan, monkeypatch)
    assert config.sp_size == 8
    assert str(config.source_of("sp_size")).startswith(
        "auto from command line --parallelism-config-sp-size, 8 ranks"
    )
    machines = [
        "--num_processes",
        "16",
        "--num_machines",
        "2",
        "--machine_rank",
        "0",
        "--main_process_ip",
        "h",
    ]
    grouped = ["--parallelism-config-sp-size", "auto", "--parallelism-config-sp-auto-heads", "32/8"]
    plan = plan_launch([*grouped, *machines, "train.py"])
    assert (plan.config.cp_size, plan.config.sp_size) == (2, 8)
    plan = plan_launch(
        [*flags, "--num_processes", "8", "--parallelism-config-dp-shard-size", "2", "train.py"]
    )
    assert (plan.config.dp_shard_size, plan.config.sp_size) == (2, 4)
    monkeypatch.setattr(module, "_accelerator_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"needs the number of processes.*--num_processes"):
        plan_launch([*flags, "train.py"])
    with pytest.raises(ConfigError, match="needs the model's heads"):
        plan_launch(["--parallelism-config-sp-size", "auto", "--num_processes", "2", "train.py"])


def test_backend_names_of_both_worlds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("deepspeed", "ulysses"):
        plan = plan_launch(
            [
                "--parallelism-config-sp-size",
                "2",
                "--parallelism-config-sp-backend",
                name,
                "train.py",
            ]
        )
        assert _worker_config(plan, monkeypatch).sp_backend == "ulysses"


def test_a_script_without_our_config_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import ParallelismConfig as StockParallelismConfig

    plan = plan_launch(["--parallelism-config-sp-size", "2", "train.py"])
    with monkeypatch.context() as patch:
        for name, value in plan.environment.items():
            patch.setenv(name, value)
        with pytest.raises(ValueError, match="sp_backend"):
            StockParallelismConfig()
    assert (
        "ACCELERATE_USE_PARALLELISM_CONFIG"
        not in plan_launch(["--num_processes", "2", "train.py"]).environment
    )


def test_the_number_of_processes() -> None:
    ddp8 = ["--config_file", str(CONFIGS / "ddp_sp8.yaml")]
    assert plan_launch([*ddp8, "train.py"]).arguments.num_processes == 8
    plan = plan_launch([*ddp8, "--parallelism-config-sp-size", "2", "train.py"])
    assert (plan.arguments.num_processes, plan.config.dp_replicate_size) == (8, 4)
    plan = plan_launch([*ddp8, "--num_processes", "16", "train.py"])
    assert (plan.arguments.num_processes, plan.config.dp_replicate_size) == (16, 2)
    with pytest.raises(MeshError, match=r"is 4: .*sp_size=8 \(.*ddp_sp8.yaml:\d+"):
        plan_launch([*ddp8, "--num_processes", "4", "train.py"])
    with pytest.raises(ConfigError, match="at least 1"):
        plan_launch(["--num_processes", "0", "train.py"])


def test_a_file_that_contradicts_itself(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        "distributed_type: FSDP\nnum_processes: 8\nparallelism_config:\n  dp_shard_size: 2\n  "
        "sp_size: 2\n"
    )
    with pytest.raises(MeshError, match=r"= 4, but the number of processes is 8"):
        plan_launch(["--config_file", str(file), "train.py"])


def test_many_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    file = ["--config_file", str(CONFIGS / "multinode_fsdp2_sp8.yaml")]
    plan = plan_launch([*file, "--machine_rank", "1", "--main_process_ip", "10.0.0.1", "train.py"])
    environment = _worker_environment(plan, monkeypatch)
    arguments = plan.arguments
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 1)
    assert (arguments.master_addr, arguments.master_port) == ("10.0.0.1", "29500")
    assert environment["PARALLELISM_CONFIG_DP_SHARD_SIZE"] == "2"
    assert arguments.rdzv_backend == "static"
    flags = [
        "--cpu",
        "--num_machines",
        "2",
        "--parallelism-config-sp-size",
        "4",
        "--main_process_port",
        "29123",
    ]
    plan = plan_launch(
        [
            *flags,
            "--use_deepspeed",
            "--machine_rank",
            "1",
            "--main_process_ip",
            "h",
            "--rdzv_backend",
            "c10d",
            "train.py",
        ]
    )
    _worker_environment(plan, monkeypatch)
    assert (plan.arguments.rdzv_endpoint, plan.arguments.rdzv_backend) == ("h:29123", "c10d")
    assert (plan.arguments.nnodes, plan.arguments.nproc_per_node) == ("2", "2")
    with pytest.raises(ConfigError, match="main_process_ip"):
        plan_launch([*flags, "--machine_rank", "1", "train.py"])
    with pytest.raises(ConfigError, match="machine_rank=2 must be from 0 to 1"):
        plan_launch([*flags, "--machine_rank", "2", "--main_process_ip", "h", "train.py"])
    with pytest.raises(ConfigError, match="not divisible by num_machines=2"):
        plan_launch(["--num_machines", "2", "--num_processes", "3", "train.py"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--parallelism_config_sp_sizee", "2", "train.py"],
            "Did you mean '--parallelism-config-sp-size'",
        ),
        (["--num_processses", "2", "train.py"], "Did you mean '--num_processes'"),
        (
            ["--parallelism-config-sp-size", "two", "train.py"],
            "sp_size='two' .*command line --parallelism-config-sp-size",
        ),
        (["--use_deepspeed", "--use_fsdp", "train.py"], "contradict each other"),
        (["--tpu", "train.py"], "accelerate launch"),
        (["--config_file", "nowhere.yaml", "train.py"], "nowhere.yaml"),
    ],
)
def test_wrong_flags_start_nothing(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_launch(argv)


def test_files_that_accelerate_cannot_use(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    sagemaker = "compute_environment: AMAZON_SAGEMAKER\ndistributed_type: 'NO'\nec2_instance_type: x\niam_role_name: y\n"
    for text in (
        sagemaker,
        "parallelism_config:\n  sp_size: 2\n",
        "distributed_type: TELEPATHY\n",
        "distributed_type: XLA\n",
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"x\.yaml"):
            plan_launch(["--config_file", str(file), "train.py"])


def test_the_dispatcher(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert main([]) == 2
    assert main(["lauch"]) == 2
    assert "Did you mean 'launch'" in capsys.readouterr().err
    assert main(["launch", "--parallelism-config-sp-size", "0", "train.py"]) == 2
    assert "ulysses-accel launch: sp_size=0" in capsys.readouterr().err
    assert main(["launch"]) == 2
    capsys.readouterr()
    assert main(["launch", "--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("tp_size", "ep_size", "batch_schema", "sequence_parallelism_mode"):
        assert f"--parallelism_config_{name}" in shown
