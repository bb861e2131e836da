"""Whether attention reaches transformers' AttentionInterface in a form that shards compute: routed,
of known layer types, with heads for every rank, and no virtual tokens of adapters.

By structure and configuration values, not by a list of model names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ulysses_accel import _private_api
from ulysses_accel.introspection.findings import Finding
from ulysses_accel.introspection.source import attention_calls
from ulysses_accel.introspection.structure import ModelReading, attending, source_of

# The last two work on each token by itself.
_EXACT_LAYERS = {
    "full_attention",
    "attention",
    "sliding_attention",
    "chunked_attention",
    "mlp",
    "moe",
}


def check_routing(reading: ModelReading) -> Iterator[Finding]:
    """Yields attention that does not reach transformers' interface, or not as a known kind."""
    model = reading.model
    routes = any(map(attention_calls, reading.sharded.values()))
    if not _private_api.can_set_attention(model) or not routes:
        yield Finding(
            "attention",
            type(model).__name__,
            "its layers do not call attention through transformers' AttentionInterface, so it "
            "can't be replaced.",
            "Use a model that does.",
        )
    if getattr(model.config, "is_encoder_decoder", False) and reading.encoder is None:
        yield Finding(
            "attention",
            type(model).__name__,
            "it is an encoder-decoder whose encoder can't be told from its decoder by "
            "get_encoder().",
            "Use a decoder-only model.",
        )
    yield from _bidirectional_decoder(reading)
    yield from _prefix_decoder(reading)


def _bidirectional_decoder(reading: ModelReading) -> Iterator[Finding]:
    """Yields a finding where a decoder's attention to itself can't be told from the one to its
    encoder.
    """
    # In models that are older than sdpa the masks decide, whatever their modules say.
    if reading.encoder is None or not _private_api.supports_sdpa(reading.model):
        return
    decoding = {
        name: module
        for name, module in reading.attending.items()
        if module not in reading.encoder_modules
    }
    if decoding and not any(getattr(module, "is_causal", True) for module in decoding.values()):
        name = next(iter(decoding))
        yield Finding(
            "attention",
            name,
            f"its decoder sees its own tokens in both directions ({name}.is_causal=False), as it "
            "sees the encoder's.",
            "Set is_decoder=True in the decoder's configuration.",
        )


def _prefix_decoder(reading: ModelReading) -> Iterator[Finding]:
    """Yields a finding where a model always lets the tokens of an image and its prompt see each
    other.
    """
    if reading.text_decoder is None:
        return
    layers = list(attending(reading.text_decoder))
    sources = [source_of(type(part)) for part in reading.around_decoder]
    has_blocks = any("block_sequence_ids" in source for source in sources)
    is_causal = any(getattr(module, "is_causal", True) for _, module in layers)
    if has_blocks and layers and not is_causal:
        yield Finding(
            "mask",
            layers[0][0],
            "its decoder lets the tokens of an image and its prompt see each other in both "
            "directions, as the batch's "
            "token_type_ids say, which is not computed on a sharded sequence.",
        )


def check_layer_types(reading: ModelReading) -> Iterator[Finding]:
    """Yields types of layers that are computed otherwise than by attention over shards."""
    types = getattr(reading.text_config, "layer_types", None) or ()
    for kind in sorted(set(types) - _EXACT_LAYERS):
        count = sum(1 for layer in types if layer == kind)
        yield Finding(
            "layers",
            "config",
            f"{count} of its {len(types)} layers are {kind}; only full attention, sliding windows "
            "and chunks are "
            f"computed on shards.",
        )


def check_heads(config: Any, sp_size: int) -> Iterator[Finding]:
    """Yields that a rank would have no head, where heads are distributed over `sp_size` ranks."""
    # The tensors have the last word in the forward; what the config says is only used to refuse
    # early.
    numbers = [value for value in _values(config, "num_attention_heads") if isinstance(value, int)]
    if sp_size > min(numbers, default=sp_size):
        yield Finding(
            "heads",
            "sp_size",
            f"sp_size={sp_size} is more than num_attention_heads={min(numbers)}: a rank would have "
            "no head.",
            f"Use sp_size={min(numbers)} at most, and cp_size for the rest.",
        )


def _values(config: Any, name: str) -> list[Any]:
    """Returns a config's value; every layer's where they differ, as transformers 5 then raises."""
    try:
        return [getattr(config, name, None)]
    except RuntimeError:
        return [getattr(layer, name, None) for layer in config.per_layer_config]


def check_adapters(model: nn.Module) -> Iterator[Finding]:
    """Yields adapters that put virtual tokens before a batch: every rank would put them before its
    shard.

    Args:
        model: any model, possibly with adapters.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    kinds = []
    for config in configs.values():
        if getattr(config, "is_prompt_learning", False):
            kinds.append(str(getattr(config.peft_type, "value", config.peft_type)))
    if kinds:
        yield Finding(
            "adapters",
            "forward",
            f"{type(model).__name__} has an adapter of the kind {', '.join(kinds)}, which puts "
            "virtual tokens before its input: each rank would put them before its own shard of the "
            "sequence.",
            "Use LoRA, or sp_size=1 and cp_size=1.",
        )
