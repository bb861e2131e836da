"""The attach point: makes one stock `accelerate.Accelerator` train on sharded sequences.

`Accelerator.__init__` hands itself to our `ParallelismConfig`; from then on that instance's
`prepare`, data loaders and schedulers know about sequence groups. No class and no module is
patched, and `Attachment.uninstall` restores all. Every engine averages gradients over all ranks
(DDP, FSDP2, and DeepSpeed without an mpu), which is all that the loss relies on; so stock code sees
no sequence parallelism, and can't scale or wrap a second time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.utils.data import DataLoader

from ulysses_accel import _private_api
from ulysses_accel.attention import SequenceAttention
from ulysses_accel.config.parallelism import ParallelismConfig
from ulysses_accel.distributed.mesh import SequenceGroups
from ulysses_accel.errors import ConfigError
from ulysses_accel.forward.sharded import ShardedForward, shard_forward
from ulysses_accel.integrations.accelerate.loaders import prepare_loader, register_loader_state
from ulysses_accel.integrations.accelerate.metrics import gather_for_metrics
from ulysses_accel.integrations.accelerate.preflight import check_on_all_ranks
from ulysses_accel.integrations.accelerate.scheduler import (
    sequence_schedulers,
    stretch_dummy_scheduler,
)
from ulysses_accel.integrations.frames import calling_trainer
from ulysses_accel.integrations.trainer.saving import WholeSaves, whole_saves
from ulysses_accel.introspection.profile import ModelProfile, profile_of
from ulysses_accel.introspection.requirements import common_rules
from ulysses_accel.sequence.batch_rules import BatchRules
from ulysses_accel.tensor_parallel.parallelize import TensorParallel, fully_sharded

_WRAPPED = (
    "prepare",
    "prepare_model",
    "prepare_optimizer",
    "prepare_data_loader",
    "prepare_scheduler",
    "skip_first_batches",
    "gather_for_metrics",
)


class Attachment:
    """One accelerator's share in sequence parallelism, and the way to undo it.

    Args:
        config: the accelerator's config.
        accelerator: the instance whose methods are wrapped.
        groups: this rank's place in the mesh.
    """

    def __init__(self, config: ParallelismConfig, accelerator: Any, groups: SequenceGroups) -> None:
        self.config = config
        self.accelerator = accelerator
        self.groups = groups
        self.tensor_parallel: TensorParallel | None = None
        self.saves: WholeSaves | None = None
        if config.tp_size > 1:
            self.tensor_parallel = TensorParallel(config, groups.mesh, accelerator)
            self.saves = whole_saves(calling_trainer(accelerator), accelerator, config)
        self.forwards: list[tuple[nn.Module, ShardedForward]] = []
        # The models of the prepare call that is running, whose loaders make batches for them.
        self._together: tuple[nn.Module, ...] = ()
        self._stock = {name: getattr(accelerator, name) for name in _WRAPPED}
        for name in _WRAPPED:
            setattr(accelerator, name, getattr(self, name))
        accelerator.sequence_parallel = self

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
        return int(self.accelerator.gradient_accumulation_steps)

    def uninstall(self) -> None:
        """Restores the accelerator's own methods and every model that was prepared.

        What was put on top of this goes first. Experts that are dealt to ranks are gathered: every
        rank must call it.
        """
        for above in ("memory", "expert_parallel"):
            if above in vars(self.accelerator):
                getattr(self.accelerator, above).uninstall()
        for _, forward in self.forwards:
            forward.uninstall()
        self.forwards.clear()
        if self.tensor_parallel is not None:
            self.tensor_parallel.uninstall()
        if self.saves is not None:
            self.saves.uninstall()
        for name in _WRAPPED:
            delattr(self.accelerator, name)
        del self.accelerator.sequence_parallel

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """Stands in for `Accelerator.prepare`: models, optimizers, loaders, schedulers, in any
        order and any calls.
        """
        for obj in args:
            if isinstance(obj, nn.Module):
                self._shard_model(obj)
            stretch_dummy_scheduler(obj, self.groups.size)
        if self.tensor_parallel is not None:
            self.tensor_parallel.update(args)
        register_loader_state(self.accelerator)
        self._together = tuple(obj for obj in args if isinstance(obj, nn.Module))
        try:
            with self._as_data_parallel(bool(any(isinstance(obj, DataLoader) for obj in args))):
                result = self._stock["prepare"](*args, device_placement=device_placement)
        finally:
            self._together = ()
        self._update_optimizers()
        if len(args) > 1:
            return sequence_schedulers(
                self.accelerator, tuple(result), self.groups.data_parallel_size
            )
        return sequence_schedulers(self.accelerator, (result,), self.groups.data_parallel_size)[0]

    def prepare_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """Stands in for `Accelerator.prepare_model`."""
        self._shard_model(model)
        with self._as_data_parallel(True):
            if self.tensor_parallel is not None:
                return self.tensor_parallel.prepare_model(
                    self._stock["prepare_model"], model, *args, **kwargs
                )
            prepared: nn.Module = self._stock["prepare_model"](model, *args, **kwargs)
        return prepared

    def prepare_optimizer(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """Stands in for `Accelerator.prepare_optimizer`."""
        prepared = self._stock["prepare_optimizer"](optimizer, *args, **kwargs)
        self._update_optimizers()
        return prepared

    def _update_optimizers(self) -> None:
        """Gives optimizers, prepared before or behind their models, the parameters that cut or
        replicated ones have.
        """
        if self.tensor_parallel is not None:
            self.tensor_parallel.update(_private_api.prepared_optimizers(self.accelerator))

    def prepare_data_loader(
        self, data_loader: Any, device_placement: bool | None = None, **_: Any
    ) -> Any:
        """Stands in for `Accelerator.prepare_data_loader`: sharded over data parallel ranks, then
        over the sequence.
        """
        rules = partial(self.batch_rules, self._together)
        return prepare_loader(
            self.accelerator, data_loader, self.config, self.groups, device_placement, rules
        )

    def batch_rules(self, models: Sequence[nn.Module] = ()) -> BatchRules:
        """Returns what models ask of a batch.

        Args:
            models: that a loader was prepared with; all prepared ones when it came alone.

        Raises:
            ConfigError: two of them ask for different batches.
        """
        asked = models or [model for model, _ in self.forwards]
        return common_rules([self._profile(model).requirements for model in asked])

    def _profile(self, model: nn.Module) -> ModelProfile:
        """Returns the profile of a prepared model, or of one that is wrapped around it."""
        for known, forward in self.forwards:
            if known is model or any(part is known for part in model.modules()):
                return forward.profile
        return profile_of(model)

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """Stands in for `Accelerator.prepare_scheduler`: steps once for each batch of the optimizer
        step.
        """
        prepared = self._stock["prepare_scheduler"](scheduler)
        return sequence_schedulers(self.accelerator, (prepared,), self.groups.data_parallel_size)[0]

    def skip_first_batches(self, dataloader: Any, num_batches: int = 0) -> Any:
        """Stands in for `Accelerator.skip_first_batches`; the loader that it returns stays
        sharded.
        """
        if hasattr(dataloader, "skip_first_batches"):
            return dataloader.skip_first_batches(num_batches)
        return self._stock["skip_first_batches"](dataloader, num_batches)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """Stands in for `Accelerator.gather_for_metrics`: each sample comes once, from its data
        parallel rank.
        """
        if use_gather_object:
            raise ConfigError(
                "gather_for_metrics(use_gather_object=True) sends pickles. Use "
                "use_gather_object=False."
            )
        return gather_for_metrics(
            self.accelerator, self._stock["gather_for_metrics"], self.groups, input_data
        )

    def _shard_model(self, model: nn.Module) -> None:
        """Installs the sharded forward into a model, once."""
        if any(known is model or model in known.modules() for known, _ in self.forwards):
            return
        if _private_api.is_prepared(model):
            return
        ring, handler = self.config.cp_handler, self.config.sp_handler
        core = handler.sp_attn_implementation
        sizes = ((name, getattr(self.config, name)) for name in ("sp_size", "cp_size", "tp_size"))
        sources = ", ".join(
            f"{name}={size} (from {self.config.source_of(name)})"
            for name, size in sizes
            if size > 1
        )
        profile = profile_of(model, self.config.sp_size)
        check_on_all_ranks(profile, sources, dist.group.WORLD)
        if self.tensor_parallel is not None:
            self.tensor_parallel.distribute(model)
        attention = SequenceAttention(
            self.groups.sp_group,
            self.groups.cp_group,
            core,
            ring.exchange,
            head_stride=ring.head_stride,
            head_chunks=handler.sp_head_chunks,
        )
        forward = shard_forward(
            model,
            profile,
            attention,
            self.groups.group,
            self.groups.world_group,
            lambda: self.micro_steps(),
        )
        self.forwards.append((model, forward))

    @contextmanager
    def _as_data_parallel(self, has_loader: bool) -> Iterator[None]:
        """Lets stock code see plain data parallelism over all ranks while it wraps the model.

        FSDP2 keeps the config, from which it takes the axes that parameters shard over.
        """
        state = self.accelerator.state
        plugin = (
            getattr(self.accelerator, "deepspeed_plugin", None)
            if _is_deepspeed(self.accelerator)
            else None
        )
        if (
            plugin is not None
            and not has_loader
            and plugin.is_auto("train_micro_batch_size_per_gpu")
        ):
            # Stock code refuses a model without its loader; the number only serves DeepSpeed's own
            # log lines.
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
        if self.accelerator.is_fsdp2:
            with fully_sharded(self.config, self.accelerator):
                yield
            return
        config, state.parallelism_config = state.parallelism_config, None
        try:
            yield
        finally:
            state.parallelism_config = config


def _is_deepspeed(accelerator: Any) -> bool:
    return str(accelerator.distributed_type).endswith("DEEPSPEED")
