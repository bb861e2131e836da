"""Makes accelerate's view of the processes true: process count, ranks, and the engine that was
asked for.

On CPU ranks stock accelerate comes up with one process under `torchrun` or DeepSpeed, and never
selects FSDP2. Only values of the accelerator's own state are set, at the attach point; no class is
changed.
"""

from __future__ import annotations

import atexit
import os
import time
from typing import Any

import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from ulysses_accel.errors import ConfigError
from ulysses_accel.integrations.frames import constructor_frame


def wants_fsdp() -> bool:
    """True when FSDP was asked for, by the launcher or by a plugin (accelerate notes both in the
    environment).
    """
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def wants_deepspeed() -> bool:
    """True when DeepSpeed was asked for, by the launcher or by a plugin."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def start_process_group(device_type: str) -> None:
    """Starts torch.distributed on CPU ranks that a launcher made and accelerate left alone."""
    if device_type != "cpu" or dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    dist.init_process_group("gloo")


_REST_SECONDS = 0.5


def close_gloo_at_exit() -> None:
    """Lets gloo's threads come to rest before the interpreter ends.

    A worker thread that lets go of its last collective's tensors needs the interpreter for it. When
    that is being torn down already, the finished process aborts: seen in about one run in six.
    Groups are ended only where all are gloo's, for which that is a local matter: a rank that failed
    waits for nobody.
    """
    atexit.unregister(_close_gloo)
    if dist.is_initialized():
        atexit.register(_close_gloo)


def _close_gloo() -> None:
    # The group's own name is `undefined` where nobody chose a backend.
    if dist.is_initialized() and "nccl" not in str(dist.get_backend_config(dist.group.WORLD)):
        dist.destroy_process_group()
    # Sleeping lets go of the interpreter; there is nothing to wait on for threads that are done but
    # for letting go.
    time.sleep(_REST_SECONDS)


def repair_state(accelerator: Any) -> None:
    """Sets process count, ranks and engine of CPU ranks in accelerate's state.

    Args:
        accelerator: the instance under construction.

    Raises:
        ConfigError: an engine was asked for whose plugin can't be found, or accelerate ignored the
            given config.
    """
    _refuse_ignored_config(accelerator)
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
    if wants_deepspeed():
        values["distributed_type"] = DistributedType.DEEPSPEED
        _require_deepspeed_plugin(state)
    elif wants_fsdp():
        values["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = _fsdp_plugin(accelerator)
    for shared in (partial, state):
        for name, value in values.items():
            setattr(shared, name, value)


def _refuse_ignored_config(accelerator: Any) -> None:
    """Refuses a second accelerator with other sizes: accelerate shares its state, and so the first
    one's config.
    """
    given, shared = (
        _constructor_argument(accelerator, "parallelism_config"),
        accelerator.state.parallelism_config,
    )
    axes = ("cp_size", "sp_size", "tp_size")
    mine, kept = (
        [f"{axis}={getattr(config, axis)}" for axis in axes] for config in (given or shared, shared)
    )
    if mine != kept:
        raise ConfigError(
            f"this Accelerator was given {', '.join(mine)}, but accelerate keeps the config of the "
            "first one in this "
            f"process: {', '.join(kept)}. Give both the same sizes, or call "
            f"accelerate.state.AcceleratorState._reset_state(True) before."
        )


def _require_deepspeed_plugin(state: Any) -> None:
    if getattr(state, "deepspeed_plugins", None) is None:
        raise ConfigError(
            "DeepSpeed was asked for (ACCELERATE_USE_DEEPSPEED=true) together with cpu=True or "
            "ACCELERATE_USE_CPU, "
            "with which accelerate drops it. Leave those out; on CPU ranks DS_ACCELERATOR=cpu is "
            "enough."
        )


def _fsdp_plugin(accelerator: Any) -> Any:
    """Returns the FSDP plugin that the accelerator was built with, which stock code discards on CPU
    ranks.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = _constructor_argument(accelerator, "fsdp_plugin") or FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ConfigError(
            f"fsdp_version={plugin.fsdp_version}: on CPU ranks only FSDP2 is used. Set "
            "fsdp_version to 2."
        )
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    return plugin


def _constructor_argument(accelerator: Any, name: str) -> Any:
    """Returns an argument of the running `Accelerator.__init__`; None when the attach point is
    called otherwise.

    Stock code keeps this plugin in no attribute on CPU ranks, so the frame that still has it is the
    only source.
    """
    frame = constructor_frame(accelerator)
    return None if frame is None else frame.f_locals.get(name)
