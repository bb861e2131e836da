"""A stock `transformers.Trainer` on sharded sequences: its counts, losses and predictions are those
of full batches.

The config's attach point runs inside `Accelerator.__init__`, which the Trainer calls; that Trainer
instance gets attributes that override a few of its methods, until `close`. No class is patched. The
Trainer's own code never learns of sequence parallelism: to it a sequence group is one process with
one batch.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch

from ulysses_accel import _private_api
from ulysses_accel.errors import ConfigError
from ulysses_accel.installation import Installation, replaced, stock_method
from ulysses_accel.integrations.accelerate.sequence_feature import SequenceParallel
from ulysses_accel.integrations.accelerate.session import Session
from ulysses_accel.integrations.trainer.evaluation import (
    Evaluation,
    KeepFull,
    ignore_repeated_rows,
    present,
    take_evaluation,
)
from ulysses_accel.integrations.trainer.loss import ShardedLoss, with_local_labels
from ulysses_accel.integrations.trainer.saving import refuse_partial_optimizer, save_full_states
from ulysses_accel.integrations.trl.trainer import TrlTrainer, adapt_trl, is_trl
from ulysses_accel.memory.tiled_loss.model import tiles_loss
from ulysses_accel.sequence.description import DESCRIPTION_KEY
from ulysses_accel.sequence.loss import count_items

_OVERRIDDEN = (
    "get_sp_size",
    "get_cp_size",
    "get_total_train_batch_size",
    "get_train_dataloader",
    "get_eval_dataloader",
    "get_test_dataloader",
    _private_api.TRAINER_COUNT_ITEMS,
    "compute_loss",
    "evaluation_loop",
    "prediction_step",
)


def attach_trainer(trainer: Any) -> ShardedTrainer | TrlTrainer | None:
    """Makes a Trainer count, evaluate, predict and save on sharded sequences.

    A Trainer that builds its accelerator with our config is attached by itself. This is for one
    that got its accelerator otherwise; a subclass may derive from `SequenceParallelTrainerMixin`
    instead.

    Args:
        trainer: a `transformers.Trainer`, or one of a subclass, that has its accelerator.

    Returns:
        What is `trainer.sequence_parallel` then, whose `close()` restores the Trainer; None where
        no sequence is shared between ranks.

    Raises:
        ConfigError: the Trainer's arguments request something that can't be sharded.
    """
    session = getattr(getattr(trainer, "accelerator", None), "ulysses_accel", None)
    if session is None:
        return None
    adapt_trainer(trainer, session)
    return getattr(trainer, "sequence_parallel", None)


class SequenceParallelTrainerMixin:
    """Attaches a Trainer to the accelerator that it builds:
    `class MyTrainer(SequenceParallelTrainerMixin, Trainer)`.
    """

    def create_accelerator_and_postprocess(self) -> None:
        """Builds the accelerator as `Trainer.create_accelerator_and_postprocess`, and attaches."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        attach_trainer(self)


def adapt_trainer(trainer: Any, session: Session) -> None:
    """Adapts a Trainer to the features of its accelerator; one that is adapted already stays so.

    Args:
        trainer: which may be constructing the accelerator just now.
        session: of the accelerator.

    Raises:
        ConfigError: the Trainer's arguments request something that can't be sharded.
    """
    earlier = getattr(trainer, "ulysses_accel", None)
    if earlier is session:
        return
    if earlier is not None:
        # The search for hyperparameters makes a new accelerator for each trial.
        earlier.close_trainer(trainer)
    changes = session.open_trainer(trainer)
    try:
        changes.set(trainer, "ulysses_accel", session)
        if any(feature.holds_parts for feature in session.features):
            refuse_partial_optimizer(trainer.args, session.features[0].config)
            save_full_states(trainer, session, changes)
        for feature in session.features:
            if isinstance(feature, SequenceParallel):
                _adapt_to_sequence(trainer, session, feature, changes)
                break
    except ConfigError:
        session.close_trainer(trainer)
        raise
    changes.callback(_restore_gather_function, weakref.ref(trainer))


def _adapt_to_sequence(
    trainer: Any, session: Session, sequence: SequenceParallel, changes: Installation
) -> None:
    _refuse_noise(trainer.args)
    if is_trl(trainer):
        adapt_trl(trainer, session, sequence, changes)
    else:
        ShardedTrainer(trainer, sequence, changes)


def _restore_gather_function(reference: weakref.ref[Any]) -> None:
    """Gives a Trainer accelerate's own `gather_for_metrics` again, which it stored."""
    trainer = reference()
    if trainer is None or not hasattr(trainer, "gather_function"):
        return
    accelerator, stored = trainer.accelerator, trainer.gather_function
    stock = type(accelerator).gather_for_metrics.__get__(accelerator)
    is_partial = isinstance(stored, functools.partial)
    trainer.gather_function = partial(stock, **stored.keywords) if is_partial else stock


class ShardedTrainer:
    """One Trainer on sharded sequences, `trainer.sequence_parallel`.

    Args:
        trainer: the instance whose methods are overridden; it owns this, and is held weakly.
        sequence: sequence parallelism of its accelerator.
        changes: of the Trainer.
    """

    def __init__(self, trainer: Any, sequence: SequenceParallel, changes: Installation) -> None:
        _refuse_arguments(trainer.args)
        self.sequence = sequence
        self.groups = sequence.groups
        self._trainer = weakref.ref(trainer)
        self._changes = changes
        # Functions that were seen to shift their labels themselves.
        self._shifting: list[Callable[..., Any]] = []
        self._stock = {name: stock_method(trainer, name) for name in _OVERRIDDEN}
        changes.override(trainer, {name: getattr(self, name) for name in _OVERRIDDEN})
        changes.set(trainer, "sequence_parallel", self)
        # transformers 5.23 tells DeepSpeed not to divide the loss, whatever number of micro-steps
        # its config has.
        changes.set(sequence, "micro_steps", lambda: 1)

    @property
    def trainer(self) -> Any:
        """The Trainer."""
        trainer = self._trainer()
        assert trainer is not None, "only its own methods lead here"
        return trainer

    def close(self) -> None:
        """Restores the Trainer's own methods; calling it again does nothing."""
        self._changes.close()

    def get_sp_size(self) -> int:
        """Overrides `Trainer.get_sp_size`: a loader's length and the counted tokens are the full
        batch's.
        """
        return 1

    def get_cp_size(self) -> int:
        """Overrides `Trainer.get_cp_size`."""
        return 1

    def get_total_train_batch_size(self, args: Any) -> int:
        """Overrides `Trainer.get_total_train_batch_size`: samples of one optimizer step."""
        return int(
            _private_api.train_batch_size(self.trainer)
            * args.gradient_accumulation_steps
            * self.groups.data_parallel_size
        )

    def get_train_dataloader(self) -> Any:
        """Overrides `Trainer.get_train_dataloader`."""
        _refuse_arguments(self.trainer.args)
        return self._stock["get_train_dataloader"]()

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Overrides `Trainer.get_eval_dataloader`: batches keep what metrics need in
        full.
        """
        with self._keeping_full_entries():
            return self._stock["get_eval_dataloader"](*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Overrides `Trainer.get_test_dataloader`."""
        with self._keeping_full_entries():
            return self._stock["get_test_dataloader"](*args, **kwargs)

    def _keeping_full_entries(self) -> AbstractContextManager[None]:
        accelerator = self.trainer.accelerator
        prepare = partial(self._prepare_eval_loader, accelerator.prepare_data_loader)
        return replaced(accelerator, prepare_data_loader=prepare)

    def _prepare_eval_loader(
        self, prepare: Callable[..., Any], loader: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not isinstance(loader.collate_fn, KeepFull):
            names = (*self.trainer.label_names, self._main_input)
            loader.collate_fn = KeepFull(loader.collate_fn, names)
        return prepare(loader, *args, **kwargs)

    @property
    def _main_input(self) -> str:
        return getattr(self.trainer.model, "main_input_name", "input_ids")

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Overrides `Trainer._get_num_items_in_batch`: counts the labels of all ranks' shards
        of the step.

        With `average_tokens_across_devices=False` the loss is the mean over data parallel ranks of
        each one's mean over its tokens: a sum over all tokens, each divided by its rank's count
        times the number of such ranks.
        """
        if not batch_samples or not _is_sharded(batch_samples[0]):
            return self._stock[_private_api.TRAINER_COUNT_ITEMS](batch_samples, device)
        trainer = self.trainer
        if not (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None):
            return None
        if any("shift_labels" not in batch and "labels" not in batch for batch in batch_samples):
            return None
        if trainer.args.average_tokens_across_devices:
            return count_items(batch_samples, self.groups.world_group).to(device)
        return (
            count_items(batch_samples, self.groups.group).to(device)
            * self.groups.data_parallel_size
        )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Overrides `Trainer.compute_loss`: the loss is that of the full batch already, so
        nothing multiplies it.
        """
        stock = partial(self._stock["compute_loss"], model, return_outputs=return_outputs)
        if not _is_sharded(inputs):
            return stock(inputs, num_items_in_batch=num_items_in_batch)
        trainer = self.trainer
        with replaced(trainer.args, average_tokens_across_devices=False):
            if trainer.compute_loss_func is None and trainer.label_smoother is None:
                return stock(inputs, num_items_in_batch=num_items_in_batch)
            with replaced(trainer, **self._sharded_losses("shift_labels" in inputs)):
                return stock(with_local_labels(inputs), num_items_in_batch=num_items_in_batch)

    def _sharded_losses(self, next_token: bool) -> dict[str, Any]:
        """Returns overrides of the Trainer's loss function and its label smoother."""
        function, smoother = self.trainer.compute_loss_func, self.trainer.label_smoother
        sharded_loss = partial(
            ShardedLoss,
            group=self.groups.group,
            world_group=self.groups.world_group,
            next_token=next_token,
        )
        losses: dict[str, Any] = {"compute_loss_func": None, "label_smoother": None}
        if function is not None:
            losses["compute_loss_func"] = sharded_loss(function, shifting=self._shifting)
        if smoother is not None:
            smooth = partial(smoother, shift_labels=next_token)
            losses["label_smoother"] = sharded_loss(smooth)
        return losses

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Overrides `Trainer.evaluation_loop`: `preprocess_logits_for_metrics` is called with
        shards.
        """
        if self.trainer.args.eval_use_gather_object:
            raise ConfigError(
                "eval_use_gather_object=True sends predictions as pickles, once for each rank that "
                "shares a sequence. Use eval_use_gather_object=False."
            )
        prepare = self.trainer.preprocess_logits_for_metrics
        step = partial(self.prediction_step, prepare=prepare)
        with replaced(self.trainer, preprocess_logits_for_metrics=None, prediction_step=step):
            return self._stock["evaluation_loop"](*args, **kwargs)

    def prediction_step(
        self,
        model: Any,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        *,
        prepare: Callable[[Any, Any], Any] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Overrides `Trainer.prediction_step`: the forward is sharded, what is returned is in
        token order.

        Args:
            model: as in stock code.
            inputs: as in stock code; its main input becomes the full one.
            prediction_loss_only: as in stock code.
            ignore_keys: as in stock code.
            prepare: the Trainer's `preprocess_logits_for_metrics`, called with this rank's shards.
        """
        full = take_evaluation(inputs)
        if not _is_sharded(inputs):
            return self._stock["prediction_step"](model, inputs, prediction_loss_only, ignore_keys)  # type: ignore[no-any-return]
        ignore_repeated_rows(inputs, self.trainer.accelerator.gradient_state, self.groups)
        batch = present(inputs, self.trainer.label_names)
        if not prediction_loss_only and tiles_loss(model):
            batch["return_logits"] = True
        loss, logits, _ = self._stock["prediction_step"](
            model, batch, prediction_loss_only, ignore_keys
        )
        if prediction_loss_only:
            return loss, None, None
        evaluation = Evaluation(
            full, inputs[DESCRIPTION_KEY], self.groups.group, self._predicts_samples
        )
        logits, labels = evaluation.joined(logits, self.trainer.label_names, prepare)
        inputs[self._main_input] = evaluation.entry(self._main_input)
        logits = _private_api.on_trainers_device(self.trainer, logits)
        return loss, logits, _private_api.on_trainers_device(self.trainer, labels)

    @property
    def _predicts_samples(self) -> bool:
        return bool(self.sequence.batch_rules().labels == "whole")


def _is_sharded(inputs: Any) -> bool:
    return DESCRIPTION_KEY in inputs


def _refuse_noise(args: Any) -> None:
    """Refuses noise whose size follows from the length of the sequence that an embedding sees."""
    if getattr(args, "neftune_noise_alpha", None) is not None:
        raise ConfigError(
            f"neftune_noise_alpha={args.neftune_noise_alpha} adds noise whose size follows from "
            "the number of tokens that a rank has: too large for a shard of a sequence, and the "
            "same on all shards. Use neftune_noise_alpha=None."
        )


def _refuse_arguments(args: Any) -> None:
    """Refuses arguments with which each rank would do something else, or need the full sequence."""
    if getattr(args, "train_sampling_strategy", "random") == "batch_rebalance":
        raise ConfigError(
            "train_sampling_strategy='batch_rebalance' gives each rank other samples, but the "
            "ranks of a sequence group share theirs. Use 'random' or 'group_by_length'."
        )
    if getattr(args, "predict_with_generate", False):
        raise ConfigError(
            "predict_with_generate=True generates from this rank's tokens alone. Use "
            "predict_with_generate=False, and generate with the saved model."
        )
