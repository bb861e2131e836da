"""`ulysses-accel launch [accelerate's flags] script ...`: starts the workers and does what the
flags say.

The flags are those of `accelerate launch`, and accelerate's own launchers start the workers. The
parallelism settings take another way than accelerate's: they are resolved and checked here, as are
those of memory, and travel to the workers as `PARALLELISM_CONFIG_*` and `MEMORY_CONFIG_*`, with
`ULYSSES_ACCEL_SOURCES` to say where each came from. Whenever processes share a batch,
`ACCELERATE_USE_PARALLELISM_CONFIG` is exported too: a script that forgets to pass our config then
builds accelerate's own, which refuses `sp_backend=ulysses`, so that the degree is never silently
ignored.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from accelerate.commands import launch as stock
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.utils import patch_environment

from ulysses_accel import _private_api
from ulysses_accel.cli.stock_file import readable_by_accelerate
from ulysses_accel.config.auto import Cluster, is_auto
from ulysses_accel.config.parallelism import ParallelismConfig
from ulysses_accel.config.settings import FIELDS, SECTIONS
from ulysses_accel.config.sources import (
    STOCK_GATE_VARIABLE,
    command_line_layer,
    environment_layer,
    export_environment,
    resolve,
    yaml_layer,
)
from ulysses_accel.errors import ConfigError, closest

Engine = Literal["ddp", "fsdp", "deepspeed"]
_FLAG_PREFIXES = tuple(f"{section}_" for section in SECTIONS)
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_OTHER_LAUNCHERS = "Use `accelerate launch`, which starts TPU, SageMaker and Megatron-LM jobs."


@dataclass
class LaunchPlan:
    """Everything that `start` needs, and nothing started yet.

    Args:
        arguments: accelerate's launch arguments, merged with the YAML file.
        config: the resolved settings, fitted to the number of processes.
        environment: the variables that the workers get on top of this process's.
        engine: what averages the gradients.
        starter: which of accelerate's launchers starts the workers.
        notices: what the user should know, one sentence each.
    """

    arguments: argparse.Namespace
    config: ParallelismConfig
    environment: dict[str, str]
    engine: Engine
    starter: Literal["simple", "torchrun", "deepspeed"]
    notices: list[str] = field(default_factory=list)


def launch(argv: list[str]) -> int:
    """Starts the workers and waits for them.

    Args:
        argv: accelerate's launch flags, the script, and the script's arguments.

    Returns:
        The exit code of the first worker that failed, 128 + the signal's number where one was
        killed, else 0.

    Raises:
        ConfigError: the settings are not legal or contradict each other; nothing was started.
    """
    plan = plan_launch(argv)
    for notice in plan.notices:
        print(f"ulysses-accel launch: {notice}", file=sys.stderr)
    return start(plan)


def plan_launch(argv: list[str]) -> LaunchPlan:
    """Resolves flags, environment and YAML file, and checks them against the number of processes.

    Args:
        argv: as for `launch`.

    Returns:
        The plan.

    Raises:
        ConfigError: as for `launch`.
    """
    arguments, flags = parse_arguments(argv)
    notices: list[str] = []
    if arguments.config_file is None and Path(default_config_file).is_file():
        arguments.config_file = default_config_file
    file_layer = yaml_layer(arguments.config_file) if arguments.config_file else {}
    layers = (file_layer, environment_layer(), command_line_layer(flags))
    # Errors in our own section are told before those that accelerate finds in the file.
    wishes = resolve(*layers)
    file = _load_stock_file(arguments.config_file)
    config = ParallelismConfig.from_layers(*layers, cluster=_cluster(arguments, file))
    if is_auto(wishes):
        notices.append(
            f"sp_size={config.sp_size}, cp_size={config.cp_size}: {config.source_of('sp_size')}"
        )
    engine = _choose_engine(arguments, file)
    _settle_processes(arguments, config, file, engine, notices)
    cpu_file = file is not None and (file.use_cpu or file.distributed_type == "MULTI_CPU")
    on_cpu = bool(arguments.cpu or cpu_file or _accelerator_count() == 0)
    _settle_fsdp_version(arguments, config, file, engine, notices)
    wants_config = bool(arguments.use_parallelism_config)
    _take_shadowed_values(arguments, file)
    merged = _merge_stock_arguments(arguments, engine, on_cpu)
    _settle_machines(merged)
    environment = _worker_environment(config, engine, on_cpu, wants_config)
    if on_cpu and merged.num_cpu_threads_per_process:
        # accelerate's DeepSpeed launcher leaves this out, and torch would give each worker a single
        # thread.
        environment["OMP_NUM_THREADS"] = str(merged.num_cpu_threads_per_process)
    if engine == "deepspeed":
        return LaunchPlan(merged, config, environment, engine, "deepspeed", notices)
    single = merged.num_processes == 1 and engine == "ddp"
    return LaunchPlan(
        merged, config, environment, engine, "simple" if single else "torchrun", notices
    )


def start(plan: LaunchPlan) -> int:
    """Starts the planned workers and waits for them.

    Args:
        plan: what `plan_launch` returned.

    Returns:
        The exit code, as for `launch`.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    starters = {
        "simple": stock.simple_launcher,
        "torchrun": stock.multi_gpu_launcher,
        "deepspeed": stock.deepspeed_launcher,
    }
    try:
        with patch_environment(**plan.environment):
            starters[plan.starter](plan.arguments)
    except ChildFailedError as failure:
        print(failure, file=sys.stderr)
        return _exit_code(failure.get_first_failure()[1].exitcode)
    except subprocess.CalledProcessError as failure:
        return _exit_code(failure.returncode)
    except SignalException as interrupted:
        return 128 + int(interrupted.sigval)
    return 0


def _exit_code(code: int) -> int:
    # A worker killed by a signal has a negative code; shells write it as 128 + the signal's number.
    return code if code > 0 else 128 - code if code < 0 else int(signal.SIGTERM)


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Parses the command line with accelerate's parser.

    Args:
        argv: as for `launch`.

    Returns:
        The arguments, and the text of our own flags that were written, by field name.

    Raises:
        ConfigError: a flag before the script is unknown.
    """
    parser = stock.launch_command_parser()
    parser.prog = "ulysses-accel launch"
    # accelerate's formatter hides groups of flags by what the program's own arguments say, and all
    # of ours.
    parser.formatter_class = argparse.HelpFormatter
    _add_our_flags(parser)
    options: set[str] = set()
    for action in _private_api.parser_options(parser):
        options.update(option for option in action.option_strings if option.startswith("--"))
        if action.dest.startswith(_FLAG_PREFIXES):
            # Our own code checks these: accelerate reads `False` as True and refuses the backends'
            # other names.
            action.type, action.choices = str, None
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].partition("=")[0]
        raise ConfigError(
            f"unknown flag {name[:100]!r} before the script.{_closest_flag(name[:100], options)}"
        )
    written: set[str] = getattr(arguments, "nondefault", set())
    flags = {
        name: getattr(arguments, field.key)
        for name, field in FIELDS.items()
        if field.key in written
    }
    return arguments, flags


def _add_our_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every setting that accelerate does not know."""
    known = {action.dest for action in _private_api.parser_options(parser)}
    group = parser.add_argument_group("ulysses-accel Arguments", "Settings that accelerate lacks.")
    for setting in FIELDS.values():
        if setting.key not in known:
            group.add_argument(
                f"--{setting.key}", default=None, help=f"Defaults to {setting.default}."
            )


def _cluster(arguments: argparse.Namespace, file: Any) -> Cluster:
    """Returns the ranks of the job as far as flags, file and devices tell, for degrees that are
    `auto`.
    """
    in_file = getattr(file, "num_processes", -1)
    processes = (
        arguments.num_processes or (in_file if in_file > 0 else 0) or _accelerator_count() or None
    )
    machines = arguments.num_machines or getattr(file, "num_machines", 1) or 1
    return Cluster(processes, None if processes is None else max(1, processes // machines))


def _closest_flag(name: str, options: set[str]) -> str:
    # The list of all flags would be longer than a screen: only the likely ones are named.
    if "parallelism" in name or "memory" in name:
        return closest(name, [field.flag for field in FIELDS.values()])
    suggestion = closest(name, options)
    return (
        suggestion
        if "Did you mean" in suggestion
        else " `ulysses-accel launch --help` lists the flags."
    )


def _load_stock_file(path: str | None) -> Any:
    if path is None:
        return None
    try:
        with readable_by_accelerate(path) as readable:
            return load_config_from_file(readable)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: accelerate can't use this configuration file: {error}. Correct the file."
        ) from error


def _choose_engine(arguments: argparse.Namespace, file: Any) -> Engine:
    flags = {"use_deepspeed": "deepspeed", "use_fsdp": "fsdp", "multi_gpu": "ddp"}
    chosen = [flag for flag in flags if getattr(arguments, flag)]
    if len(chosen) > 1:
        raise ConfigError(
            f"{' and '.join('--' + flag for flag in chosen)} contradict each other. Keep one of "
            "them."
        )
    if arguments.tpu or arguments.use_megatron_lm:
        raise ConfigError(
            "--tpu and --use_megatron_lm can't be started by `ulysses-accel launch`. "
            f"{_OTHER_LAUNCHERS}"
        )
    name = flags[chosen[0]] if chosen else _engine_of_file(arguments.config_file, file)
    return "deepspeed" if name == "deepspeed" else "fsdp" if name == "fsdp" else "ddp"


def _engine_of_file(path: str | None, file: Any) -> str:
    kind = (
        "NO"
        if file is None
        else str(getattr(file.distributed_type, "value", file.distributed_type))
    )
    if "AMAZON" in str(getattr(file, "compute_environment", "")):
        kind = "SageMaker"
    if kind != "NO" and kind not in ("DEEPSPEED", "FSDP") and not kind.startswith("MULTI_"):
        raise ConfigError(
            f"distributed_type={kind} ({path}) can't be started by `ulysses-accel launch`. "
            f"{_OTHER_LAUNCHERS}"
        )
    return {"DEEPSPEED": "deepspeed", "FSDP": "fsdp"}.get(kind, "ddp")


def _settle_processes(
    arguments: argparse.Namespace,
    config: ParallelismConfig,
    file: Any,
    engine: Engine,
    notices: list[str],
) -> None:
    """Decides the number of processes: the flag, else the file's where the sizes fit it, else the
    sizes' product.
    """
    axis: Literal["dp_replicate", "dp_shard"] = "dp_shard" if engine == "fsdp" else "dp_replicate"
    if arguments.num_processes is None:
        in_file = getattr(file, "num_processes", -1)
        arguments.num_processes = _default_processes(config, in_file)
        if in_file not in (-1, arguments.num_processes):
            notices.append(
                f"starts {arguments.num_processes} processes, the product of the sizes, not "
                f"num_processes={in_file} of "
                f"{arguments.config_file}. Pass --num_processes to decide."
            )
    if arguments.num_processes < 1:
        raise ConfigError(
            f"--num_processes={arguments.num_processes} must be at least 1. Use the number of "
            "workers."
        )
    config.fit_world_size(arguments.num_processes, axis=axis)


def _default_processes(config: ParallelismConfig, in_file: int) -> int:
    sources = {name: config.source_of(f"{name}_size").kind for name in config.sizes}
    stronger_than_file = any(kind in ("env", "command line") for kind in sources.values())
    derivable = (
        config.data_parallel_size == 1
        and sources["dp_shard"] == sources["dp_replicate"] == "default"
    )
    fits = config.total_size == in_file or (
        derivable and in_file % config.non_data_parallel_size == 0
    )
    if in_file != -1 and (fits or not stronger_than_file):
        return in_file
    if in_file == -1 and set(sources.values()) == {"default"}:
        return max(1, _accelerator_count())
    return config.total_size


def _settle_fsdp_version(
    arguments: argparse.Namespace,
    config: ParallelismConfig,
    file: Any,
    engine: Engine,
    notices: list[str],
) -> None:
    if engine != "fsdp" or config.non_data_parallel_size == 1:
        return
    written = "fsdp_version" in getattr(arguments, "nondefault", set())
    in_file = (getattr(file, "fsdp_config", None) or {}).get("fsdp_version")
    version = str(arguments.fsdp_version if written or in_file is None else in_file)
    if version == "2":
        return
    if written or in_file is not None:
        source = "command line --fsdp_version" if written else f"{arguments.config_file}"
        raise ConfigError(
            f"fsdp_version={version} (from {source}) can't shard over a sequence group. Use "
            "--fsdp_version 2."
        )
    arguments.fsdp_version = "2"
    arguments.nondefault.add("fsdp_version")
    notices.append(
        "uses FSDP version 2, which sequence parallelism needs. Pass --fsdp_version 2 to say so "
        "yourself."
    )


def _accelerator_count() -> int:
    import torch

    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    return (
        0 if accelerator is None or accelerator.type == "mps" else torch.accelerator.device_count()
    )


def _take_shadowed_values(arguments: argparse.Namespace, file: Any) -> None:
    # accelerate's parser gives these a default, behind which its merging never sees the file's
    # value.
    for name in ("rdzv_backend", "same_network"):
        value = getattr(file, name, None)
        if value is not None and name not in getattr(arguments, "nondefault", set()):
            setattr(arguments, name, value)


def _merge_stock_arguments(
    arguments: argparse.Namespace, engine: Engine, on_cpu: bool
) -> argparse.Namespace:
    """Lets accelerate merge the file into the arguments, without the parallelism flags that it
    would drop or refuse.
    """
    arguments.use_deepspeed, arguments.use_fsdp = engine == "deepspeed", engine == "fsdp"
    arguments.multi_gpu = engine == "ddp" and arguments.num_processes > 1
    # accelerate excludes --cpu beside an engine; the workers learn of the CPU from the environment.
    arguments.cpu, arguments.use_parallelism_config = False, False
    arguments.use_cpu = on_cpu or None
    if arguments.config_file is None:
        arguments.num_machines = arguments.num_machines or 1
        arguments.mixed_precision = arguments.mixed_precision or "no"
        arguments.dynamo_backend = arguments.dynamo_backend or "no"
        arguments.use_cpu = on_cpu
    if (
        on_cpu
        and arguments.num_cpu_threads_per_process is None
        and not os.environ.get("OMP_NUM_THREADS")
    ):
        local = max(1, arguments.num_processes // (arguments.num_machines or 1))
        arguments.num_cpu_threads_per_process = max(1, (os.cpu_count() or 1) // local)
    merged: argparse.Namespace
    path = arguments.config_file
    try:
        with readable_by_accelerate(path) as arguments.config_file:
            merged, file, precision_from_file = _private_api.merged_launch_arguments(arguments)
    except ValueError as error:
        raise ConfigError(f"accelerate refuses these flags: {error}") from error
    merged.config_file = path
    fields = (
        list(file.deepspeed_config)
        if file is not None and hasattr(file, "deepspeed_config")
        else []
    )
    merged.deepspeed_fields_from_accelerate_config = ",".join(
        [*fields, *(["mixed_precision"] if precision_from_file else [])]
    )
    # The file's section sets this again; our own variables carry the settings instead.
    merged.use_parallelism_config = False
    return merged


def _settle_machines(arguments: argparse.Namespace) -> None:
    machines = arguments.num_machines
    if machines <= 1:
        # Two jobs on one machine must not meet on accelerate's fixed port.
        arguments.main_process_port = arguments.main_process_port or 0
        return
    if arguments.num_processes % machines:
        raise ConfigError(
            f"num_processes={arguments.num_processes} is not divisible by num_machines={machines}. "
            "Pass the number of "
            "processes of all machines together as --num_processes."
        )
    if not arguments.main_process_ip:
        raise ConfigError(
            f"num_machines={machines} needs the address of the machine of rank 0. Pass "
            "--main_process_ip."
        )
    if arguments.machine_rank is None or not 0 <= int(arguments.machine_rank) < machines:
        raise ConfigError(
            f"machine_rank={arguments.machine_rank} must be from 0 to {machines - 1}. Pass "
            "--machine_rank, a different "
            "one on each machine."
        )
    if arguments.deepspeed_multinode_launcher is None and arguments.deepspeed_hostfile is None:
        # accelerate would start `deepspeed` with pdsh, which needs a hostfile; this command runs on
        # every machine.
        arguments.deepspeed_multinode_launcher = "standard"


def _worker_environment(
    config: ParallelismConfig, engine: Engine, on_cpu: bool, wants_config: bool
) -> dict[str, str]:
    always = [f"{axis}_backend" for axis in ("sp", "cp") if config.sizes[axis] > 1]
    environment = export_environment(config.settings, always)
    if wants_config or config.non_data_parallel_size > 1:
        environment[STOCK_GATE_VARIABLE] = "true"
    memory = config.memory_config
    if (
        memory is not None
        and memory.expandable_segments
        and not any(map(os.environ.get, _ALLOCATOR_VARIABLES))
    ):
        # The allocator reads this once, before any of our code runs in the worker.
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if on_cpu and engine == "deepspeed":
        # accelerate drops DeepSpeed where it is told to use the CPU: DeepSpeed itself has to choose
        # it.
        environment["DS_ACCELERATOR"] = "cpu"
        if _accelerator_count() > 0:
            environment["CUDA_VISIBLE_DEVICES"] = ""
    elif on_cpu:
        environment["ACCELERATE_USE_CPU"] = "true"
    return environment
