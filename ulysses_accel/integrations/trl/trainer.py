"""TRL's trainers on sharded sequences: their own code, unchanged, with models that compute shards
of full batches.

The ranks of a sequence group are replicas to a TRL trainer, as tensor parallel ranks are: they get
the same batches and compute the same losses and metrics. Which ranks are replicas is set here, on
the trainer and its accelerator alone; `trl.forward` does the rest.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from ulysses_accel import _private_api
from ulysses_accel.dataloader.batch_layout import BatchLayout
from ulysses_accel.errors import ConfigError
from ulysses_accel.installation import (
    AcceleratorFeature,
    Installation,
    Override,
    replaced,
    stock_method,
)
from ulysses_accel.integrations.accelerate.loaders import data_parallel_loader
from ulysses_accel.integrations.accelerate.metrics import gather_data_parallel
from ulysses_accel.integrations.accelerate.sequence_feature import SequenceParallel
from ulysses_accel.integrations.accelerate.session import Session
from ulysses_accel.integrations.trl.forward import take_full_batches

_KNOWN = ("SFTTrainer", "DPOTrainer", "KTOTrainer", "RewardTrainer")
# Of a preference batch: numbers of full pairs.
_REPLICATED = ("margin",)


def is_trl(trainer: Any) -> bool:
    """Returns whether a trainer is one of TRL's, or derived from one."""
    return any(cls.__module__.startswith("trl.") for cls in type(trainer).__mro__)


def adapt_trl(
    trainer: Any, session: Session, sequence: SequenceParallel, changes: Installation
) -> TrlTrainer:
    """Makes one TRL trainer train on sharded sequences.

    Args:
        trainer: the instance, which need not have its accelerator or its model yet.
        session: of its accelerator.
        sequence: sequence parallelism of its accelerator.
        changes: of the trainer, which restore it.

    Returns:
        The feature, which the session has now.

    Raises:
        ConfigError: the trainer generates its batches by itself, or is not known, or models were
            prepared before.
    """
    names = [cls.__name__ for cls in type(trainer).__mro__ if cls.__module__.startswith("trl.")]
    config = sequence.config
    sizes = f"sp_size={config.sp_size}, cp_size={config.cp_size}"
    if not any(name in _KNOWN for name in names):
        raise ConfigError(
            f"{names[0]} with {sizes} is not supported: it makes batches by itself, which would "
            "differ between the ranks that share a sequence. Use one of "
            f"{', '.join(_KNOWN)}, or a loop of your own with model(**batch, "
            "return_log_probs=True) and MemoryConfig(tiled_loss=True)."
        )
    if len(sequence.forwards):
        raise ConfigError(
            f"{names[0]} with {sizes} was attached after its accelerator had prepared a model, "
            "which takes shards in place of full batches. Derive it from "
            "ulysses_accel.SequenceParallelTrainerMixin, which attaches in time."
        )
    feature = TrlTrainer(trainer, session, sequence, changes)
    changes.callback(_remove, weakref.ref(session), weakref.ref(feature))
    return feature


def _remove(session: weakref.ref[Session], feature: weakref.ref[TrlTrainer]) -> None:
    live_session, live_feature = session(), feature()
    if live_session is not None and live_feature is not None:
        live_session.remove(live_feature)


class TrlTrainer(AcceleratorFeature):
    """One TRL trainer on sharded sequences, `trainer.sequence_parallel`; inserts itself before the
    features that see shards.

    Args:
        trainer: the instance; it owns this, and is held weakly.
        session: of its accelerator.
        sequence: sequence parallelism of its accelerator.
        changes: of the trainer.
    """

    name = "trl_trainer"
    settings = ()

    def __init__(
        self, trainer: Any, session: Session, sequence: SequenceParallel, changes: Installation
    ) -> None:
        super().__init__(sequence.config, sequence.accelerator, session)
        self.groups = sequence.groups
        self.sequence = sequence
        self._trainer, self._changes = weakref.ref(trainer), changes
        session.insert(self, before=("tensor_parallel", "sequence_parallel"))
        replicas = self.groups.size * self.config.tp_size
        # TRL divides counts by the sizes of all axes whose ranks share a batch, but scales losses
        # by tp's alone.
        methods: dict[str, Callable[..., Any]] = {
            "get_tp_size": partial(int, replicas),
            "get_sp_size": partial(int, 1),
            "get_cp_size": partial(int, 1),
        }
        # These two it sums over all ranks.
        count_tokens = _private_api.TRAINER_COUNT_INPUT_TOKENS
        track = stock_method(trainer, count_tokens)
        operations = stock_method(trainer, "floating_point_ops")
        methods[count_tokens] = partial(self._track, track)
        methods["floating_point_ops"] = lambda inputs: operations(inputs) / replicas
        changes.override(trainer, methods)
        changes.set(trainer, "sequence_parallel", self)

    @property
    def trainer(self) -> Any:
        """The trainer."""
        trainer = self._trainer()
        assert trainer is not None, "only its own methods and its accelerator's lead here"
        return trainer

    def close(self) -> None:
        """Restores the trainer and the models' way to take batches; calling it again does
        nothing.
        """
        self._changes.close()

    def _track(self, stock: Callable[[Any], None], inputs: Any) -> None:
        """Overrides `Trainer._track_num_input_tokens`: each batch is counted once."""
        with replaced(self.accelerator, gather=partial(gather_data_parallel, self.groups)):
            stock(inputs)

    def prepare_model(self, model: nn.Module, checked: None) -> None:
        """Makes a model take full batches."""
        handler = self.config.sp_handler
        length = None if handler.sp_seq_length_is_variable else handler.sp_seq_length
        layout = BatchLayout(
            self.groups.size,
            length,
            pad_multiple=self.config.non_data_parallel_size if self.config.tp_size > 1 else None,
            batch_schema=dict.fromkeys(_REPLICATED, "replicate"),
            ring_size=self.config.cp_size,
            ring_layout=self.config.cp_handler.layout,
        )
        rules = self.sequence.rules_of((model,))
        self.installation.hooks(take_full_batches(model, self.groups, layout, rules))

    def before_engine(self, objects: tuple[Any, ...]) -> None:
        """Prepares the models that TRL calls although its accelerator does not prepare them.

        With DeepSpeed and FSDP2 the reference model, and the policy whose log-probabilities are
        taken before training.
        """
        others = [getattr(self.trainer, "ref_model", None)]
        if getattr(self.trainer, "precompute_ref_logps", False):
            others.append(self.trainer.model)
        for model in others:
            module = getattr(model, "module", model)
            if isinstance(module, nn.Module):
                self.session.apply_features(module, first=self)

    def overrides(self) -> Mapping[str, Override]:
        """Returns what yields full batches, the same on all ranks of a sequence group."""
        return {"prepare_data_loader": self._prepare_data_loader}

    def _prepare_data_loader(
        self, stock: Override, data_loader: Any, device_placement: bool | None = None, **_: Any
    ) -> Any:
        if _private_api.is_prepared(data_loader):
            return stock(data_loader, device_placement)
        accelerator = self.accelerator
        placed = accelerator.device_placement if device_placement is None else device_placement
        loader = data_parallel_loader(accelerator, data_loader, self.groups, put_on_device=placed)
        _private_api.prepared_loaders(accelerator).append(loader)
        return loader
