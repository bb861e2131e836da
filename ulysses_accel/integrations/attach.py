"""The attach point: what `ParallelismConfig` calls when a stock `accelerate.Accelerator` is built
with it, and the list of what it then does to models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from ulysses_accel.config.parallelism import ParallelismConfig
from ulysses_accel.distributed.mesh import build_mesh as build_axes
from ulysses_accel.errors import ConfigError
from ulysses_accel.expert_parallel.feature import ExpertParallel
from ulysses_accel.installation import AcceleratorFeature
from ulysses_accel.integrations.accelerate.memory_feature import Memory
from ulysses_accel.integrations.accelerate.process_state import (
    close_gloo_at_exit,
    repair_state,
    requests_fsdp,
    start_process_group,
)
from ulysses_accel.integrations.accelerate.sequence_feature import SequenceParallel
from ulysses_accel.integrations.accelerate.session import Session
from ulysses_accel.integrations.frames import calling_trainer
from ulysses_accel.integrations.trainer.trainer import adapt_trainer
from ulysses_accel.tensor_parallel.feature import TensorParallel

# A model passes through them from the first to the last, and then to the engine (DDP, FSDP2,
# DeepSpeed); what the engine returns comes back from the last to the first. The order is behaviour:
# - Memory first: expert parallelism refuses experts that tiled_mlp=True has rewritten.
# - Expert parallelism before sequence parallelism, whose loss of the routers counts all experts.
# - A TRL trainer inserts its own feature before tensor parallelism (`integrations.trl`): it takes
#   full batches, and gives shards of them to what comes after it.
# - Tensor parallelism before sequence parallelism, which counts the heads that a rank has.
FEATURES: tuple[type[AcceleratorFeature], ...] = (
    Memory,
    ExpertParallel,
    TensorParallel,
    SequenceParallel,
)


def attach(
    config: ParallelismConfig,
    accelerator: Any,
    features: Sequence[type[AcceleratorFeature]] = FEATURES,
) -> Session | None:
    """Attaches a config to the accelerator that was built with it;
    `ParallelismConfig._validate_accelerator`.

    Args:
        config: the accelerator's config, whose mesh is built.
        accelerator: the `accelerate.Accelerator` instance.
        features: what can be requested, in the order in which models pass through it.

    Returns:
        The session that runs the requested features, or None where none is.

    Raises:
        ConfigError: an engine or a setting that does not go with the sizes.
    """
    trainer = calling_trainer(accelerator)
    repair_state(config, accelerator, trainer)
    _refuse_missing(config, features)
    requested = [feature for feature in features if feature.is_requested(config)]
    if not requested:
        return None
    session = Session(config, accelerator, requested)
    if trainer is not None:
        adapt_trainer(trainer, session)
    return session


def _refuse_missing(
    config: ParallelismConfig, features: Sequence[type[AcceleratorFeature]]
) -> None:
    """Refuses a config that requests a technique which is not in the list."""
    known = {setting for feature in features for setting in feature.settings}
    for setting in ("sp_size", "cp_size", "tp_size", "ep_size"):
        size = getattr(config, setting)
        if size > 1 and setting not in known:
            raise ConfigError(
                f"{setting}={size} (from {config.source_of(setting)}), but nothing in the list "
                f"integrations.attach.FEATURES implements it. Use {setting}=1."
            )
    memory = config.memory_config
    if memory is not None and memory.is_active and "memory_config" not in known:
        raise ConfigError(
            f"memory_config={memory}, but nothing in the list integrations.attach.FEATURES "
            "implements it. Use memory_config=None."
        )


def build_mesh(config: ParallelismConfig, device_type: str) -> Any:
    """Builds the mesh of a config over all processes that were launched;
    `ParallelismConfig.build_device_mesh`.

    Args:
        config: sizes of the axes; a data parallel size that nobody set is derived from the number
            of processes.
        device_type: `cpu`, `cuda`, ...

    Returns:
        The device mesh, or None for one process.

    Raises:
        MeshError: the sizes do not fit the number of processes.
    """
    start_process_group(device_type)
    close_gloo_at_exit()
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    config.fit_world_size(world_size, axis="dp_shard" if requests_fsdp() else "dp_replicate")
    return build_axes(config.sizes, device_type) if world_size > 1 else None
