"""Shards one model's weights over the ranks of the axis `tp`, in the manner of Megatron, with the
sequence sharded where the weights are not (`split_gather`).

The ranks of the axis see the same tokens. torch's parallel styles shard the weights of attention
and MLP; norms and the residual stream are sharded along the sequence, gathered before the linear
layers and reduce-scattered after them. After the last norm every rank has all features of its
tokens again: logits and loss are those of the rank's shard of the sequence.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.distributed.tensor.placement_types import Placement
from torch.utils.weak import WeakTensorKeyDictionary

from ulysses_accel import _private_api
from ulysses_accel.attention.huggingface.registry import active_description
from ulysses_accel.config.parallelism import ParallelismConfig
from ulysses_accel.distributed.consensus import same_everywhere
from ulysses_accel.distributed.mesh import joint_axis
from ulysses_accel.errors import BatchError, ConfigError, UnsupportedModelError
from ulysses_accel.introspection.structure import text_config, transformers_model
from ulysses_accel.tensor_parallel.plan import Plan, Unit, make_plan

Place = tuple[nn.Module, str]


class WeightSharding:
    """Shards the weights of models over the ranks of the axis `tp`, and gives optimizers the new
    parameters.

    Args:
        config: sizes of the axes, and where they came from.
        mesh: with an axis `tp`.
        device: that the shards are moved to.
    """

    def __init__(self, config: ParallelismConfig, mesh: DeviceMesh, device: torch.device) -> None:
        self.config, self.mesh, self.device = config, mesh, device
        # From each parameter that a model had to the one in its place. Weak: an entry is of use as
        # long as an optimizer has the earlier parameter.
        self._successors: Any = WeakTensorKeyDictionary()

    def shard(self, model: nn.Module) -> None:
        """Shards a model in place; every rank must call it, and gets rank 0's weights.

        Raises:
            ConfigError: its parameters are not plain ones.
            UnsupportedModelError: it has a part that can't be sharded, or head counts that don't
                divide.
        """
        inner, tp_size = transformers_model(model), self.config.tp_size
        check_parameters(inner, tp_size)
        plan = check_cut(inner, self.config)
        for module in plan.counting:
            _count_local_heads(module, tp_size)
        after_decoder = set(inner.modules()) - set(plan.decoder.modules())
        drops = any(isinstance(module, nn.Dropout) and module.p for module in after_decoder)
        plan.decoder.register_forward_pre_hook(
            DecoderEntry(self.mesh["tp"], drops), with_kwargs=True
        )
        for buffer in model.buffers():
            # accelerate 1.15 moves no model that has DTensor parameters.
            buffer.data = buffer.data.to(self.device)
            dist.broadcast(buffer.data, src=0)
        for unit in plan.units:
            self._shard_unit(unit)

    def _shard_unit(self, unit: Unit) -> None:
        before = dict(_parameters(unit.module))
        for (module, name), old in before.items():
            if old in self._successors:
                # Tied to a parameter of an earlier unit, whose style shards it alike.
                module.register_parameter(name, self._successors[old])
            else:
                old.data = old.data.to(self.device)
                dist.broadcast(old.data, src=0)
        for name, style in unit.plan.items():
            # The weights are the same on all ranks now: each takes its shard of the local ones.
            parallelize_module(
                unit.module.get_submodule(name), self.mesh["tp"], style, src_data_rank=None
            )
        for (module, name), old in before.items():
            if old not in self._successors:
                # Some of torch's styles make a trainable parameter of a frozen one.
                new = getattr(module, name).requires_grad_(old.requires_grad)
                self._successors[old] = _with_full_gradient(new)
                old.data = old.data.new_empty(0)
            module.register_parameter(name, self._successors[old])

    def update(self, objects: Iterable[Any]) -> None:
        """Gives optimizers that were built with earlier parameters the sharded ones.

        Args:
            objects: of which the optimizers are updated.

        Raises:
            ConfigError: one has moments of full parameters already.
        """
        for optimizer in objects:
            if not isinstance(optimizer, torch.optim.Optimizer):
                continue
            if any(optimizer.state.get(old) for old in self._successors):
                raise ConfigError(
                    f"the optimizer ({type(optimizer).__name__}) has made steps with parameters "
                    f"that are sharded over tp_size={self.config.tp_size} ranks now. Prepare the "
                    "model before the optimizer's first step."
                )
            for group in optimizer.param_groups:
                group["params"] = [self._latest(parameter) for parameter in group["params"]]

    def _latest(self, parameter: nn.Parameter) -> nn.Parameter:
        while parameter in self._successors:
            parameter = self._successors[parameter]
        return parameter

    def replicate(self, model: nn.Module) -> None:
        """Averages a sharded model's gradients over all axes but `tp`, in place of DDP, which takes
        no DTensor parameters.
        """
        axis = joint_axis(self.mesh, "dp_cp")
        if axis.size() == 1:
            return
        before = dict(_parameters(model))
        for layer in transformers_model(model).get_decoder().layers:
            _private_api.replicate(layer, axis)
        _private_api.replicate(model, axis)
        for (module, name), old in before.items():
            self._successors[old] = getattr(module, name)
            old.to_local().untyped_storage().resize_(0)  # type: ignore[attr-defined]


def _parameters(module: nn.Module) -> Iterator[tuple[Place, nn.Parameter]]:
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            yield (part, name), parameter


def _with_full_gradient(parameter: nn.Parameter) -> nn.Parameter:
    """Gives a parameter's gradient the parameter's placements: each rank's tokens give a part of
    the gradient of a replicated one.

    FSDP2 does so by itself, with parameters of its own.
    """
    if parameter.requires_grad:
        parameter.register_hook(partial(_with_placements, parameter.placements))  # type: ignore[attr-defined]
    return parameter


def _with_placements(placements: tuple[Placement, ...], grad: DTensor) -> DTensor:
    return grad.redistribute(placements=placements)


class DecoderEntry:
    """A decoder's first hook: refuses batches that it would compute wrong, and shards embeddings
    that the caller passes.

    Args:
        mesh: the tensor parallel axis.
        drops: whether features are dropped after the decoder, where all ranks compute the same.
    """

    def __init__(self, mesh: DeviceMesh, drops: bool = False) -> None:
        self.mesh, self.drops = mesh, drops
        self._is_checked = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the arguments of the decoder's forward.

        Raises:
            BatchError: nothing tells the batch's positions and mask, which a shard does not show.
            RankDisagreementError: the ranks, which compute one batch together, got different first
                ones, or drop different features of it.
        """
        if active_description() is None:
            raise BatchError(
                f"a model that is sharded over tp_size={self.mesh.size()} ranks got a batch that "
                "is not from a prepared data loader, so nothing tells its positions and mask. "
                "Pass the loader to accelerator.prepare."
            )
        ids = kwargs.get("input_ids", args[0] if args else None)
        embeddings = kwargs.get("inputs_embeds")
        self._check(ids, embeddings)
        if self.drops and module.training:
            tokens: Any = embeddings if ids is None else ids
            self._check_random_state(tokens.device)
        if embeddings is None:
            return args, kwargs
        full = DTensor.from_local(embeddings, self.mesh, [Replicate()], run_check=False)
        # [B, S/P, D] -> [B, S/(P*T), D]
        shard = full.redistribute(placements=[Shard(1)]).to_local()
        return args, {**kwargs, "inputs_embeds": shard}

    def _check(self, ids: Tensor | None, embeddings: Tensor | None) -> None:
        length = next(int(tensor.shape[1]) for tensor in (ids, embeddings) if tensor is not None)
        if length % self.mesh.size():
            raise BatchError(
                f"{length} tokens on this rank can't be sharded over tp_size={self.mesh.size()} "
                "ranks. Prepare the data loader with the accelerator, which pads to a multiple."
            )
        # Once: loaders that disagree do so from the start, and the comparison waits for the device.
        if self._is_checked or ids is None:
            return
        self._is_checked = True
        weights = torch.arange(1, ids.numel() + 1, device=ids.device)
        values: dict[str, int | str] = {
            "shape": str(list(ids.shape)),
            "checksum": int((ids.flatten() * weights).sum()),
        }
        same_everywhere(
            values, self.mesh.get_group(), f"the first batch of tp_size={self.mesh.size()} ranks"
        )

    def _check_random_state(self, device: torch.device) -> None:
        self.drops = False
        generator: Any = torch if device.type == "cpu" else torch.get_device_module(device)
        state = zlib.crc32(generator.get_rng_state().numpy().tobytes())
        what = (
            f"the random state of tp_size={self.mesh.size()} ranks, "
            "which drop the same features after the decoder,"
        )
        same_everywhere({"checksum": state}, self.mesh.get_group(), what)


def _count_local_heads(attention: Any, tp_size: int) -> None:
    """Tells an attention module that splits its fused projection by head counts how many heads
    this rank has.
    """
    attention.config = copy.copy(attention.config)
    attention.config.num_attention_heads //= tp_size
    attention.num_key_value_heads //= tp_size


def check_parameters(model: nn.Module, tp_size: int) -> None:
    """Refuses parameters that are not plain ones with values, which can't be sharded.

    Args:
        model: a transformers model.
        tp_size: ranks that share its weights.

    Raises:
        ConfigError: naming the first such parameter.
    """
    for name, parameter in model.named_parameters():
        if (
            type(parameter) is not nn.Parameter
            or parameter.is_meta
            or not parameter.is_floating_point()
        ):
            kind = f"{type(parameter).__name__} of {parameter.dtype} on {parameter.device}"
            raise ConfigError(
                f"{name} of {type(model).__name__} is a {kind}, and tp_size={tp_size} shards plain "
                "parameters that hold their values. Build or load the model without tp_plan, "
                "quantization, adapters or the meta device."
            )


def check_cut(model: Any, config: ParallelismConfig) -> Plan:
    """Returns how the weights of a transformers model are sharded; changes nothing.

    Args:
        model: a dense decoder.
        config: sizes of the axes, and where they came from.

    Raises:
        UnsupportedModelError: it has a part that can't be sharded, or too few heads.
    """
    plan = make_plan(model, config.tp_size, str(config.source_of("tp_size")))
    heads = text_config(model).num_attention_heads
    if config.sp_size * config.tp_size > heads:
        raise UnsupportedModelError(
            f"sp_size={config.sp_size} (from {config.source_of('sp_size')}) is more than "
            f"num_attention_heads={heads} / tp_size={config.tp_size}, what one rank of "
            f"{type(model).__name__} has. Use sp_size={heads // config.tp_size} at most, and "
            "cp_size for the rest."
        )
    return plan
