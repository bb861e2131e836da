"""Finds what in a model can't be computed exactly on a sharded sequence, before anything is
changed.

By structure and configuration values, not by a list of model names. Each finding says what was
found and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ulysses_accel import _private_api
from ulysses_accel.errors import UnsupportedModelError
from ulysses_accel.introspection.findings import Finding
from ulysses_accel.introspection.layers import (
    check_attention,
    check_masks,
    check_neighbours,
    check_statistics,
)
from ulysses_accel.introspection.loss import read_loss
from ulysses_accel.introspection.positions import check_positions
from ulysses_accel.introspection.source import attention_calls
from ulysses_accel.introspection.structure import (
    attending,
    encoder_of,
    sharded_parts,
    source_of,
    text_config,
    transformers_model,
)
from ulysses_accel.introspection.token_selection import check_picks

# The last two work on each token by itself.
_EXACT_LAYERS = {
    "full_attention",
    "attention",
    "sliding_attention",
    "chunked_attention",
    "mlp",
    "moe",
}


def find(inner: Any, sp_size: int) -> list[Finding]:
    """Returns the findings about a transformers model whose heads are dealt over `sp_size`
    ranks.
    """
    checks: tuple[Callable[[Any], Iterator[Finding]], ...] = (
        _routing,
        _loss,
        check_positions,
        _layers,
        check_masks,
        check_attention,
        check_neighbours,
        check_statistics,
        check_picks,
    )
    findings = [finding for check in checks for finding in check(inner)]
    return [*findings, *_heads(text_config(inner), sp_size)]


def check_model(model: nn.Module, sp_size: int, sources: str = "") -> None:
    """Refuses a model that has a part which attention over shards would not compute exactly.

    Args:
        model: a transformers model, or a module that holds one.
        sp_size: ranks that exchange tokens for heads.
        sources: the sizes and where they came from, for the message; `sp_size` alone when empty.

    Raises:
        UnsupportedModelError: with every finding and its remedy.
    """
    inner = transformers_model(model)
    findings = find(inner, sp_size)
    if findings:
        listed = "\n".join(f"- {finding}" for finding in findings)
        raise UnsupportedModelError(
            f"{type(inner).__name__} can't be trained exactly with "
            f"{sources or f'sp_size={sp_size}'}:\n{listed}"
        )


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
    mappings = [getattr(transformers, f"MODEL_FOR_{head}_MAPPING") for head in heads]
    named = [
        getattr(transformers, name, None) for name in getattr(config, "architectures", None) or []
    ]
    listed = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
    classes: list[Any] = [found for found in [*named, *listed] if found is not None]
    if not classes:
        raise UnsupportedModelError(
            f"{type(config).__name__} names no language model that transformers has. Pass the "
            "model itself."
        )
    with torch.device("meta"):
        model: nn.Module = _private_api.model_from_config(classes[0], config)
    return model


def _routing(model: Any) -> Iterator[Finding]:
    parts = [module for _, module in sharded_parts(model)]
    if not _private_api.can_set_attention(model) or not any(map(attention_calls, parts)):
        yield Finding(
            "attention",
            type(model).__name__,
            "its layers do not call attention through transformers' AttentionInterface, so it "
            "can't be replaced.",
            "Use a model that does.",
        )
    if getattr(model.config, "is_encoder_decoder", False) and encoder_of(model) is None:
        yield Finding(
            "attention",
            type(model).__name__,
            "it is an encoder-decoder whose encoder can't be told from its decoder by "
            "get_encoder().",
            "Use a decoder-only model.",
        )
    yield from _bidirectional_decoder(model)
    yield from _prefix_decoder(model)


def _bidirectional_decoder(model: Any) -> Iterator[Finding]:
    """Yields a finding where a decoder's attention to itself can't be told from the one to its
    encoder.
    """
    encoder = encoder_of(model)
    # Of models that are older than sdpa the masks tell, whatever their modules say.
    if encoder is None or not _private_api.supports_sdpa(model):
        return
    inside = set(encoder.modules())
    decoding = [(name, module) for name, module in attending(model) if module not in inside]
    if decoding and not any(getattr(module, "is_causal", True) for _, module in decoding):
        name = decoding[0][0]
        yield Finding(
            "attention",
            name,
            f"its decoder sees its own tokens in both directions ({name}.is_causal=False), as it "
            "sees the encoder's.",
            "Set is_decoder=True in the decoder's configuration.",
        )


def _prefix_decoder(model: Any) -> Iterator[Finding]:
    """Yields a finding where a model always lets the tokens of an image and its prompt see each
    other.
    """
    decoder = model.get_decoder() if text_config(model) is not model.config else None
    if decoder is None or decoder is model:
        return
    layers = [(name, module) for name, module in attending(decoder)]
    around = [part for part in model.modules() if decoder in part.modules() and part is not decoder]
    makes_blocks = any("block_sequence_ids" in source_of(type(part)) for part in around)
    if (
        makes_blocks
        and layers
        and not any(getattr(module, "is_causal", True) for _, module in layers)
    ):
        yield Finding(
            "mask",
            layers[0][0],
            "its decoder lets the tokens of an image and its prompt see each other in both "
            "directions, as the batch's "
            "token_type_ids say, which is not computed on a sharded sequence.",
        )


def _loss(model: Any) -> Iterator[Finding]:
    used = read_loss(model)
    if isinstance(used, list):
        yield from used


def _layers(model: Any) -> Iterator[Finding]:
    types = getattr(text_config(model), "layer_types", None) or ()
    for kind in sorted(set(types) - _EXACT_LAYERS):
        count = sum(1 for layer in types if layer == kind)
        yield Finding(
            "layers",
            "config",
            f"{count} of its {len(types)} layers are {kind}; only full attention, sliding windows "
            "and chunks are "
            f"computed on shards.",
        )


def _heads(config: Any, sp_size: int) -> Iterator[Finding]:
    # The tensors have the last word in the forward; what the config says is only used to refuse
    # early.
    numbers = [value for value in each(config, "num_attention_heads") if isinstance(value, int)]
    if sp_size > min(numbers, default=sp_size):
        yield Finding(
            "heads",
            "sp_size",
            f"sp_size={sp_size} is more than num_attention_heads={min(numbers)}: a rank would have "
            "no head.",
            f"Use sp_size={min(numbers)} at most, and cp_size for the rest.",
        )


def each(config: Any, name: str) -> list[Any]:
    """Returns a config's value; of one whose layers differ in it, which refuses to tell, every
    layer's.
    """
    try:
        return [getattr(config, name, None)]
    except RuntimeError:
        return [getattr(layer, name, None) for layer in config.per_layer_config]
