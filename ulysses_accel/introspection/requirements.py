"""What a model requires of the batches that are prepared for it, from its structure."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ulysses_accel import _private_api
from ulysses_accel.errors import BatchError, ConfigError
from ulysses_accel.introspection.loss import LossUse, read_loss
from ulysses_accel.introspection.positions import counts_mask, padding_start
from ulysses_accel.introspection.source import attention_calls
from ulysses_accel.introspection.structure import ModelReading, merging_of, transformers_model
from ulysses_accel.sequence.batch_rules import PLAIN_RULES, BatchRules


def batch_rules(reading: ModelReading) -> BatchRules:
    """Returns the rules that one model's batches follow."""
    used = read_loss(reading)
    return BatchRules(
        labels=used.labels if isinstance(used, LossUse) else "next_token",
        counts_mask=counts_mask(reading),
        padding_idx=padding_start(reading),
        decoder_inputs=_decoder_inputs(reading.model) if reading.encoder is not None else None,
        merges=merging_of(reading) is not None,
        is_causal=_is_causal(reading),
    )


def rules_of(model: nn.Module) -> BatchRules:
    """Returns the rules that the batches of a model follow.

    Args:
        model: a transformers model, or a module that holds one.
    """
    return batch_rules(ModelReading(transformers_model(model)))


def _is_causal(reading: ModelReading) -> bool | None:
    """Returns whether all layers of a model of one sequence are causal; None where some are not, or
    have a window.
    """
    layers = [module for module in reading.sharded.values() if attention_calls(module)]
    types = set(getattr(reading.text_config, "layer_types", None) or ())
    has_windows = any(getattr(module, "sliding_window", None) is not None for module in layers)
    if reading.encoder is not None or has_windows or types - {"full_attention", "attention"}:
        return None
    kinds = {bool(getattr(module, "is_causal", True)) for module in layers}
    return kinds.pop() if len(kinds) == 1 else None


@dataclass(frozen=True)
class Requirements:
    """What one model requires of a batch.

    Args:
        name: of the model's class, for messages.
        takes_labels: whether it computes a loss; a model without one takes any labels.
        rules: that its batches follow.
    """

    name: str
    takes_labels: bool
    rules: BatchRules


def requirements_of(reading: ModelReading) -> Requirements:
    """Returns what a model requires of a batch."""
    takes_labels = read_loss(reading) is not None
    return Requirements(type(reading.model).__name__, takes_labels, batch_rules(reading))


def common_rules(models: Sequence[Requirements]) -> BatchRules:
    """Returns the rules that a batch for all of some models follows.

    Args:
        models: what each model requires; prepared together, so that any of them may get a batch.

    Raises:
        ConfigError: two models require different batches.
    """
    if not models:
        return PLAIN_RULES
    # Those without a loss take the labels of the others.
    first, *others = sorted(models, key=lambda model: not model.takes_labels)
    for model in others:
        labels = model.rules.labels if model.takes_labels else first.rules.labels
        same = replace(model.rules, labels=labels)
        if _comparable(same) != _comparable(first.rules):
            raise ConfigError(
                f"{first.name} and {model.name} were prepared by one accelerator, but ask for "
                "different batches: "
                f"{_comparable(first.rules)} and {_comparable(same)} (labels, positions by the "
                "mask, positions' start, decoder, images or audio). Prepare them with an "
                "accelerator each."
            )
    patterns = {model.rules.is_causal for model in models}
    return first.rules if len(patterns) == 1 else replace(first.rules, is_causal=None)


def _comparable(rules: BatchRules) -> tuple[Any, ...]:
    return (
        rules.labels,
        rules.counts_mask,
        rules.padding_idx,
        rules.decoder_inputs is not None,
        rules.merges,
    )


def _decoder_inputs(model: Any) -> Callable[[Tensor], Tensor]:
    """Returns what computes a decoder's tokens from labels, as the model's own forward would; a
    loader that holds it does not keep the model alive.
    """
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return _MethodOfModel(weakref.WeakMethod(model.prepare_decoder_input_ids_from_labels))
    shift = _private_api.global_of(type(model).forward, "shift_tokens_right")
    names = list(inspect.signature(shift).parameters) if shift is not None else []
    if not set(names[1:]) <= {"pad_token_id", "decoder_start_token_id"} or shift is None:
        return _refuse_labels_alone

    config = model.config

    def decoder_inputs(labels: Tensor) -> Tensor:
        shifted: Tensor = shift(labels, *(getattr(config, name) for name in names[1:]))
        return shifted

    return decoder_inputs


@dataclass(frozen=True)
class _MethodOfModel:
    """Calls a model's method as long as the model lives."""

    method: weakref.WeakMethod[Callable[[Tensor], Tensor]]

    def __call__(self, labels: Tensor) -> Tensor:
        bound = self.method()
        if bound is None:
            raise BatchError(
                "the batch has labels and no decoder_input_ids, and the model that computes one "
                "from the other was deleted. Keep the model, or put decoder_input_ids into the "
                "batch."
            )
        return bound(labels)


def _refuse_labels_alone(labels: Tensor) -> Tensor:
    raise BatchError(
        "the batch has labels and no decoder_input_ids, and the model does not say how it computes "
        "one from the other. Put decoder_input_ids into the batch."
    )
