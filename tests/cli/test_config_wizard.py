"""`ulysses-accel config` asks, checks, and writes a file that both launchers read."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from ulysses_accel.cli import config_wizard, main
from ulysses_accel.cli.launch import plan_launch
from ulysses_accel.config.memory import MemoryConfig
from ulysses_accel.config.parallelism import ParallelismConfig


def _answer(monkeypatch: pytest.MonkeyPatch, *answers: str) -> list[str]:
    asked: list[str] = []
    lines: Iterator[str] = iter(answers)

    def reply(question: str = "") -> str:
        asked.append(question)
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", reply)
    return asked


def test_defaults_give_a_file_that_launches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "deep" / "x.yaml"
    asked = _answer(monkeypatch, *[""] * 8)
    assert main(["config", "--output", str(file)]) == 0
    assert len(asked) == 8
    assert f"ulysses-accel launch --config_file {file} train.py" in capsys.readouterr().out
    plan = plan_launch(["--config_file", str(file), "train.py"])
    assert (plan.engine, plan.arguments.num_processes, plan.config.sp_size) == ("fsdp", 2, 2)
    assert plan.config.sp_handler.sp_attn_implementation == "sdpa"
    assert plan.config.memory_config is None
    assert plan.arguments.mixed_precision == "bf16"


@pytest.mark.parametrize(
    ("engine", "kind", "axis"),
    [
        ("ddp", "MULTI_GPU", "dp_replicate"),
        ("fsdp2", "FSDP", "dp_shard"),
        ("zero3-offload", "DEEPSPEED", "dp_replicate"),
    ],
)
def test_every_answer_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, kind: str, axis: str
) -> None:
    file = tmp_path / "x.yaml"
    _answer(monkeypatch, "8", "4", "1", engine, "eager", "4096", "fp16", "alst")
    assert main(["config", "--output", str(file)]) == 0
    stock = load_config_from_file(str(file))
    assert (stock.distributed_type, stock.num_processes, stock.mixed_precision) == (kind, 8, "fp16")
    config = ParallelismConfig.from_yaml(file)
    config.fit_world_size(8)
    assert (config.sp_size, config.sizes[axis]) == (4, 2)
    handler = config.sp_handler
    assert (handler.sp_seq_length, handler.sp_seq_length_is_variable) == (4096, False)
    assert handler.sp_attn_implementation == "eager"
    assert config.memory_config == MemoryConfig.alst()
    assert (
        plan_launch(["--config_file", str(file), "train.py"]).config.memory_config
        == config.memory_config
    )
    if kind == "DEEPSPEED":
        assert stock.deepspeed_config["offload_optimizer_device"] == "cpu"
        assert stock.deepspeed_config["zero_stage"] == 3


def test_a_ring_takes_its_part_of_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.yaml"
    _answer(monkeypatch, "8", "4", "2", "striped", "ddp", "sdpa", "4096", "bf16", "none")
    assert main(["config", "--output", str(file)]) == 0
    plan = plan_launch(["--config_file", str(file), "train.py"])
    config = plan.config
    assert (config.cp_size, config.sp_size, config.dp_replicate_size) == (2, 2, 2)
    assert (config.cp_handler.layout, config.cp_backend, plan.arguments.num_processes) == (
        "striped",
        "ring",
        8,
    )


def test_wrong_answers_are_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.yaml"
    answers = [
        "none",
        "8",
        "3",
        "4",
        "3",
        "two",
        "1",
        "zero9",
        "zero2",
        "magic",
        "sdpa",
        "4097",
        "variable",
        "int8",
        "no",
        "some",
        "none",
    ]
    asked = _answer(monkeypatch, *answers)
    assert main(["config", "--output", str(file)]) == 0
    assert len(asked) == len(answers)
    shown = capsys.readouterr().out
    for part in (
        "must be a whole number",
        "the number of processes is 8",
        "cp_size=3 (from your answer) does not divide 4",
        "engine='zero9'",
        "'magic'",
        "Use 4096 or 4100",
        "memory='some' (from your answer) must be one of none, alst",
    ):
        assert part in shown
    assert ParallelismConfig.from_yaml(file).sp_size == 4


def test_the_end_of_the_input_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _answer(monkeypatch, "4", "2")
    assert main(["config", "--output", str(tmp_path / "x.yaml")]) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept_unless_confirmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.yaml"
    for answers, code in (([""], 1), (["what", "n"], 1), ([], 1), (["y", *[""] * 8], 0)):
        file.write_text("precious")
        _answer(monkeypatch, *answers)
        assert main(["config", "--output", str(file)]) == code
        assert (file.read_text() == "precious") is (code == 1)


def test_the_default_place_is_accelerates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "default_config.yaml"
    monkeypatch.setattr(
        "accelerate.commands.config.config_args.default_yaml_config_file", str(file)
    )
    _answer(monkeypatch, *[""] * 8)
    assert config_wizard.configure([]) == 0
    assert ParallelismConfig.from_yaml(file).sp_size == 2
