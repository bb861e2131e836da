"""Attaches expert parallelism to one accelerator: models get it in `prepare`, before the engine
wraps them.

DDP and FSDP2 leave the dealt experts alone; their gradients, and what is saved of them, are seen to
here. With DDP a checkpoint holds whole experts, gathered on every rank; FSDP2's own checkpoints
hold each rank's part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ulysses_accel import _private_api
from ulysses_accel.config.parallelism import ParallelismConfig
from ulysses_accel.distributed.mesh import build_expert_mesh
from ulysses_accel.errors import ConfigError
from ulysses_accel.expert_parallel.dispatch import DealtExperts, deal_experts, whole_tensor
from ulysses_accel.integrations.frames import calling_trainer
from ulysses_accel.integrations.trainer.saving import whole_saves

_WRAPPED = (
    "prepare",
    "prepare_model",
    "prepare_optimizer",
    "get_state_dict",
    "save_state",
    "load_state",
)

# Where DDP, when it is made, finds the names of parameters that it leaves alone.
_IGNORED = _private_api.DDP_IGNORED


class ExpertAttachment:
    """One accelerator's expert parallelism, and the way to undo it.

    Args:
        config: the accelerator's config, with an `ep_size` above 1.
        accelerator: the instance whose methods are wrapped, possibly for the second time.

    Raises:
        ConfigError: an engine or a setting that does not go with dealt experts.
        MeshError: the size does not divide the number of processes.
    """

    def __init__(self, config: ParallelismConfig, accelerator: Any) -> None:
        _check_engine(config, accelerator)
        self.accelerator = accelerator
        self.mesh = build_expert_mesh(config.ep_size, accelerator.device.type)
        self.dealt: list[DealtExperts] = []
        self._hooked: list[Optimizer] = []
        self._gathers = False
        self._below = {name: getattr(accelerator, name) for name in _WRAPPED}
        self._replaced = {
            name: vars(accelerator)[name] for name in _WRAPPED if name in vars(accelerator)
        }
        for name in _WRAPPED:
            setattr(accelerator, name, getattr(self, name))
        accelerator.expert_parallel = self
        self.saves = whole_saves(calling_trainer(accelerator), accelerator, config)

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for `Accelerator.prepare`."""
        with self._dealing([arg for arg in args if isinstance(arg, nn.Module)]):
            result = self._below["prepare"](*args, **kwargs)
        self._update_optimizers()
        return result

    def prepare_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """Stands in for `Accelerator.prepare_model`."""
        with self._dealing([model]):
            prepared: nn.Module = self._below["prepare_model"](model, *args, **kwargs)
        return prepared

    def prepare_optimizer(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Stands in for `Accelerator.prepare_optimizer`."""
        prepared = self._below["prepare_optimizer"](optimizer, *args, **kwargs)
        self._update_optimizers()
        return prepared

    def _update_optimizers(self) -> None:
        """Gives optimizers, prepared before or behind their models, the dealt experts, and sees to
        what they save.
        """
        for optimizer in (
            prepared.optimizer for prepared in _private_api.prepared_optimizers(self.accelerator)
        ):
            for dealt in self.dealt:
                dealt.update(optimizer)
            _step_one_by_one(optimizer)
            if not self.accelerator.is_fsdp2 and optimizer not in self._hooked:
                self._hooked.append(optimizer)
                optimizer.register_state_dict_post_hook(self._gather_moments)
                optimizer.register_load_state_dict_pre_hook(self._deal_moments)

    def get_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for `Accelerator.get_state_dict`: whole experts under their full names; every
        rank must call it.
        """
        return self._gathering("get_state_dict", *args, **kwargs)

    def save_state(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for `Accelerator.save_state`, which every rank calls."""
        return self._gathering("save_state", *args, **kwargs)

    def load_state(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for `Accelerator.load_state`, which every rank calls."""
        return self._gathering("load_state", *args, **kwargs)

    def whole_state(self, optimizer: Any) -> dict[str, Any]:
        """Returns an optimizer's state with whole experts' moments; every rank must call it."""
        state: dict[str, Any] = self._with_experts(optimizer.state_dict)
        return state

    def _gathering(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._with_experts(self._below[method], *args, **kwargs)

    def _with_experts(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before, self._gathers = self._gathers, True
        try:
            return function(*args, **kwargs)
        finally:
            self._gathers = before

    @contextmanager
    def _dealing(self, models: list[nn.Module]) -> Iterator[None]:
        """Deals the experts of models while an engine takes them, which is told to leave these
        parameters alone.
        """
        new = [model for model in models if not self._is_known(model)]
        dealt = [deal_experts(model, self.mesh) for model in new]
        self.dealt += dealt
        with self._left_alone(dealt):
            yield
        for one in dealt:
            one.distribute()
            if not self.accelerator.is_fsdp2:
                self._hook_states(one)

    def _is_known(self, model: nn.Module) -> bool:
        known = [dealt.model for dealt in self.dealt]
        inside = set(model.modules())
        return any(one in inside or model in one.modules() for one in known)

    @contextmanager
    def _left_alone(self, dealt: list[DealtExperts]) -> Iterator[None]:
        before = [getattr(one.model, _IGNORED, None) for one in dealt]
        for one, names in zip(dealt, before, strict=True):
            setattr(one.model, _IGNORED, [*(names or []), *one.parameters])
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None) if dealt else None
        modules = getattr(plugin, "ignored_modules", None)
        if plugin is not None:
            plugin.ignored_modules = [
                *(modules or []),
                *(part for one in dealt for part in one.modules.values()),
            ]
        try:
            yield
        finally:
            if plugin is not None:
                plugin.ignored_modules = modules
            for one, names in zip(dealt, before, strict=True):
                # A later DDP, without experts that are dealt, must average them.
                delattr(one.model, _IGNORED)
                if names is not None:
                    setattr(one.model, _IGNORED, names)

    def _hook_states(self, dealt: DealtExperts) -> None:
        for name, module in dealt.modules.items():
            own = tuple(dealt.names[name])
            dealt.handles.append(module.register_state_dict_post_hook(self._gather_experts(own)))
            dealt.handles.append(module.register_load_state_dict_pre_hook(_deal_state(dealt, own)))

    def _gather_experts(self, own: tuple[str, ...]) -> Callable[..., None]:
        def gather(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
            for name in own:
                state[prefix + name] = self._gathered(state[prefix + name])

        return gather

    def _gathered(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor) and not self._gathers:
            # One rank alone, as the main process that saves, would wait for the others forever.
            raise ConfigError(
                "a state was asked for whose experts are dealt to "
                f"ep_size={self.mesh['ep'].size()} ranks, of which "
                "each has its part. Call accelerator.get_state_dict(model) or "
                "accelerator.save_state() on every rank."
            )
        return whole_tensor(tensor)

    def _gather_moments(self, _optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        moments = {
            number: {
                key: self._gathered(value) if isinstance(value, Tensor) else value
                for key, value in own.items()
            }
            for number, own in state["state"].items()
        }
        return {**state, "state": moments}

    def _deal_moments(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        moments = dict(state["state"])
        for number, parameter in zip(numbers, parameters, strict=True):
            if isinstance(parameter, DTensor) and number in moments:
                moments[number] = {
                    key: self._dealt_as(parameter, value) for key, value in moments[number].items()
                }
        return {**state, "state": moments}

    def _dealt_as(self, parameter: DTensor, value: Any) -> Any:
        whole = (
            isinstance(value, Tensor)
            and not isinstance(value, DTensor)
            and value.shape == parameter.shape
        )
        return self.dealt[0].as_part(self.dealt[0].part_of(value)) if whole else value

    def uninstall(self) -> None:
        """Restores the accelerator's methods and every model that was prepared; every rank must
        call it.
        """
        for dealt in self.dealt:
            dealt.uninstall()
        self.dealt.clear()
        for name in _WRAPPED:
            delattr(self.accelerator, name)
        vars(self.accelerator).update(self._replaced)
        del self.accelerator.expert_parallel
        if self.saves is not None:
            self.saves.uninstall()


def _deal_state(dealt: DealtExperts, own: tuple[str, ...]) -> Callable[..., None]:
    def deal(_module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in own:
            value = state.get(prefix + name)
            if isinstance(value, Tensor) and not isinstance(value, DTensor):
                state[prefix + name] = dealt.as_part(dealt.part_of(value))

    return deal


def _step_one_by_one(optimizer: Optimizer) -> None:
    """Keeps an optimizer from one call for many parameters, which can't hold dealt and other ones
    together.
    """
    for group in optimizer.param_groups:
        kinds = {isinstance(parameter, DTensor) for parameter in group["params"]}
        if len(kinds) > 1:
            group.update({name: False for name in ("fused", "foreach") if group.get(name)})


def _check_engine(config: ParallelismConfig, accelerator: Any) -> None:
    here = f"ep_size={config.ep_size} (from {config.source_of('ep_size')})"
    if str(accelerator.distributed_type).endswith("DEEPSPEED"):
        raise ConfigError(
            f"{here} with DeepSpeed: its engines average over all ranks. Use FSDP2, or no engine."
        )
    if config.tp_size > 1:
        raise ConfigError(
            f"{here} with tp_size={config.tp_size}: its ranks have the same tokens. Use tp_size=1."
        )
    if accelerator.mixed_precision == "fp16":
        raise ConfigError(
            f"{here} with mixed_precision='fp16': each rank would leave out steps by its own "
            "experts. Use 'bf16'."
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None) if accelerator.is_fsdp2 else None
    if plugin is not None and plugin.cpu_ram_efficient_loading:
        raise ConfigError(
            f"{here} with fsdp_cpu_ram_efficient_loading=True: experts are dealt before FSDP2 "
            "loads. Set it to False."
        )
    if plugin is not None and isinstance(plugin.ignored_modules, str):
        raise ConfigError(
            f"{here} with fsdp ignored_modules={plugin.ignored_modules!r}: experts are added to "
            "them. Give a list of "
            f"modules."
        )
