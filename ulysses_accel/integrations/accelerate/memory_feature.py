"""Attaches a `MemoryConfig` to one accelerator: models get it in `prepare`, before the engine wraps
them.

What belongs to the engine and not to the model (the dtype that gradients are reduced in, the
allocator) is set here.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ulysses_accel import _private_api
from ulysses_accel.config.memory import MemoryConfig
from ulysses_accel.memory.apply import InstalledMemory, apply_memory

_WRAPPED = ("prepare", "prepare_model")
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


class MemoryAttachment:
    """One accelerator's memory features, and the way to undo them.

    Args:
        config: what to install.
        accelerator: the instance whose methods are wrapped, possibly for the second time.
    """

    def __init__(self, config: MemoryConfig, accelerator: Any) -> None:
        self.config, self.accelerator = config, accelerator
        self.installed: list[tuple[nn.Module, InstalledMemory]] = []
        self._below = {name: getattr(accelerator, name) for name in _WRAPPED}
        self._replaced = {
            name: vars(accelerator)[name] for name in _WRAPPED if name in vars(accelerator)
        }
        for name in _WRAPPED:
            setattr(accelerator, name, getattr(self, name))
        accelerator.memory = self
        if config.expandable_segments and torch.cuda.is_available():
            _expand_segments()
        if config.bf16_gradient_reduction:
            _reduce_in_bfloat16(accelerator)

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for `Accelerator.prepare`."""
        for model in (arg for arg in args if isinstance(arg, nn.Module)):
            self._install(model)
        result = self._below["prepare"](*args, **kwargs)
        for prepared in result if isinstance(result, tuple) else (result,):
            self._compress(prepared)
        return result

    def prepare_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """Stands in for `Accelerator.prepare_model`."""
        self._install(model)
        prepared: nn.Module = self._below["prepare_model"](model, *args, **kwargs)
        self._compress(prepared)
        return prepared

    def _install(self, model: nn.Module) -> None:
        is_known = any(known is model or model in known.modules() for known, _ in self.installed)
        if not is_known and not _private_api.is_prepared(model):
            shares_sequence = hasattr(self.accelerator, "sequence_parallel")
            self.installed.append(
                (model, apply_memory(model, self.config, shares_sequence=shares_sequence))
            )

    def _compress(self, prepared: Any) -> None:
        """Makes DDP send bfloat16; a hook that the user gave stays."""
        if not self.config.bf16_gradient_reduction or not isinstance(
            prepared, DistributedDataParallel
        ):
            return
        if not _private_api.has_comm_hook(prepared):
            # A lambda has no annotations: DDP compares them, which are texts here, with its own
            # classes.
            prepared.register_comm_hook(
                prepared.process_group, lambda group, bucket: _average_in_bfloat16(group, bucket)
            )

    def uninstall(self) -> None:
        """Restores the accelerator's methods and every model that was prepared."""
        for _, installed in self.installed:
            installed.close()
        self.installed.clear()
        for name in _WRAPPED:
            delattr(self.accelerator, name)
        vars(self.accelerator).update(self._replaced)
        del self.accelerator.memory


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
    """Lets the GPU's allocator grow its blocks, unless the environment says how it is to work."""
    if not any(os.environ.get(name) for name in _ALLOCATOR_VARIABLES):
        _private_api.set_allocator_settings("expandable_segments:True")


def _reduce_in_bfloat16(accelerator: Any) -> None:
    """Makes DeepSpeed and FSDP2 reduce gradients in bfloat16, where the user did not choose
    otherwise.
    """
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None:
        deepspeed.deepspeed_config.setdefault("communication_data_type", "bf16")
        deepspeed.deepspeed_config.setdefault("seq_parallel_communication_data_type", "bf16")
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and getattr(fsdp, "fsdp_version", 1) == 2:
        _fsdp_reduces_in_bfloat16(fsdp)


def _fsdp_reduces_in_bfloat16(plugin: Any) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = plugin.mixed_precision_policy
    if policy is None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)
    elif policy.reduce_dtype is None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=policy.param_dtype,
            reduce_dtype=torch.bfloat16,
            output_dtype=policy.output_dtype,
            cast_forward_inputs=policy.cast_forward_inputs,
        )
