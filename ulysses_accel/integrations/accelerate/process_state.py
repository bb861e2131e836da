"""Makes accelerate's view of the processes true: process count, ranks, and the engine that was
requested.

On CPU ranks stock accelerate 1.15 comes up with one process under `torchrun` or DeepSpeed, and
never selects FSDP2. Only values of the accelerator's own state are set, at the attach point; no
class is changed. They are facts and stay after `close`.
"""

from __future__ import annotations

import atexit
import os
import time
from typing import Any

import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from ulysses_accel.config.parallelism import ParallelismConfig
from ulysses_accel.errors import ConfigError

_REST_SECONDS = 0.5
_AXES = ("cp_size", "sp_size", "tp_size")


def requests_fsdp() -> bool:
    """Returns whether the launcher or a plugin requests FSDP (accelerate notes both in the
    environment).
    """
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def requests_deepspeed() -> bool:
    """Returns whether the launcher or a plugin requests DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def start_process_group(device_type: str) -> None:
    """Starts torch.distributed on CPU ranks that a launcher started and accelerate left alone."""
    if device_type != "cpu" or dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    dist.init_process_group("gloo")


def close_gloo_at_exit() -> None:
    """Lets gloo's threads come to rest before the interpreter ends, where gloo is the only backend.

    A worker thread that frees its last collective's tensors needs the interpreter for it. While
    that is being torn down, the finished process aborts: seen in about one run in six. Ending the
    groups is a local matter for gloo: a rank that failed waits for nobody. Jobs that use NCCL exit
    as torch has them do.
    """
    atexit.unregister(_close_gloo)
    if dist.is_initialized() and _only_gloo(str(dist.get_backend_config(dist.group.WORLD))):
        atexit.register(_close_gloo)


def _only_gloo(backends: str) -> bool:
    """Returns whether gloo is the only backend of a group.

    Args:
        backends: by device, as torch writes them: "cpu:gloo,cuda:nccl".
    """
    return {part.rpartition(":")[2] for part in backends.split(",")} == {"gloo"}


def _close_gloo() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    # Sleeping releases the interpreter. There is nothing to wait on for threads that only have
    # their tensors left to free.
    time.sleep(_REST_SECONDS)


def repair_state(config: ParallelismConfig, accelerator: Any, trainer: Any = None) -> None:
    """Sets process count, ranks and engine of CPU ranks in accelerate's state.

    Args:
        config: that the state has.
        accelerator: the instance under construction.
        trainer: that constructs it, if one does.

    Raises:
        ConfigError: an engine was requested whose plugin is unknown, or accelerate ignores the
            config that the accelerator was built with.
    """
    _refuse_ignored_config(config)
    if not dist.is_initialized() or accelerator.device.type != "cpu" or dist.get_world_size() == 1:
        return
    partial, state = PartialState(), AcceleratorState()
    values: dict[str, Any] = {
        "num_processes": dist.get_world_size(),
        "process_index": dist.get_rank(),
        "local_process_index": int(os.environ.get("LOCAL_RANK", dist.get_rank())),
        "backend": partial.backend or "gloo",
        "distributed_type": DistributedType.MULTI_CPU,
    }
    if requests_deepspeed():
        values["distributed_type"] = DistributedType.DEEPSPEED
        _require_deepspeed_plugin(state)
    elif requests_fsdp():
        values["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = _fsdp_plugin(config, accelerator, trainer)
    for shared in (partial, state):
        for name, value in values.items():
            setattr(shared, name, value)


def _refuse_ignored_config(config: ParallelismConfig) -> None:
    """Refuses an accelerator that was built with another config than the first one of the process.

    accelerate 1.15 shares the state of all accelerators, and so the first one's config; it drops
    that of a later one without a word. So every config is remembered from its construction until an
    accelerator attaches it: one that is left over, when an earlier config attaches again, is the
    one that accelerate dropped.
    """
    dropped = config.attach_to_accelerator()
    if dropped is None:
        return
    theirs, ours = (
        ", ".join(f"{axis}={getattr(one, axis)}" for axis in _AXES) for one in (dropped, config)
    )
    raise ConfigError(
        f"this Accelerator was given {theirs}, but accelerate keeps the config of the first one in "
        f"this process: {ours}. Give both the same sizes, or call "
        "accelerate.state.AcceleratorState._reset_state(True) before. A ParallelismConfig that is "
        "for something else must be deleted before another Accelerator is built."
    )


def _require_deepspeed_plugin(state: Any) -> None:
    if getattr(state, "deepspeed_plugins", None) is None:
        raise ConfigError(
            "DeepSpeed is requested (ACCELERATE_USE_DEEPSPEED=true) together with cpu=True or "
            "ACCELERATE_USE_CPU, with which accelerate drops it. Leave those out; on CPU ranks "
            "DS_ACCELERATOR=cpu is enough."
        )


def use_fsdp_plugin(
    config: ParallelismConfig, plugin: FullyShardedDataParallelPlugin
) -> FullyShardedDataParallelPlugin:
    """Gives a config the FSDP plugin that its accelerator is built with, for CPU ranks:
    `Accelerator(parallelism_config=config, fsdp_plugin=use_fsdp_plugin(config, plugin))`.

    accelerate 1.15 keeps the plugin on accelerators only: on CPU ranks it is in no attribute of the
    accelerator, of its state or of the plugins' environment. A Trainer's `fsdp_config` and the
    launcher's settings are found without this.

    Args:
        config: the accelerator's config.
        plugin: with fsdp_version=2.

    Returns:
        The plugin.
    """
    config._fsdp_plugin = plugin
    return plugin


def _fsdp_plugin(config: ParallelismConfig, accelerator: Any, trainer: Any) -> Any:
    """Returns the FSDP plugin that the accelerator was built with, or an equal one."""
    arguments = None if trainer is None else trainer.args.fsdp_plugin_args
    if config._fsdp_plugin is not None:
        plugin = config._fsdp_plugin
    elif arguments is not None:
        # As transformers 5.23's Trainer builds it.
        plugin = FullyShardedDataParallelPlugin(**arguments)
    elif config._follows_launcher:
        # As accelerate 1.15 builds it where no plugin is passed.
        plugin = FullyShardedDataParallelPlugin()
    else:
        raise ConfigError(
            "fsdp_plugin was passed to Accelerator on CPU ranks, where accelerate keeps it "
            "nowhere. Pass it through ulysses_accel.use_fsdp_plugin: "
            "Accelerator(parallelism_config=config, fsdp_plugin=use_fsdp_plugin(config, plugin))."
        )
    if plugin.fsdp_version != 2:
        raise ConfigError(
            f"fsdp_version={plugin.fsdp_version}: on CPU ranks only FSDP2 is used. Set "
            "fsdp_version to 2."
        )
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    return plugin
