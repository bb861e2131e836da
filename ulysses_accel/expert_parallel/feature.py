"""Expert parallelism of one accelerator: the experts of its models are distributed over ranks
before the engine takes the model.

DDP and FSDP2 are told to ignore the experts; their gradients, and what is saved of them, are taken
care of here. With DDP a checkpoint holds all experts, gathered on every rank; FSDP2's own
checkpoints hold each rank's part.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ulysses_accel import _private_api
from ulysses_accel.config.parallelism import ParallelismConfig
from ulysses_accel.distributed.mesh import build_expert_mesh
from ulysses_accel.errors import ConfigError
from ulysses_accel.expert_parallel.dispatch import (
    DistributedExperts,
    check_experts,
    distribute_experts,
    full_tensor,
)
from ulysses_accel.installation import AcceleratorFeature, FeatureSession, Override, replaced

# Where torch's DDP looks, when it is built, for the names of parameters that it ignores.
_IGNORED = _private_api.DDP_IGNORED


class ExpertParallel(AcceleratorFeature):
    """Expert parallelism of one accelerator, `accelerator.expert_parallel`.

    Args:
        config: the accelerator's config, with an `ep_size` above 1.
        accelerator: that is being constructed.
        session: that runs the features.

    Raises:
        ConfigError: an engine or a setting that does not go with distributed experts.
        MeshError: the size does not divide the number of processes.
    """

    name = "expert_parallel"
    settings = ("ep_size",)

    def __init__(
        self, config: ParallelismConfig, accelerator: Any, session: FeatureSession
    ) -> None:
        super().__init__(config, accelerator, session)
        _check_engine(config, accelerator)
        self.mesh = build_expert_mesh(config.ep_size, accelerator.device.type)
        self.experts: WeakKeyDictionary[nn.Module, DistributedExperts] = WeakKeyDictionary()
        self._optimizers: WeakSet[Optimizer] = WeakSet()
        self._gathers = False
        self._has_engine = accelerator.is_fsdp2
        self._outside_engine: list[DistributedExperts] = []

    @classmethod
    def is_requested(cls, config: ParallelismConfig) -> bool:
        """Returns whether several ranks share the experts of each layer."""
        return config.ep_size > 1

    def is_new(self, model: nn.Module) -> bool:
        """Returns whether a model, and every part of it, was not prepared yet."""
        parts = set(model.modules())
        return super().is_new(model) and not any(known in parts for known in self.models)

    @classmethod
    def model_checks(
        cls, model: nn.Module, config: ParallelismConfig
    ) -> list[Callable[[], object]]:
        """Returns the check of a model's experts."""
        return [lambda: check_experts(model, config.ep_size)]

    def prepare_model(self, model: nn.Module, checked: None) -> None:
        """Leaves this rank its part of a model's experts."""
        experts = distribute_experts(model, self.mesh)
        self.experts[model] = experts
        self._outside_engine.append(experts)
        self.installation.callback(_close_experts, self.experts, weakref.ref(model))

    @contextmanager
    def around_engine(self, objects: tuple[Any, ...]) -> Iterator[None]:
        """Has the engine ignore the experts, which become DTensors after it took the model."""
        experts, self._outside_engine = self._outside_engine, []
        with self._ignored_by_engine(experts):
            yield
        for one in experts:
            one.make_distributed()
            if not self._has_engine:
                self._hook_states(one)

    @contextmanager
    def _ignored_by_engine(self, experts: list[DistributedExperts]) -> Iterator[None]:
        modules: list[nn.Module] = []
        with ExitStack() as stack:
            for one in experts:
                modules += one.modules.values()
                ignored = [*getattr(one.model, _IGNORED, ()), *one.parameters]
                # For the time of this call: a later DDP, after `close`, must average them.
                stack.enter_context(replaced(one.model, **{_IGNORED: ignored}))
            plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
            if plugin is not None and modules:
                ignored_modules = [*(plugin.ignored_modules or []), *modules]
                stack.enter_context(replaced(plugin, ignored_modules=ignored_modules))
            yield

    def after_prepare(self, prepared: tuple[Any, ...]) -> tuple[Any, ...]:
        """Gives optimizers, prepared before or after their models, the distributed experts, and
        takes care of what they save.
        """
        for accelerated in _private_api.prepared_optimizers(self.accelerator):
            optimizer = accelerated.optimizer
            for experts in self.experts.values():
                experts.update(optimizer)
            _step_one_by_one(optimizer)
            if not self._has_engine and optimizer not in self._optimizers:
                self._optimizers.add(optimizer)
                gather = optimizer.register_state_dict_post_hook(self._gather_moments)
                shard = optimizer.register_load_state_dict_pre_hook(self._shard_moments)
                self.installation.hooks([gather, shard])
        return prepared

    def overrides(self) -> Mapping[str, Override]:
        """Returns the methods that save and load, which every rank calls: states come with all
        experts under their full names.
        """
        return dict.fromkeys(("get_state_dict", "save_state", "load_state"), self._call_gathering)

    def _call_gathering(self, stock: Override, *args: Any, **kwargs: Any) -> Any:
        with self.gathering():
            return stock(*args, **kwargs)

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """While open, on every rank, states come with all experts instead of an error."""
        before, self._gathers = self._gathers, True
        try:
            yield
        finally:
            self._gathers = before

    @property
    def holds_parts(self) -> bool:
        """Whether a rank holds experts that no engine gathers for a checkpoint."""
        return not self._has_engine

    def _hook_states(self, experts: DistributedExperts) -> None:
        for name, module in experts.modules.items():
            names = tuple(experts.names[name])
            gather = module.register_state_dict_post_hook(self._gather_experts(names))
            shard = module.register_load_state_dict_pre_hook(partial(_shard_state, experts, names))
            experts.installation.hooks([gather, shard])

    def _gather_experts(self, names: tuple[str, ...]) -> Callable[..., None]:
        def gather(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
            for name in names:
                state[prefix + name] = self._gathered(state[prefix + name])

        return gather

    def _gathered(self, value: Any) -> Any:
        if isinstance(value, DTensor) and not self._gathers:
            # One rank alone, as the main process that saves, would wait for the others forever.
            raise ConfigError(
                "a state was requested whose experts are distributed over "
                f"ep_size={self.mesh['ep'].size()} ranks, of which each has its part. Call "
                "accelerator.get_state_dict(model) or accelerator.save_state() on every rank."
            )
        return full_tensor(value)

    def _gather_moments(self, _optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        gathered = {}
        for number, moments in state["state"].items():
            gathered[number] = {key: self._gathered(value) for key, value in moments.items()}
        return {**state, "state": gathered}

    def _shard_moments(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        sharded = dict(state["state"])
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
            for parameter, number in zip(group["params"], saved["params"], strict=True):
                if isinstance(parameter, DTensor) and number in sharded:
                    sharded[number] = {
                        key: self._sharded_as(parameter, value)
                        for key, value in sharded[number].items()
                    }
        return {**state, "state": sharded}

    def _sharded_as(self, parameter: DTensor, value: Any) -> Any:
        is_full = isinstance(value, Tensor) and not isinstance(value, DTensor)
        if not is_full or value.shape != parameter.shape:
            return value
        experts = next(iter(self.experts.values()))
        return experts.as_distributed(experts.local_part(value))


def _close_experts(
    experts: WeakKeyDictionary[nn.Module, DistributedExperts], model: weakref.ref[nn.Module]
) -> None:
    live = model()
    if live is not None:
        experts.pop(live).close()


def _shard_state(
    experts: DistributedExperts,
    names: tuple[str, ...],
    _module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    *_: Any,
) -> None:
    for name in names:
        value = state.get(prefix + name)
        if isinstance(value, Tensor) and not isinstance(value, DTensor):
            state[prefix + name] = experts.as_distributed(experts.local_part(value))


def _step_one_by_one(optimizer: Optimizer) -> None:
    """Keeps an optimizer from one call for many parameters, which can't hold DTensors and plain
    ones together.
    """
    for group in optimizer.param_groups:
        kinds = {isinstance(parameter, DTensor) for parameter in group["params"]}
        if len(kinds) > 1:
            group.update({name: False for name in ("fused", "foreach") if group.get(name)})


def _check_engine(config: ParallelismConfig, accelerator: Any) -> None:
    here = f"ep_size={config.ep_size} (from {config.source_of('ep_size')})"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
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
            f"{here} with fsdp_cpu_ram_efficient_loading=True: experts are distributed before "
            "FSDP2 loads. Set it to False."
        )
    if plugin is not None and isinstance(plugin.ignored_modules, str):
        raise ConfigError(
            f"{here} with fsdp ignored_modules={plugin.ignored_modules!r}: experts are added to "
            "them. Pass a list of modules."
        )
