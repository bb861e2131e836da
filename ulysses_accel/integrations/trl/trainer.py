"""TRL's trainers on sharded sequences: their own code, unchanged, with models that compute shards
of whole batches.

The ranks of a sequence group are replicas to a TRL trainer, as tensor parallel ranks are: they get
the same batches and compute the same losses and metrics. Which ranks are replicas is what is told
here, to the trainer and its accelerator, on these two instances; `trl_forward` does the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ulysses_accel import _private_api
from ulysses_accel.dataloader.batch_layout import BatchLayout
from ulysses_accel.errors import ConfigError
from ulysses_accel.installation import replaced
from ulysses_accel.integrations.accelerate.loaders import data_parallel_loader
from ulysses_accel.integrations.accelerate.metrics import gather_data_parallel
from ulysses_accel.integrations.trl.forward import WholeForward, whole_forward

_WRAPPED = ("prepare", "prepare_model", "prepare_data_loader")
_KNOWN = ("SFTTrainer", "DPOTrainer", "KTOTrainer", "RewardTrainer")
# Of a preference batch: numbers of whole pairs.
_REPLICATED = ("margin",)


def is_trl(trainer: Any) -> bool:
    """Returns whether a trainer is one of TRL's, or derived from one."""
    return any(cls.__module__.startswith("trl.") for cls in type(trainer).__mro__)


def adapt_trl(trainer: Any, attached: Any) -> TrlTrainer:
    """Makes one TRL trainer train on sharded sequences.

    Args:
        trainer: the instance, which need not have its accelerator or its model yet.
        attached: the `Attachment` of its accelerator.

    Returns:
        The adaptation; its `uninstall()` restores the trainer, its accelerator and its models.

    Raises:
        ConfigError: the trainer generates its batches by itself, or is not known.
    """
    names = [cls.__name__ for cls in type(trainer).__mro__ if cls.__module__.startswith("trl.")]
    if not any(name in _KNOWN for name in names):
        config = attached.config
        raise ConfigError(
            f"{names[0]} with sp_size={config.sp_size}, cp_size={config.cp_size} is not supported: "
            "it makes batches by "
            "itself, which would differ between the ranks that share a sequence. Use one of "
            f"{', '.join(_KNOWN)}, or a "
            "loop of your own with model(**batch, return_log_probs=True) and "
            "MemoryConfig(tiled_loss=True)."
        )
    return TrlTrainer(trainer, attached)


class TrlTrainer:
    """One TRL trainer's share in sequence parallelism, and the way to undo it.

    Args:
        trainer: the instance.
        attached: the `Attachment` of its accelerator.
    """

    def __init__(self, trainer: Any, attached: Any) -> None:
        self.trainer, self.attached, self.accelerator = trainer, attached, attached.accelerator
        self.groups = attached.groups
        self.forwards: list[tuple[nn.Module, WholeForward]] = []
        self._below = {name: getattr(self.accelerator, name) for name in _WRAPPED}
        self._replaced = {
            name: vars(self.accelerator)[name]
            for name in _WRAPPED
            if name in vars(self.accelerator)
        }
        for name in _WRAPPED:
            setattr(self.accelerator, name, getattr(self, name))
        replicas = self.groups.size * attached.config.tp_size
        # Stock code divides counts by the sizes of all axes whose ranks share a batch, but scales
        # losses by tp's alone.
        sizes = {"get_tp_size": replicas, "get_sp_size": 1, "get_cp_size": 1}
        self._methods: dict[str, Any] = {name: partial(int, size) for name, size in sizes.items()}
        # These it sums over all ranks.
        count_tokens = _private_api.TRAINER_COUNT_INPUT_TOKENS
        track, operations = getattr(trainer, count_tokens), trainer.floating_point_ops
        self._methods[count_tokens] = partial(self._track, track)
        self._methods["floating_point_ops"] = lambda inputs: operations(inputs) / replicas
        for name, method in self._methods.items():
            setattr(trainer, name, method)
        trainer.sequence_parallel = self

    def uninstall(self) -> None:
        """Restores the trainer, its accelerator's methods, and every model's forward."""
        for _, forward in self.forwards:
            forward.uninstall()
        self.forwards.clear()
        for name in _WRAPPED:
            delattr(self.accelerator, name)
        vars(self.accelerator).update(self._replaced)
        for name in self._methods:
            delattr(self.trainer, name)
        del self.trainer.sequence_parallel

    def _track(self, stock: Callable[[Any], None], inputs: Any) -> None:
        """Stands in for `Trainer._track_num_input_tokens`: each batch is counted once."""
        with replaced(self.accelerator, gather=partial(gather_data_parallel, self.groups)):
            stock(inputs)

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for `Accelerator.prepare`."""
        for model in (arg for arg in args if isinstance(arg, nn.Module)):
            self._take_whole_batches(model)
        self._prepare_others()
        return self._below["prepare"](*args, **kwargs)

    def prepare_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """Stands in for `Accelerator.prepare_model`."""
        self._take_whole_batches(model)
        prepared: nn.Module = self._below["prepare_model"](model, *args, **kwargs)
        return prepared

    def prepare_data_loader(
        self, data_loader: Any, device_placement: bool | None = None, **_: Any
    ) -> Any:
        """Stands in for `Accelerator.prepare_data_loader`: whole batches, the same on all ranks of
        a sequence group.
        """
        if _private_api.is_prepared(data_loader):
            return self._below["prepare_data_loader"](data_loader, device_placement)
        placed = self.accelerator.device_placement if device_placement is None else device_placement
        loader = data_parallel_loader(
            self.accelerator, data_loader, self.groups, put_on_device=placed
        )
        _private_api.prepared_loaders(self.accelerator).append(loader)
        return loader

    def _prepare_others(self) -> None:
        """Prepares the models that TRL calls without the accelerator's having prepared them.

        The reference model of DeepSpeed and FSDP2, and the policy whose log-probabilities are taken
        before training.
        """
        others = [getattr(self.trainer, "ref_model", None)]
        if getattr(self.trainer, "precompute_ref_logps", False):
            others.append(self.trainer.model)
        for model in others:
            module = getattr(model, "module", model)
            if isinstance(module, nn.Module):
                self._take_whole_batches(module)
                self.attached._shard_model(module)

    def _take_whole_batches(self, model: nn.Module) -> None:
        if any(known is model or model in known.modules() for known, _ in self.forwards):
            return
        if _private_api.is_prepared(model):
            return
        config = self.attached.config
        layout = BatchLayout(
            self.groups.size,
            None
            if config.sp_handler.sp_seq_length_is_variable
            else config.sp_handler.sp_seq_length,
            pad_multiple=config.non_data_parallel_size if config.tp_size > 1 else None,
            batch_schema=dict.fromkeys(_REPLICATED, "replicate"),
            ring_size=config.cp_size,
            ring_layout=config.cp_handler.layout,
        )
        forward = whole_forward(
            model, self.groups, layout, lambda: self.attached.batch_rules((model,))
        )
        self.forwards.append((model, forward))
