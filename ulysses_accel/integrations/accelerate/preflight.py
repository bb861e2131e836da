"""What a model would be refused for, without preparing it: every technique's own check, which
`prepare` makes too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from ulysses_accel import _private_api
from ulysses_accel.config.parallelism import ParallelismConfig
from ulysses_accel.distributed.consensus import agree, gather_ints
from ulysses_accel.errors import ConfigError, UnsupportedModelError
from ulysses_accel.introspection.findings import Finding, FindingKind
from ulysses_accel.introspection.profile import ModelProfile, profile_of
from ulysses_accel.introspection.structure import transformers_model
from ulysses_accel.memory.apply import check_memory
from ulysses_accel.tensor_parallel.parallelize import check_cut, check_parameters


def supports(model: Any, config: ParallelismConfig) -> list[Finding]:
    """Returns what would keep a model from being trained exactly with a config; nothing for an
    exact one.

    Args:
        model: a transformers model, a module that holds one, or a transformers config, whose model
            is built without weights.
        config: the sizes, and what saves memory.
    """
    shares = config.non_data_parallel_size * config.ep_size > 1
    if not shares and config.memory_config is None:
        return []
    try:
        module = model if isinstance(model, nn.Module) else without_weights(model)
        inner = transformers_model(module)
    except UnsupportedModelError as error:
        return [Finding("attention", type(model).__name__, str(error), "")]
    findings: list[Finding] = []
    if config.non_data_parallel_size > 1:
        findings += profile_of(module, config.sp_size).findings
    if config.tp_size > 1:
        findings += _refusal("layers", "tp_size", lambda: check_cut(inner, config))
        if isinstance(model, nn.Module):
            tp_size = config.tp_size
            findings += _refusal("layers", "tp_size", lambda: check_parameters(inner, tp_size))
    findings += _feature_findings(module, config)
    memory = config.memory_config
    if memory is not None:
        for check in check_memory(module, memory):
            findings += _refusal("memory", "memory_config", check)
    return findings


def _feature_findings(model: nn.Module, config: ParallelismConfig) -> Iterator[Finding]:
    # Here, because features import this file.
    from ulysses_accel.integrations.attach import FEATURES

    for feature in FEATURES:
        if feature.is_requested(config):
            for check in feature.model_checks(model, config):
                yield from _refusal("layers", feature.settings[0], check)


def _refusal(kind: FindingKind, where: str, check: Callable[[], object]) -> Iterator[Finding]:
    try:
        check()
    except (ConfigError, UnsupportedModelError) as error:
        yield Finding(kind, where, str(error), "")


def check_on_all_ranks(profile: ModelProfile, sources: str, group: ProcessGroup | None) -> None:
    """Refuses a model with findings, on every rank if on any.

    Args:
        profile: of the model.
        sources: the sizes and where they came from, for the message.
        group: all ranks that prepare it.

    Raises:
        UnsupportedModelError: with every finding and its remedy.
        RankDisagreementError: only other ranks have findings.
    """
    refusal = None
    try:
        profile.check(sources)
    except UnsupportedModelError as error:
        refusal = error
    if profile.needs_agreement:
        refused = gather_ints([int(refusal is not None)], group)
        if not all(values == refused[0] for values in refused):
            agree(refusal, group)
    if refusal is not None:
        raise refusal


def without_weights(config: Any) -> nn.Module:
    """Returns the model of a transformers config, of the class that it names or else its language
    model's.

    Args:
        config: a transformers config.

    Raises:
        UnsupportedModelError: it names no language model.
    """
    import transformers

    heads = (
        "CAUSAL_LM",
        "SEQ_TO_SEQ_CAUSAL_LM",
        "MASKED_LM",
        "IMAGE_TEXT_TO_TEXT",
        "SPEECH_SEQ_2_SEQ",
    )
    classes: list[Any] = []
    for name in getattr(config, "architectures", None) or []:
        classes.append(getattr(transformers, name, None))
    for head in heads:
        mapping = getattr(transformers, f"MODEL_FOR_{head}_MAPPING")
        if type(config) in mapping:
            classes.append(mapping[type(config)])
    known = [cls for cls in classes if cls is not None]
    if not known:
        raise UnsupportedModelError(
            f"{type(config).__name__} names no language model that transformers has. Pass the "
            "model itself."
        )
    with torch.device("meta"):
        model: nn.Module = _private_api.model_from_config(known[0], config)
    return model
