"""A stock `transformers.Trainer` on sharded sequences: its counts, losses and predictions made
those of whole batches.

The config's attach point runs inside `Accelerator.__init__`, which the Trainer calls; that Trainer
instance gets attributes that stand before a few of its methods. No class is patched, and
`TrainerAttachment.uninstall` deletes them. Stock code never learns of sequence parallelism: for it
a sequence group is one process with one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ulysses_accel import _private_api
from ulysses_accel.errors import ConfigError
from ulysses_accel.installation import replaced
from ulysses_accel.integrations.frames import calling_trainer
from ulysses_accel.integrations.trainer.evaluation import (
    Evaluation,
    KeepWhole,
    ignore_repeated_rows,
    presented,
    take_evaluation,
)
from ulysses_accel.integrations.trainer.loss import ShardedLoss, own_labels
from ulysses_accel.integrations.trl.trainer import TrlTrainer, adapt_trl, is_trl
from ulysses_accel.memory.tiled_loss.model import tiles_loss
from ulysses_accel.sequence.description import DESCRIPTION_KEY
from ulysses_accel.sequence.loss import count_items

_WRAPPED = (
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


def attach_trainer(trainer: Any) -> TrainerAttachment | TrlTrainer | None:
    """Makes a Trainer count, evaluate and predict on sharded sequences; called for every Trainer
    that is given our config as `TrainingArguments(parallelism_config=...)`, so only needed for one
    that got its accelerator otherwise.

    Args:
        trainer: a `transformers.Trainer`, or one of a subclass, that has its accelerator.

    Returns:
        The attachment, whose `uninstall()` restores the Trainer; None where no sequence is shared
        between ranks.

    Raises:
        ConfigError: the Trainer's arguments ask for something that can't be sharded.
    """
    attached = getattr(getattr(trainer, "accelerator", None), "sequence_parallel", None)
    return None if attached is None else _attach(trainer, attached)


def attach_calling_trainer(attached: Any) -> None:
    """Attaches to the Trainer that is constructing an accelerator right now, if one is.

    Args:
        attached: the accelerator's `Attachment`.
    """
    trainer = calling_trainer(attached.accelerator)
    if trainer is not None:
        _attach(trainer, attached)


def _attach(trainer: Any, attached: Any) -> TrainerAttachment | TrlTrainer:
    known = getattr(trainer, "sequence_parallel", None)
    if known is not None and known.attached is attached:
        return known  # type: ignore[no-any-return]
    if known is not None:
        # The search for hyperparameters makes a new accelerator for each trial.
        known.uninstall()
    _refuse_noise(trainer.args)
    return adapt_trl(trainer, attached) if is_trl(trainer) else TrainerAttachment(trainer, attached)


class TrainerAttachment:
    """One Trainer's share in sequence parallelism, and the way to undo it.

    Args:
        trainer: the instance whose methods are wrapped.
        attached: its accelerator's `Attachment`.
    """

    def __init__(self, trainer: Any, attached: Any) -> None:
        _refuse_arguments(trainer.args)
        self.trainer = trainer
        self.attached = attached
        self.groups = attached.groups
        # Functions that were seen to shift their labels themselves.
        self._shifting: list[Callable[..., Any]] = []
        self._stock = {name: getattr(trainer, name) for name in _WRAPPED}
        for name in _WRAPPED:
            setattr(trainer, name, getattr(self, name))
        trainer.sequence_parallel = self
        # Stock code tells DeepSpeed not to divide the loss, whatever number of micro-steps its
        # config has.
        attached.micro_steps = lambda: 1

    def uninstall(self) -> None:
        """Restores the Trainer's own methods."""
        for name in _WRAPPED:
            delattr(self.trainer, name)
        del self.trainer.sequence_parallel
        del self.attached.micro_steps

    def get_sp_size(self) -> int:
        """Stands in for `Trainer.get_sp_size`: a loader's length and the counted tokens are the
        whole batch's.
        """
        return 1

    def get_cp_size(self) -> int:
        """Stands in for `Trainer.get_cp_size`."""
        return 1

    def get_total_train_batch_size(self, args: Any) -> int:
        """Stands in for `Trainer.get_total_train_batch_size`: samples of one optimizer step."""
        return int(
            _private_api.train_batch_size(self.trainer)
            * args.gradient_accumulation_steps
            * self.groups.data_parallel_size
        )

    def get_train_dataloader(self) -> Any:
        """Stands in for `Trainer.get_train_dataloader`."""
        _refuse_arguments(self.trainer.args)
        return self._stock["get_train_dataloader"]()

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for `Trainer.get_eval_dataloader`: batches keep what metrics need of the
        whole.
        """
        with replaced(self.trainer.accelerator, prepare_data_loader=self._prepare_eval_loader):
            return self._stock["get_eval_dataloader"](*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for `Trainer.get_test_dataloader`."""
        with replaced(self.trainer.accelerator, prepare_data_loader=self._prepare_eval_loader):
            return self._stock["get_test_dataloader"](*args, **kwargs)

    def _prepare_eval_loader(self, loader: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(loader.collate_fn, KeepWhole):
            names = (*self.trainer.label_names, self._main_input)
            loader.collate_fn = KeepWhole(loader.collate_fn, names)
        return self.attached.prepare_data_loader(loader, *args, **kwargs)

    @property
    def _main_input(self) -> str:
        return getattr(self.trainer.model, "main_input_name", "input_ids")

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Stands in for `Trainer._get_num_items_in_batch`: counts the labels of all ranks' parts of
        the step.

        With `average_tokens_across_devices=False` the loss is the mean over data parallel ranks of
        each one's mean over its tokens; that is a sum over all tokens, each divided by its rank's
        count times the number of such ranks.
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
        """Stands in for `Trainer.compute_loss`: the loss is the whole batch's already, so nothing
        multiplies it.
        """
        stock = partial(self._stock["compute_loss"], model, return_outputs=return_outputs)
        if not _is_sharded(inputs):
            return stock(inputs, num_items_in_batch=num_items_in_batch)
        trainer = self.trainer
        with replaced(trainer.args, average_tokens_across_devices=False):
            if trainer.compute_loss_func is None and trainer.label_smoother is None:
                return stock(inputs, num_items_in_batch=num_items_in_batch)
            with replaced(trainer, **self._sharded_losses("shift_labels" in inputs)):
                return stock(own_labels(inputs), num_items_in_batch=num_items_in_batch)

    def _sharded_losses(self, next_token: bool) -> dict[str, Any]:
        """Returns what stands in for the Trainer's loss function and its label smoother."""
        function, smoother = self.trainer.compute_loss_func, self.trainer.label_smoother
        made = partial(
            ShardedLoss,
            group=self.groups.group,
            world_group=self.groups.world_group,
            next_token=next_token,
        )
        return {
            "compute_loss_func": None
            if function is None
            else made(function, shifting=self._shifting),
            "label_smoother": None
            if smoother is None
            else made(partial(smoother, shift_labels=next_token)),
        }

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for `Trainer.evaluation_loop`: what prepares logits for metrics is called on
        shards before.
        """
        if self.trainer.args.eval_use_gather_object:
            raise ConfigError(
                "eval_use_gather_object=True sends predictions as pickles, once for each rank that "
                "shares a sequence. "
                "Use eval_use_gather_object=False."
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
        """Stands in for `Trainer.prediction_step`: the forward is sharded, what is returned is in
        token order.

        Args:
            model: as in stock code.
            inputs: as in stock code; the main input is made whole in it.
            prediction_loss_only: as in stock code.
            ignore_keys: as in stock code.
            prepare: the Trainer's `preprocess_logits_for_metrics`, called with this rank's shards.
        """
        whole = take_evaluation(inputs)
        if not _is_sharded(inputs):
            return self._stock["prediction_step"](model, inputs, prediction_loss_only, ignore_keys)  # type: ignore[no-any-return]
        ignore_repeated_rows(inputs, self.trainer.accelerator.gradient_state, self.groups)
        given = presented(inputs, self.trainer.label_names)
        if not prediction_loss_only and tiles_loss(model):
            given["return_logits"] = True
        loss, logits, _ = self._stock["prediction_step"](
            model, given, prediction_loss_only, ignore_keys
        )
        if prediction_loss_only:
            return loss, None, None
        evaluation = Evaluation(
            whole, inputs[DESCRIPTION_KEY], self.groups.group, self._predicts_samples
        )
        logits, labels = evaluation.joined(logits, self.trainer.label_names, prepare)
        inputs[self._main_input] = evaluation.entry(self._main_input)
        logits = _private_api.on_trainers_device(self.trainer, logits)
        return loss, logits, _private_api.on_trainers_device(self.trainer, labels)

    @property
    def _predicts_samples(self) -> bool:
        return bool(self.attached.batch_rules().labels == "whole")


def _is_sharded(inputs: Any) -> bool:
    return DESCRIPTION_KEY in inputs


def _refuse_noise(args: Any) -> None:
    """Refuses noise whose size follows from the length of the sequence that an embedding sees."""
    if getattr(args, "neftune_noise_alpha", None) is not None:
        raise ConfigError(
            f"neftune_noise_alpha={args.neftune_noise_alpha} makes noise by the number of tokens "
            "that a rank has, "
            "which is too large for a part of a sequence, and the same on all parts. Use "
            "neftune_noise_alpha=None."
        )


def _refuse_arguments(args: Any) -> None:
    """Refuses arguments with which each rank would do something else, or the whole sequence at
    once.
    """
    if getattr(args, "train_sampling_strategy", "random") == "batch_rebalance":
        raise ConfigError(
            "train_sampling_strategy='batch_rebalance' deals other samples to each rank, but the "
            "ranks of a sequence "
            "group share theirs. Use 'random' or 'group_by_length'."
        )
    if getattr(args, "predict_with_generate", False):
        raise ConfigError(
            "predict_with_generate=True generates from this rank's tokens alone. Use "
            "predict_with_generate=False, and "
            "generate with the saved model."
        )
