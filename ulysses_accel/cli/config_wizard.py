"""`ulysses-accel config`: asks for the settings of a job, those of `accelerate config` and ours,
and writes accelerate's YAML file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ulysses_accel.config.memory import ALST
from ulysses_accel.config.parallelism import ParallelismConfig
from ulysses_accel.config.settings import ATTENTION_CORES, FIELDS, PARALLELISM, Setting, Source
from ulysses_accel.config.yaml_file import parse_yaml_layer
from ulysses_accel.errors import ConfigError

T = TypeVar("T")
_ANSWER = Source("command line", "your answer")
_ENGINES = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3", "zero3-offload")
_PRECISIONS = ("no", "bf16", "fp16")
_MEMORY: dict[str, dict[str, bool]] = {"none": {}, "alst": ALST}


@dataclass(frozen=True)
class Answers:
    """What the user chose.

    Args:
        processes: the number of processes of all machines together.
        engine: one of `ddp`, `fsdp2`, `zero0` to `zero3`, `zero3-offload`.
        precision: `no`, `bf16` or `fp16`.
        settings: the settings of parallelism and memory.
    """

    processes: int
    engine: str
    precision: str
    settings: dict[str, Setting]


def configure(argv: list[str]) -> int:
    """Asks the questions and writes the file.

    Args:
        argv: `--output PATH`, or nothing for accelerate's default location.

    Returns:
        0 after writing; 1 where the input ended, or the user kept an existing file: then nothing is
        written.
    """
    parser = argparse.ArgumentParser(prog="ulysses-accel config", description=__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=None,
        help="the file to write (accelerate's default location)",
    )
    path = parser.parse_args(argv).output or _default_path()
    try:
        if path.exists() and not ask(f"{path} exists. Overwrite it?", "no", _yes_or_no):
            print("Kept the file; nothing is written. Choose another path with --output.")
            return 1
        answers = ask_all()
    except (EOFError, KeyboardInterrupt):
        print("\nThe answers ended early; nothing is written.", file=sys.stderr)
        return 1
    write(path, answers)
    location = "" if path == _default_path() else f" --config_file {path}"
    print(f"Wrote {path}. Start a job with:\n  ulysses-accel launch{location} train.py")
    return 0


def ask(question: str, default: str, parse: Callable[[str], T]) -> T:
    """Asks until the answer is legal.

    Args:
        question: the words to show.
        default: the answer of an empty line.
        parse: turns the answer into the value, or raises `ConfigError`.

    Returns:
        The value.

    Raises:
        EOFError: the input ended.
    """
    while True:
        answer = input(f"{question} [{default}] ").strip() or default
        try:
            return parse(answer)
        except ConfigError as error:
            print(f"  {error}")


def ask_all() -> Answers:
    """Asks every question.

    Returns:
        The answers, which together make a legal config.

    Raises:
        EOFError: the input ended.
    """
    processes = ask("How many processes, all machines together?", "2", _size)
    settings = {
        "sp_size": ask(
            "How many processes share one sequence?", str(processes), _degree_of(processes)
        )
    }
    degree = int(settings["sp_size"].value or 1)
    settings |= _ask_for_ring(degree)
    engine = ask(
        f"What averages the gradients ({', '.join(_ENGINES)})?",
        "fsdp2",
        _one_of("engine", _ENGINES),
    )
    attention = FIELDS["sp_attn_implementation"]
    cores = ", ".join(ATTENTION_CORES)
    settings[attention.name] = ask(
        f"Which attention ({cores})?", "sdpa", lambda text: attention.check(text, _ANSWER)
    )
    length = ask("Tokens of the full sequence, or 'variable'?", "variable", _length_of(settings))
    settings["sp_seq_length_is_variable"] = Setting(length.value is None, _ANSWER)
    if length.value is not None:
        settings["sp_seq_length"] = length
    precision = ask(
        f"Mixed precision ({', '.join(_PRECISIONS)})?",
        "bf16",
        _one_of("mixed_precision", _PRECISIONS),
    )
    memory = ask(
        f"What saves memory ({', '.join(_MEMORY)})?", "none", _one_of("memory", tuple(_MEMORY))
    )
    settings |= {name: Setting(value, _ANSWER) for name, value in _MEMORY[memory].items()}
    if engine == "fsdp2" and processes > degree:
        settings["dp_shard_size"] = Setting(processes // degree, _ANSWER)
    elif processes > degree:
        settings["dp_replicate_size"] = Setting(processes // degree, _ANSWER)
    ParallelismConfig.from_layers(settings).fit_world_size(processes)
    return Answers(processes, engine, precision, settings)


def _ask_for_ring(degree: int) -> dict[str, Setting]:
    """Asks for the ring attention degree; the rest of the degree is Ulysses'."""
    if degree == 1:
        return {}
    question = "How many of them in a ring (for more processes than heads, or several nodes)?"
    ring = ask(question, "1", _ring_of(degree))
    if ring == 1:
        return {}
    layout = FIELDS["cp_layout"]
    kinds = "zigzag for causal attention, contiguous, striped"
    layout_setting = ask(
        f"How are tokens distributed over the ring ({kinds})?",
        "zigzag",
        lambda text: layout.check(text, _ANSWER),
    )
    return {
        "sp_size": Setting(degree // ring, _ANSWER),
        "cp_size": Setting(ring, _ANSWER),
        "cp_layout": layout_setting,
    }


def write(path: Path, answers: Answers) -> None:
    """Writes the file, after checking that its text reads back.

    Args:
        path: the file; its folder is created.
        answers: what `ask_all` returned.

    Raises:
        ConfigError: the file can't be written.
    """
    text = "# Written by `ulysses-accel config`.\n"
    text += f"# ulysses-accel launch --config_file {path.name} train.py\n"
    text += yaml.safe_dump(stock_file(answers), sort_keys=False)
    parse_yaml_layer(text, str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: can't write the file: {error}. Choose another path with --output."
        ) from error


def stock_file(answers: Answers) -> dict[str, Any]:
    """Builds the content of accelerate's config file.

    Args:
        answers: what `ask_all` returned.

    Returns:
        The keys and values that accelerate's loader accepts.
    """
    content: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": _distributed_type(answers.engine),
        "mixed_precision": answers.precision,
        "num_machines": 1,
        "num_processes": answers.processes,
        "use_cpu": False,
    }
    if answers.engine == "fsdp2":
        content["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": True,
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            "fsdp_cpu_ram_efficient_loading": False,
        }
    elif answers.engine != "ddp":
        device = "cpu" if answers.engine.endswith("offload") else "none"
        content["deepspeed_config"] = {
            "zero_stage": int(answers.engine[len("zero")]),
            "offload_optimizer_device": device,
            "offload_param_device": device,
            "zero3_init_flag": False,
            "deepspeed_multinode_launcher": "standard",
        }
    # accelerate 1.15 copies these into its arguments unchanged, so the names need the prefix; it
    # refuses other sections.
    section = {FIELDS[name].key: setting.value for name, setting in answers.settings.items()}
    backends = ["sp_backend", *(["cp_backend"] if "cp_size" in answers.settings else [])]
    content[PARALLELISM] = {
        **section,
        **{FIELDS[name].key: FIELDS[name].default for name in backends},
    }
    return content


def _distributed_type(engine: str) -> str:
    return {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(engine, "DEEPSPEED")


def _default_path() -> Path:
    from accelerate.commands.config.config_args import default_yaml_config_file

    return Path(default_yaml_config_file)


def _size(answer: str) -> int:
    return int(FIELDS["dp_replicate_size"].check(answer, _ANSWER).value or 1)


def _degree_of(processes: int) -> Callable[[str], Setting]:
    def parse(answer: str) -> Setting:
        setting = FIELDS["sp_size"].check(answer, _ANSWER)
        ParallelismConfig.from_layers({"sp_size": setting}).fit_world_size(processes)
        return setting

    return parse


def _ring_of(degree: int) -> Callable[[str], int]:
    def parse(answer: str) -> int:
        ring = FIELDS["cp_size"].check(answer, _ANSWER).value
        if not isinstance(ring, int) or degree % ring:
            raise ConfigError(
                f"cp_size={answer[:40]} (from your answer) does not divide {degree}. Use a divisor."
            )
        return ring

    return parse


def _length_of(settings: dict[str, Setting]) -> Callable[[str], Setting]:
    def parse(answer: str) -> Setting:
        text = "None" if answer.lower() in ("variable", "none") else answer
        setting = FIELDS["sp_seq_length"].check(text, _ANSWER)
        if setting.value is not None:
            fixed = Setting(False, _ANSWER)
            ParallelismConfig.from_layers(
                {**settings, "sp_seq_length": setting, "sp_seq_length_is_variable": fixed}
            )
        return setting

    return parse


def _one_of(name: str, legal: tuple[str, ...]) -> Callable[[str], str]:
    def parse(answer: str) -> str:
        if answer.lower() not in legal:
            raise ConfigError(
                f"{name}={answer[:40]!r} (from your answer) must be one of {', '.join(legal)}."
            )
        return answer.lower()

    return parse


def _yes_or_no(answer: str) -> bool:
    if answer.lower() not in ("y", "yes", "n", "no"):
        raise ConfigError(f"{answer[:40]!r} is neither yes nor no. Answer yes or no.")
    return answer.lower().startswith("y")
