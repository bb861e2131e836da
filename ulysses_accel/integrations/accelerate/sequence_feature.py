"""Sequence parallelism of one accelerator: models compute shards, loaders yield them, and schedules
and metrics count sequence groups instead of processes.

Every engine averages gradients over all ranks (DDP, FSDP2, and DeepSpeed without an mpu), which is
all that the loss relies on; so accelerate's own code sees no sequence parallelism, and can't scale
or wrap a second time.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from accelerate.state import GradientState
from torch import nn
from torch.distributed import ProcessGroup

from ulysses_accel.attention import SequenceAttention
from ulysses_accel.config.parallelism import ParallelismConfig
from ulysses_accel.distributed.mesh import sequence_groups
from ulysses_accel.errors import ConfigError
from ulysses_accel.forward.sharded import ShardedForward, shard_forward
from ulysses_accel.installation import AcceleratorFeature, FeatureSession, Override
from ulysses_accel.integrations.accelerate.loaders import prepare_loader, register_loader_state
from ulysses_accel.integrations.accelerate.metrics import gather_for_metrics
from ulysses_accel.integrations.accelerate.preflight import check_on_all_ranks
from ulysses_accel.integrations.accelerate.scheduler import (
    sequence_schedulers,
    stretch_dummy_scheduler,
)
from ulysses_accel.integrations.accelerate.stock_view import stock_sees
from ulysses_accel.introspection.profile import ModelProfile, profile_of
from ulysses_accel.introspection.requirements import (
    Requirements,
    common_rules,
    requirements_of,
)
from ulysses_accel.introspection.structure import ModelReading, transformers_model
from ulysses_accel.sequence.batch_rules import BatchRules, RulesSource, resolve_rules


class SequenceParallel(AcceleratorFeature):
    """Sequence parallelism of one accelerator, `accelerator.sequence_parallel`.

    Args:
        config: the accelerator's config.
        accelerator: that is being constructed.
        session: that runs the features.

    Attributes:
        groups: this rank's place in the mesh.
        forwards: what makes each prepared model compute shards.
    """

    name = "sequence_parallel"
    # Ranks of the tp axis divide the sequence further between the linear layers.
    settings = ("sp_size", "cp_size", "tp_size")

    def __init__(
        self, config: ParallelismConfig, accelerator: Any, session: FeatureSession
    ) -> None:
        super().__init__(config, accelerator, session)
        self.groups = sequence_groups(config.get_device_mesh())
        self.forwards: WeakKeyDictionary[nn.Module, ShardedForward] = WeakKeyDictionary()
        self._requirements: WeakKeyDictionary[nn.Module, Requirements] = WeakKeyDictionary()
        self._has_loader_state = False
        # The models of the prepare call that is running, whose loaders make batches for them.
        self._together: tuple[nn.Module, ...] = ()

    @classmethod
    def is_requested(cls, config: ParallelismConfig) -> bool:
        """Returns whether several ranks share each sequence."""
        return config.non_data_parallel_size > 1

    @property
    def group(self) -> ProcessGroup:
        """The ranks that share each sequence, for `gather_sequence`, `pool_sequence` and
        `aggregate_loss`.
        """
        return self.groups.group

    def micro_steps(self) -> int:
        """Returns by how many the engine divides each micro-step's loss; a Trainer divides by
        itself.
        """
        # The accelerator's number, and there after a script has deleted the accelerator.
        return int(GradientState().num_steps)

    def check_model(self, model: nn.Module) -> ModelProfile:
        """Returns the profile of a model that is exact on shards.

        Raises:
            UnsupportedModelError: with what is not exact.
        """
        sizes = []
        for name in ("sp_size", "cp_size", "tp_size"):
            size = getattr(self.config, name)
            if size > 1:
                sizes.append(f"{name}={size} (from {self.config.source_of(name)})")
        profile = profile_of(model, self.config.sp_size)
        check_on_all_ranks(profile, ", ".join(sizes), self.groups.world_group)
        return profile

    def prepare_model(self, model: nn.Module, checked: ModelProfile) -> None:
        """Makes a model compute shards of a sequence."""
        ring, handler = self.config.cp_handler, self.config.sp_handler
        attention = SequenceAttention(
            self.groups.sp_group,
            self.groups.cp_group,
            handler.sp_attn_implementation,
            ring.exchange,
            head_stride=ring.head_stride,
            head_chunks=handler.sp_head_chunks,
        )
        self.forwards[model] = shard_forward(
            model,
            checked,
            attention,
            self.groups.group,
            self.groups.world_group,
            # Not the method itself: a Trainer overrides it later.
            lambda: self.micro_steps(),
        )
        self._requirements[model] = checked.requirements
        self.installation.callback(_close_forward, self.forwards, weakref.ref(model))

    def before_engine(self, objects: tuple[Any, ...]) -> None:
        """Has checkpoints keep each loader's position, and schedules of DeepSpeed their length."""
        for obj in objects:
            stretch_dummy_scheduler(obj, self.groups.size)
        if not self._has_loader_state:
            # The accelerator's hooks do not exist yet while it is constructed.
            self._has_loader_state = True
            self.installation.hooks(register_loader_state(self.accelerator))

    @contextmanager
    def around_engine(self, objects: tuple[Any, ...]) -> Iterator[None]:
        """Lets accelerate see plain data parallelism, and loaders the models prepared with them."""
        self._together = tuple(obj for obj in objects if isinstance(obj, nn.Module))
        try:
            with stock_sees(self.config, self.accelerator, objects):
                yield
        finally:
            self._together = ()

    def after_prepare(self, prepared: tuple[Any, ...]) -> tuple[Any, ...]:
        """Has schedules step once for each batch of an optimizer step."""
        return sequence_schedulers(self.accelerator, prepared, self.groups.data_parallel_size)

    def overrides(self) -> Mapping[str, Override]:
        """Returns the methods that yield, skip and gather batches."""
        return {
            "prepare_data_loader": self._prepare_data_loader,
            "skip_first_batches": self._skip_first_batches,
            "gather_for_metrics": self._gather_for_metrics,
        }

    def _prepare_data_loader(
        self, stock: Override, data_loader: Any, device_placement: bool | None = None, **_: Any
    ) -> Any:
        """Distributes a loader over data parallel ranks, then over the sequence."""
        rules = self.rules_of(self._together)
        return prepare_loader(
            self.accelerator, data_loader, self.config, self.groups, device_placement, rules
        )

    def rules_of(self, models: Sequence[nn.Module]) -> RulesSource:
        """Returns what tells a loader the rules of models, which it does not keep alive."""
        return _RulesOf(self._requirements, tuple(weakref.ref(model) for model in models))

    def batch_rules(self, models: Sequence[nn.Module] = ()) -> BatchRules:
        """Returns what models require of a batch.

        Args:
            models: that a loader was prepared with; all prepared ones where it came alone.

        Raises:
            ConfigError: two of them require different batches.
        """
        return resolve_rules(self.rules_of(models))

    def _skip_first_batches(self, stock: Override, dataloader: Any, num_batches: int = 0) -> Any:
        """Returns a loader that stays sharded."""
        if hasattr(dataloader, "skip_first_batches"):
            return dataloader.skip_first_batches(num_batches)
        return stock(dataloader, num_batches)

    def _gather_for_metrics(
        self, stock: Override, input_data: Any, use_gather_object: bool = False
    ) -> Any:
        """Gathers each sample once, from its data parallel rank."""
        if use_gather_object:
            raise ConfigError(
                "gather_for_metrics(use_gather_object=True) sends pickles. Use "
                "use_gather_object=False."
            )
        return gather_for_metrics(self.accelerator, stock, self.groups, input_data)


def _close_forward(
    forwards: MutableMapping[nn.Module, ShardedForward], model: weakref.ref[nn.Module]
) -> None:
    live = model()
    if live is not None:
        forwards.pop(live).close()


@dataclass(frozen=True)
class _RulesOf:
    """Tells a loader what models require of a batch; they are freed although the loader lives.

    Args:
        prepared: what every prepared model requires that is alive.
        models: that the loader was prepared with; none for all prepared ones.
    """

    prepared: Mapping[nn.Module, Requirements]
    models: tuple[weakref.ref[nn.Module], ...]

    def __call__(self) -> BatchRules:
        """Returns the rules that a batch for all of them follows."""
        if not self.models:
            return common_rules(tuple(self.prepared.values()))
        requirements = []
        for reference in self.models:
            model = reference()
            if model is not None:
                requirements.append(self._requirements_of(model))
        return common_rules(requirements)

    def _requirements_of(self, model: nn.Module) -> Requirements:
        for part in model.modules():
            if part in self.prepared:
                return self.prepared[part]
        return requirements_of(ModelReading(transformers_model(model)))
