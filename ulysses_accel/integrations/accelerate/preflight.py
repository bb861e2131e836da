"""What a model would be refused for, without preparing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ulysses_accel.config.parallelism import ParallelismConfig
from ulysses_accel.errors import ConfigError, UnsupportedModelError
from ulysses_accel.expert_parallel.dispatch import check_experts
from ulysses_accel.introspection.findings import Finding
from ulysses_accel.introspection.structure import transformers_model
from ulysses_accel.introspection.supports import find, without_weights
from ulysses_accel.tensor_parallel.parallelize import check_cut


def supports(model: Any, config: ParallelismConfig) -> list[Finding]:
    """Returns what would keep a model from being trained exactly with a config; nothing for an
    exact one.

    Args:
        model: a transformers model, a module that holds one, or a transformers config, whose model
            is built without weights.
        config: the sizes.
    """
    if config.non_data_parallel_size * config.ep_size == 1:
        return []
    try:
        inner = transformers_model(
            model if isinstance(model, nn.Module) else without_weights(model)
        )
    except UnsupportedModelError as error:
        return [Finding("attention", type(model).__name__, str(error), "")]
    findings = find(inner, config.sp_size) if config.non_data_parallel_size > 1 else []
    if config.tp_size > 1:
        findings += _refusal("tp_size", lambda: check_cut(inner, config))
    if config.ep_size > 1:
        findings += _refusal("ep_size", lambda: check_experts(inner, config.ep_size))
    return findings


def _refusal(where: str, check: Callable[[], object]) -> Iterator[Finding]:
    try:
        check()
    except (ConfigError, UnsupportedModelError) as error:
        yield Finding("layers", where, str(error), "")
