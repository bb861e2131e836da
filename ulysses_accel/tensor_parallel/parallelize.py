"""Tensor parallelism in the manner of Megatron, with the sequence sharded where the weights are not
(`split_gather`).

The ranks of the axis `tp` see the same tokens. Weights of attention and MLP are cut over them by
torch's parallel styles; norms and the residual stream are cut along the sequence, gathered before
the linear layers and reduce-scattered behind them. Behind the last norm all is whole again: logits
and loss are those of the rank's shard of the sequence.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.distributed.tensor.placement_types import Placement

from ulysses_accel import _private_api
from ulysses_accel.attention.huggingface.registry import active_description
from ulysses_accel.config.parallelism import ParallelismConfig
from ulysses_accel.distributed.consensus import same_everywhere
from ulysses_accel.distributed.mesh import joint_axis
from ulysses_accel.errors import BatchError, ConfigError, UnsupportedModelError
from ulysses_accel.introspection.structure import text_config, transformers_model
from ulysses_accel.tensor_parallel.plan import Plan, Unit, make_plan

Place = tuple[nn.Module, str]


class TensorParallel:
    """Cuts an accelerator's models over the tensor parallel axis, and gives optimizers the new
    parameters.

    Args:
        config: sizes of the axes, and where they came from.
        mesh: with an axis `tp`.
        accelerator: whose models are cut, for the device that their parts go to, and to save them
            whole.
    """

    def __init__(self, config: ParallelismConfig, mesh: DeviceMesh, accelerator: Any) -> None:
        self.config, self.mesh, self.accelerator = config, mesh, accelerator
        # By the old parameter's id, which is kept so that no other object gets the same one; its
        # storage is freed.
        self._moved: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        self._saving: list[Any] = []
        if not accelerator.is_fsdp2:
            accelerator.get_state_dict, accelerator.save_state = _whole_state, _refuse_save_state

    def uninstall(self) -> None:
        """Restores the accelerator's own methods, and the models' way to save themselves; they stay
        cut.
        """
        for name in ("get_state_dict", "save_state"):
            vars(self.accelerator).pop(name, None)
        for model in self._saving:
            del model.save_pretrained
        self._saving.clear()

    def distribute(self, model: nn.Module) -> None:
        """Cuts a model in place; every rank must call it, and gets rank 0's weights.

        Raises:
            ConfigError: its parameters are not plain ones.
            UnsupportedModelError: it has a part that is not cut, or head counts that don't divide.
        """
        inner, tp_size = transformers_model(model), self.config.tp_size
        check_parameters(inner, tp_size)
        plan = check_cut(inner, self.config)
        for module in plan.counting:
            _count_own_heads(module, tp_size)
        behind = set(inner.modules()) - set(plan.decoder.modules())
        drops = any(isinstance(module, nn.Dropout) and module.p for module in behind)
        plan.decoder.register_forward_pre_hook(
            DecoderEntry(self.mesh["tp"], drops), with_kwargs=True
        )
        for buffer in model.buffers():
            # Stock code moves no model with distributed parameters.
            buffer.data = buffer.data.to(self.accelerator.device)
            dist.broadcast(buffer.data, src=0)
        for unit in plan.units:
            self._distribute(unit)

    def _distribute(self, unit: Unit) -> None:
        before = dict(_parameters(unit.module))
        for (module, name), old in before.items():
            if id(old) in self._moved:
                # Tied to a parameter of an earlier unit, whose style cuts it alike.
                module.register_parameter(name, self._moved[id(old)][1])
            else:
                old.data = old.data.to(self.accelerator.device)
                dist.broadcast(old.data, src=0)
        for name, style in unit.plan.items():
            # The weights are the same everywhere now: each rank cuts its own.
            parallelize_module(
                unit.module.get_submodule(name), self.mesh["tp"], style, src_data_rank=None
            )
        for (module, name), old in before.items():
            if id(old) not in self._moved:
                # Some of torch's styles make a trainable parameter of a frozen one.
                new = getattr(module, name).requires_grad_(old.requires_grad)
                self._moved[id(old)] = (old, _with_whole_gradient(new))
                old.data = old.data.new_empty(0)
            module.register_parameter(name, self._moved[id(old)][1])

    def update(self, prepared: Iterable[Any]) -> None:
        """Gives optimizers that were made before `prepare` the parameters that took their own ones'
        places.

        Raises:
            ConfigError: one has moments of whole parameters already.
        """
        for optimizer in (each for each in prepared if isinstance(each, torch.optim.Optimizer)):
            if any(optimizer.state.get(old) for old, _ in self._moved.values()):
                raise ConfigError(
                    f"the optimizer ({type(optimizer).__name__}) has made steps with parameters "
                    "that are cut over "
                    f"tp_size={self.config.tp_size} ranks now. Prepare the model before the "
                    "optimizer's first step."
                )
            for group in optimizer.param_groups:
                group["params"] = [self._latest(parameter) for parameter in group["params"]]

    def _latest(self, parameter: nn.Parameter) -> nn.Parameter:
        while id(parameter) in self._moved:
            parameter = self._moved[id(parameter)][1]
        return parameter

    def prepare_model(
        self, stock: Callable[..., nn.Module], model: nn.Module, *args: Any, **kwargs: Any
    ) -> nn.Module:
        """Prepares a cut model for an accelerator without an engine: gradients are averaged over
        all axes but `tp`.

        Args:
            stock: the accelerator's own method, whose DDP takes no cut parameters.
            model: that was distributed.
            args: for `stock`.
            kwargs: for `stock`.
        """
        if not _private_api.is_prepared(model):
            self._replicate(model, joint_axis(self.mesh, "dp_cp"))
            inner = transformers_model(model)
            inner.save_pretrained = partial(_save_whole, inner.save_pretrained)
            self._saving.append(inner)
        return stock(model, *args, **{**kwargs, "evaluation_mode": True})

    def _replicate(self, model: nn.Module, axis: DeviceMesh) -> None:
        if axis.size() == 1:
            return
        before = dict(_parameters(model))
        for layer in transformers_model(model).get_decoder().layers:
            _private_api.replicate(layer, axis)
        _private_api.replicate(model, axis)
        for (module, name), old in before.items():
            self._moved[id(old)] = (old, getattr(module, name))
            old.to_local().untyped_storage().resize_(0)  # type: ignore[attr-defined]


def _whole_state(model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
    """Stands in for `Accelerator.get_state_dict`: whole tensors on rank 0, nothing elsewhere, as
    FSDP2 has it.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


def _save_whole(stock: Callable[..., Any], folder: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("state_dict") is None:
        raise ConfigError(
            "save_pretrained of a model that is cut over tensor parallel ranks, without "
            "state_dict: this rank has only "
            "its parts. Call accelerator.get_state_dict(model) on all ranks, and pass on what it "
            "returns; or use FSDP2."
        )
    return stock(folder, *args, **kwargs)


def _refuse_save_state(*_: Any, **__: Any) -> None:
    raise ConfigError(
        "save_state with tensor parallelism and no engine: stock code would write one rank's part "
        "of the optimizer. "
        "Use FSDP2, which writes all parts, or get_state_dict for the model alone."
    )


@contextmanager
def fully_sharded(config: ParallelismConfig, accelerator: Any) -> Iterator[None]:
    """Lets stock code shard a cut model with FSDP2, over the axes that are left.

    It would prepare tensor parallelism by itself, and load rank 0's part of a weight into every
    rank; all ranks have rank 0's weights already.

    Args:
        config: the accelerator's.
        accelerator: whose FSDP2 plugin is used.
    """
    if config.tp_size == 1:
        yield
        return
    plugin = accelerator.state.fsdp_plugin
    loads = plugin.cpu_ram_efficient_loading
    config._tp_hidden, plugin.cpu_ram_efficient_loading = True, False
    try:
        yield
    finally:
        config._tp_hidden, plugin.cpu_ram_efficient_loading = False, loads


def check_engine(config: ParallelismConfig, accelerator: Any) -> None:
    """Refuses what tensor parallelism is not combined with.

    Raises:
        ConfigError: DeepSpeed, or a setting of `MemoryConfig` that rewrites the layers that are
            cut.
    """
    here = f"tp_size={config.tp_size} (from {config.source_of('tp_size')})"
    if str(accelerator.distributed_type).endswith("DEEPSPEED"):
        raise ConfigError(
            f"{here} with DeepSpeed: its engines keep no cut parameters. Use FSDP2, or no engine."
        )
    memory = config.memory_config
    names = ("tiled_mlp", "tiled_norm", "tiled_loss", "use_liger_loss")
    wanted = [name for name in names if memory is not None and getattr(memory, name)]
    if wanted:
        raise ConfigError(
            f"{here} with {', '.join(f'{name}=True' for name in wanted)}: these compute whole "
            "layers in tiles, and "
            f"tensor parallelism cuts them. Use one or the other; checkpointing goes with both."
        )


def _parameters(module: nn.Module) -> Iterator[tuple[Place, nn.Parameter]]:
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            yield (part, name), parameter


def _with_whole_gradient(parameter: nn.Parameter) -> nn.Parameter:
    """Makes a parameter's gradient lie as the parameter does: of a replicated one each rank's
    tokens give a part.

    FSDP2 does so by itself, with parameters of its own.
    """
    if parameter.requires_grad:
        parameter.register_hook(partial(_laid_out, parameter.placements))  # type: ignore[attr-defined]
    return parameter


def _laid_out(placements: tuple[Placement, ...], grad: DTensor) -> DTensor:
    return grad.redistribute(placements=placements)


class DecoderEntry:
    """A decoder's first hook: refuses batches that it would compute wrong, and cuts embeddings that
    are given.

    Args:
        mesh: the tensor parallel axis.
        drops: whether features are dropped behind the decoder, where all ranks compute the same.
    """

    def __init__(self, mesh: DeviceMesh, drops: bool = False) -> None:
        self.mesh, self.drops = mesh, drops
        self._is_checked = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the arguments of the decoder's forward.

        Raises:
            BatchError: nothing tells the batch's positions and mask, which the cut sequence hides.
            RankDisagreementError: the ranks, which compute one batch together, were given different
                first ones, or drop different features of it.
        """
        if active_description() is None:
            raise BatchError(
                f"a model that is cut over tp_size={self.mesh.size()} ranks was given a batch that "
                "is not from a "
                "prepared data loader, so nothing tells its positions and mask. Pass the loader "
                "to "
                f"accelerator.prepare."
            )
        ids, given = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
        self._check(ids, given)
        if self.drops and module.training:
            self._check_random_state(
                next(tensor.device for tensor in (ids, given) if tensor is not None)
            )
        if given is None:
            return args, kwargs
        whole = DTensor.from_local(given, self.mesh, [Replicate()], run_check=False)
        # [B, S/P, D] -> [B, S/(P*T), D]
        return args, {
            **kwargs,
            "inputs_embeds": whole.redistribute(placements=[Shard(1)]).to_local(),
        }

    def _check(self, ids: Tensor | None, given: Tensor | None) -> None:
        length = next(int(tensor.shape[1]) for tensor in (ids, given) if tensor is not None)
        if length % self.mesh.size():
            raise BatchError(
                f"{length} tokens on this rank can't be cut over tp_size={self.mesh.size()} ranks. "
                "Prepare the data "
                f"loader with the accelerator, which pads to a multiple."
            )
        # Once: loaders that go apart do so from the start, and the comparison waits for the device.
        if self._is_checked or ids is None:
            return
        self._is_checked = True
        places = torch.arange(1, ids.numel() + 1, device=ids.device)
        values: dict[str, int | str] = {
            "shape": str(list(ids.shape)),
            "checksum": int((ids.flatten() * places).sum()),
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
            "which drop the same features behind the decoder,"
        )
        same_everywhere({"checksum": state}, self.mesh.get_group(), what)


def _count_own_heads(attention: Any, tp_size: int) -> None:
    """Tells an attention module that cuts its fused projection by head counts how many heads this
    rank has.
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
                f"{name} of {type(model).__name__} is a {kind}, and tp_size={tp_size} cuts plain "
                "parameters that hold "
                "their values. Build or load the model without tp_plan, quantization, adapters or "
                "the meta device."
            )


def check_cut(model: Any, config: ParallelismConfig) -> Plan:
    """Returns how a transformers model is cut, of which nothing is changed.

    Args:
        model: a dense decoder.
        config: sizes of the axes, and where they came from.

    Raises:
        UnsupportedModelError: it has a part that is not cut, or too few heads.
    """
    plan = make_plan(model, config.tp_size, str(config.source_of("tp_size")))
    heads = text_config(model).num_attention_heads
    if config.sp_size * config.tp_size > heads:
        raise UnsupportedModelError(
            f"sp_size={config.sp_size} (from {config.source_of('sp_size')}) is more than "
            f"num_attention_heads={heads} / "
            f"tp_size={config.tp_size}, what one rank of {type(model).__name__} has. Use sp_size="
            f"{heads // config.tp_size} at most, and cp_size for the rest."
        )
    return plan
