"""A `MemoryConfig` on one accelerator: models get its techniques before the engine takes them.

What belongs to the engine and not to the model (the dtype that gradients are reduced in, the
allocator) is set here.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import MutableMapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ulysses_accel import _private_api
from ulysses_accel.config.parallelism import ParallelismConfig
from ulysses_accel.installation import AcceleratorFeature, FeatureSession, Installation
from ulysses_accel.memory.apply import InstalledMemory, apply_memory

_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


class Memory(AcceleratorFeature):
    """What saves memory on one accelerator, `accelerator.memory`.

    Args:
        config: the accelerator's config, with a `memory_config`.
        accelerator: that is being constructed.
        session: that runs the features.

    Attributes:
        installed: what each prepared model got.
    """

    name = "memory"
    settings = ("memory_config",)

    def __init__(
        self, config: ParallelismConfig, accelerator: Any, session: FeatureSession
    ) -> None:
        super().__init__(config, accelerator, session)
        memory = config.memory_config
        assert memory is not None
        self.installed: WeakKeyDictionary[nn.Module, InstalledMemory] = WeakKeyDictionary()
        self._reduces_in_bfloat16 = memory.bf16_gradient_reduction
        if memory.expandable_segments and torch.cuda.is_available():
            _expand_segments()
        if memory.bf16_gradient_reduction:
            _reduce_in_bfloat16(accelerator.state, self.installation)

    @classmethod
    def is_requested(cls, config: ParallelismConfig) -> bool:
        """Returns whether a setting that saves memory is on."""
        return config.memory_config is not None and config.memory_config.is_active

    def prepare_model(self, model: nn.Module, checked: None) -> None:
        """Makes a model train in less memory."""
        shares_sequence = self.config.non_data_parallel_size > 1
        installed = apply_memory(model, self.config.memory_config, shares_sequence=shares_sequence)
        self.installed[model] = installed
        self.installation.callback(_close_memory, self.installed, weakref.ref(model))

    def after_prepare(self, prepared: tuple[Any, ...]) -> tuple[Any, ...]:
        """Makes DDP send gradients in bfloat16; a hook of the user's stays."""
        for model in prepared:
            is_ddp = isinstance(model, DistributedDataParallel)
            if self._reduces_in_bfloat16 and is_ddp and not _private_api.has_comm_hook(model):
                # A lambda has no annotations: torch 2.13 compares them, which are texts here, with
                # its classes.
                model.register_comm_hook(
                    model.process_group, lambda group, bucket: _average_in_bfloat16(group, bucket)
                )
        return prepared


def _close_memory(
    installed: MutableMapping[nn.Module, InstalledMemory], model: weakref.ref[nn.Module]
) -> None:
    live = model()
    if live is not None:
        installed.pop(live).close()


def _average_in_bfloat16(group: dist.ProcessGroup, bucket: Any) -> Any:
    """A communication hook of DDP: averages a bucket of gradients that travel in bfloat16, on any
    backend.
    """
    narrow = bucket.buffer().to(torch.bfloat16).div_(group.size())
    work = dist.all_reduce(narrow, group=group, async_op=True)
    assert work is not None

    def widen(done: Any) -> Tensor:
        buffer: Tensor = bucket.buffer()
        return buffer.copy_(done.value()[0])

    return work.get_future().then(widen)


def _expand_segments() -> None:
    """Lets the GPU's allocator grow its blocks, unless the environment configures it."""
    if not any(os.environ.get(name) for name in _ALLOCATOR_VARIABLES):
        _private_api.set_allocator_settings("expandable_segments:True")


def _reduce_in_bfloat16(state: Any, installation: Installation) -> None:
    """Makes DeepSpeed and FSDP2 reduce gradients in bfloat16, where the user did not choose
    otherwise.
    """
    deepspeed = getattr(state, "deepspeed_plugin", None)
    if deepspeed is not None:
        for key in ("communication_data_type", "seq_parallel_communication_data_type"):
            if key not in deepspeed.deepspeed_config:
                deepspeed.deepspeed_config[key] = "bf16"
                installation.callback(deepspeed.deepspeed_config.pop, key, None)
    fsdp = getattr(state, "fsdp_plugin", None)
    if fsdp is not None and getattr(fsdp, "fsdp_version", 1) == 2:
        policy = _fsdp_policy(fsdp.mixed_precision_policy)
        installation.set(fsdp, "mixed_precision_policy", policy)


def _fsdp_policy(policy: Any) -> Any:
    """Returns FSDP2's policy of dtypes, reducing in bfloat16 unless it has a dtype for that."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if policy is None:
        return MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)
    if policy.reduce_dtype is not None:
        return policy
    return MixedPrecisionPolicy(
        param_dtype=policy.param_dtype,
        reduce_dtype=torch.bfloat16,
        output_dtype=policy.output_dtype,
        cast_forward_inputs=policy.cast_forward_inputs,
    )
