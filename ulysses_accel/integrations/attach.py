"""The attach point: what `ParallelismConfig` calls when a stock `accelerate.Accelerator` is built
with it.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from ulysses_accel.config.parallelism import ParallelismConfig
from ulysses_accel.distributed.mesh import build_mesh as build_axes
from ulysses_accel.distributed.mesh import sequence_groups
from ulysses_accel.expert_parallel.feature import ExpertAttachment
from ulysses_accel.integrations.accelerate.memory_feature import MemoryAttachment
from ulysses_accel.integrations.accelerate.process_state import (
    close_gloo_at_exit,
    repair_state,
    start_process_group,
    wants_fsdp,
)
from ulysses_accel.integrations.accelerate.session import Attachment
from ulysses_accel.integrations.trainer.trainer import attach_calling_trainer
from ulysses_accel.tensor_parallel.parallelize import check_engine


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
    config.fit_world_size(world_size, axis="dp_shard" if wants_fsdp() else "dp_replicate")
    return build_axes(config.sizes, device_type) if world_size > 1 else None


def attach(config: ParallelismConfig, accelerator: Any) -> Attachment | None:
    """Attaches a config to the accelerator that was built with it;
    `ParallelismConfig._validate_accelerator`.

    Args:
        config: the accelerator's config, whose mesh is built.
        accelerator: the `accelerate.Accelerator` instance.

    Returns:
        The attachment, or None where no sequence is shared between ranks.

    Raises:
        ConfigError: an engine or a setting that does not go with the sizes.
    """
    repair_state(accelerator)
    if config.tp_size > 1:
        check_engine(config, accelerator)
    is_shared = config.sequence_parallel_size * config.tp_size > 1
    attachment = (
        Attachment(config, accelerator, sequence_groups(config.get_device_mesh()))
        if is_shared
        else None
    )
    if attachment is not None:
        attach_calling_trainer(attachment)
    if config.ep_size > 1:
        ExpertAttachment(config, accelerator)
    if config.memory_config is not None and config.memory_config.is_active:
        MemoryAttachment(config.memory_config, accelerator)
    return attachment
