"""What a prepared model asks of the batches that are made for it, found out from its structure."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ulysses_accel import _private_api
from ulysses_accel.errors import BatchError, ConfigError
from ulysses_accel.introspection.loss import LossUse, read_loss
from ulysses_accel.introspection.multimodal import merging_of
from ulysses_accel.introspection.positions import counts_mask, padding_start
from ulysses_accel.introspection.source import attention_calls
from ulysses_accel.introspection.structure import (
    encoder_of,
    sharded_parts,
    text_config,
    transformers_model,
)
from ulysses_accel.sequence.batch_rules import PLAIN_RULES, BatchRules


def rules_of(model: nn.Module) -> BatchRules:
    """Returns the rules of one model.

    Args:
        model: a transformers model, or a module that holds one, that passed `check_model`.
    """
    inner = transformers_model(model)
    used = read_loss(inner)
    return BatchRules(
        labels=used.labels if isinstance(used, LossUse) else "next_token",
        counts_mask=counts_mask(inner),
        padding_idx=padding_start(inner),
        decoder_inputs=_decoder_inputs(inner) if encoder_of(inner) is not None else None,
        merges=merging_of(inner) is not None,
        is_causal=_is_causal(inner),
    )


def _is_causal(model: Any) -> bool | None:
    """Returns whether all layers of a model of one sequence are causal; None where some are not, or
    have a window.
    """
    layers = [module for part, module in sharded_parts(model) if attention_calls(module)]
    kinds = {bool(getattr(module, "is_causal", True)) for module in layers}
    other = set(getattr(text_config(model), "layer_types", None) or ()) - {
        "full_attention",
        "attention",
    }
    windows = other or any(getattr(module, "sliding_window", None) is not None for module in layers)
    return kinds.pop() if len(kinds) == 1 and not windows and encoder_of(model) is None else None


def common_rules(models: Sequence[nn.Module]) -> BatchRules:
    """Returns the rules that a batch for all of some models follows.

    Args:
        models: prepared together, so that any of them may be given a batch.

    Raises:
        ConfigError: two models ask for different batches.
    """
    found = [
        (type(transformers_model(model)).__name__, _takes_labels(model), rules_of(model))
        for model in models
    ]
    if not found:
        return PLAIN_RULES
    # A model without a loss takes any labels.
    found.sort(key=lambda entry: not entry[1])
    first_name, _, first = found[0]
    for name, takes_labels, rules in found[1:]:
        same = rules if takes_labels else replace(rules, labels=first.labels)
        if _comparable(same) != _comparable(first):
            raise ConfigError(
                f"{first_name} and {name} were prepared by one accelerator, but ask for different "
                "batches: "
                f"{_comparable(first)} and {_comparable(same)} (labels, positions by the mask, "
                "positions' start, "
                f"decoder, images or sound). Prepare them with an accelerator each."
            )
    patterns = {rules.is_causal for _, _, rules in found}
    return first if len(patterns) == 1 else replace(first, is_causal=None)


def _comparable(rules: BatchRules) -> tuple[Any, ...]:
    return (
        rules.labels,
        rules.counts_mask,
        rules.padding_idx,
        rules.decoder_inputs is not None,
        rules.merges,
    )


def _takes_labels(model: nn.Module) -> bool:
    return read_loss(transformers_model(model)) is not None


def _decoder_inputs(model: Any) -> Callable[[Tensor], Tensor]:
    """Returns what makes a decoder's tokens of labels, as the model's own forward would."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        prepare: Callable[[Tensor], Tensor] = model.prepare_decoder_input_ids_from_labels
        return prepare
    shift = _private_api.global_of(type(model).forward, "shift_tokens_right")
    names = list(inspect.signature(shift).parameters) if shift is not None else []
    if not set(names[1:]) <= {"pad_token_id", "decoder_start_token_id"} or shift is None:
        return _refuse_labels_alone

    def decoder_inputs(labels: Tensor) -> Tensor:
        shifted: Tensor = shift(labels, *(getattr(model.config, name) for name in names[1:]))
        return shifted

    return decoder_inputs


def _refuse_labels_alone(labels: Tensor) -> Tensor:
    raise BatchError(
        "the batch has labels and no decoder_input_ids, and the model does not say how it makes "
        "one of the other. "
        "Put decoder_input_ids into the batch."
    )
