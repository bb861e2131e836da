"""The parts of a transformers model that sequence parallelism tells apart: its encoder, what
attends in it, what sees sharded tokens, and where images or audio are merged into them.

`ModelReading` holds them, found in one pass; everything else that is asked about a model is a
function of it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, wraps
from typing import Any, TypeVar

from torch import nn

from ulysses_accel import _private_api
from ulysses_accel.dataloader.keys import MERGED_KEYS
from ulysses_accel.errors import UnsupportedModelError
from ulysses_accel.introspection.source import attention_calls, forward_of, parameters

T = TypeVar("T")


def transformers_model(model: nn.Module) -> Any:
    """Returns the transformers model inside of `model` (itself, or wrapped by an adapter library).

    Raises:
        UnsupportedModelError: there is none.
    """
    for module in model.modules():
        # Of the class: adapter libraries' models hand on every attribute of the one inside of them.
        if _private_api.has_attention_setting(
            getattr(module, "config", None)
        ) and _private_api.is_transformers_model(type(module)):
            return module
    raise UnsupportedModelError(
        f"{type(model).__name__} holds no transformers model, so its attention can't be sharded "
        "over the sequence. "
        "Call ulysses_accel.ulysses_attention in its attention layers, or use sp_size=1 and "
        "cp_size=1."
    )


class ModelReading:
    """A transformers model and the parts of it that are told apart, each read once.

    It is of the model as it is while it is read: make a new one after modules were changed.

    Args:
        model: a transformers model, or a part of one.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.results: dict[Callable[..., Any], Any] = {}

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """All modules by their names, the model itself as ""."""
        return dict(self.model.named_modules())

    @cached_property
    def forward(self) -> ast.FunctionDef | None:
        """The syntax of the model's forward, None where its source can't be had."""
        return forward_of(self.model)

    @cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The parameters of the model's forward by their names."""
        return parameters(self.model)

    @cached_property
    def attending(self) -> dict[str, nn.Module]:
        """The modules that call transformers' attention functions."""
        return dict(attending(self.model))

    @cached_property
    def encoder(self) -> nn.Module | None:
        """The encoder of an encoder-decoder; None where there is none, or it can't be told."""
        return encoder_of(self.model)

    @cached_property
    def encoder_modules(self) -> frozenset[nn.Module]:
        """All modules of the encoder; empty where there is none."""
        return frozenset() if self.encoder is None else frozenset(self.encoder.modules())

    @property
    def is_encoder_sharded(self) -> bool:
        """Whether an encoder reads tokens, which are sharded; audio and images are full on every
        rank.
        """
        return self.encoder is not None and "input_ids" in parameters(self.encoder)

    @property
    def has_full_encoder(self) -> bool:
        """Whether every rank runs all of an encoder, on an input that is not made of tokens."""
        return self.encoder is not None and not self.is_encoder_sharded

    @cached_property
    def text_config(self) -> Any:
        """The configuration of the part of the model that reads tokens."""
        return text_config(self.model)

    @cached_property
    def text_decoder(self) -> nn.Module | None:
        """The part of a model of text and images or audio that reads tokens; None for others."""
        if self.text_config is self.model.config or not hasattr(self.model, "get_decoder"):
            return None
        decoder: nn.Module = self.model.get_decoder()
        return None if decoder is None or decoder is self.model else decoder

    @cached_property
    def sharded(self) -> dict[str, nn.Module]:
        """The modules that see sharded tokens: all but towers for images and audio."""
        if self.encoder is not None:
            full = frozenset() if self.is_encoder_sharded else self.encoder_modules
            return {name: part for name, part in self.modules.items() if part not in full}
        if self.text_decoder is None:
            return self.modules
        inside = set(self.text_decoder.modules())
        if self.model in inside:
            return self.modules
        return {name: part for name, part in self.modules.items() if part in inside}

    @property
    def sharded_attending(self) -> dict[str, nn.Module]:
        """The attention layers that see sharded tokens."""
        return {name: part for name, part in self.sharded.items() if attention_calls(part)}

    @cached_property
    def around_sharded(self) -> dict[str, nn.Module]:
        """The modules that see sharded tokens, and those that hold one of them."""
        names = set(self.sharded)
        for name in self.sharded:
            while name:
                name = name.rpartition(".")[0]
                names.add(name)
        return {name: module for name, module in self.modules.items() if name in names}

    @cached_property
    def around_decoder(self) -> list[nn.Module]:
        """The modules that hold the text decoder, the model itself first."""
        if self.text_decoder is None:
            return []
        return [
            module
            for module in self.modules.values()
            if module is not self.text_decoder and holds(module, self.text_decoder)
        ]


def once_per_reading(function: Callable[[ModelReading], T]) -> Callable[[ModelReading], T]:
    """Makes a function of a reading compute its result once for each reading."""

    @wraps(function)
    def remembered(reading: ModelReading) -> T:
        if function not in reading.results:
            reading.results[function] = function(reading)
        result: T = reading.results[function]
        return result

    return remembered


def holds(module: nn.Module, part: nn.Module) -> bool:
    """Returns whether a module is another one, or has it inside."""
    return any(other is part for other in module.modules())


def is_model(module: nn.Module) -> bool:
    """Returns whether a module is a transformers model, rather than a layer of one."""
    return _private_api.is_transformers_model(module)


def encoder_of(model: Any) -> nn.Module | None:
    """Returns the encoder of an encoder-decoder; None where there is none, or it can't be told."""
    if not getattr(model.config, "is_encoder_decoder", False) or not hasattr(model, "get_encoder"):
        return None
    encoder: nn.Module | None = model.get_encoder()
    if encoder is None or encoder is model or not holds(model, encoder):
        return None
    return encoder if attends(encoder) else None


def attending(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules that call transformers' attention functions, with their names."""
    return ((name, module) for name, module in model.named_modules() if attention_calls(module))


def attends(module: nn.Module) -> bool:
    """Returns whether a module or a part of it calls transformers' attention functions."""
    return any(attention_calls(part) for part in module.modules())


def text_config(model: Any) -> Any:
    """Returns the configuration of the part of a model that reads tokens."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def source_of(cls: Any) -> str:
    """Returns the source of a class without its comments; nothing where it can't be had, or is
    torch's own.
    """
    return _source_of(cls)


@cache
def _source_of(cls: Any) -> str:
    if not str(cls.__module__).startswith("torch."):
        try:
            return ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(cls))))
        except (OSError, TypeError, SyntaxError):
            pass
    return ""


def attends_by_itself(module: nn.Module) -> bool:
    """Returns whether a module computes attention weights by itself instead of calling
    transformers' functions.
    """
    cls: Any = type(module)
    weighs: bool = _weighs_tokens(cls)
    return weighs


@cache
def _weighs_tokens(cls: Any) -> bool:
    source = source_of(cls)
    products = ("matmul(", "einsum(", "bmm(", "scaled_dot_product_attention(")
    weighs = "softmax" in source or "scaled_dot_product_attention(" in source
    has_product = any(product in source for product in products)
    return weighs and has_product and "ALL_ATTENTION_FUNCTIONS" not in source


@dataclass(frozen=True)
class Merging:
    """Where a model merges images or audio into its tokens.

    Args:
        decoder: what is passed the merged embeddings.
        towers: what attends to images or audio, outermost modules only.
        has_blocks: whether it lets the tokens of one image, or of a prompt, see each other in both
            directions where the batch says of each token which it is.
    """

    decoder: nn.Module
    towers: tuple[nn.Module, ...]
    has_blocks: bool


def merging_of(reading: ModelReading) -> Merging | None:
    """Returns where a transformers model merges images or audio; None where it doesn't, or not in a
    known way.
    """
    decoder = reading.text_decoder
    if reading.encoder is not None or decoder is None:
        return None
    takes_features = set(reading.parameters) & set(MERGED_KEYS)
    if not takes_features or "inputs_embeds" not in parameters(decoder):
        return None
    sources = [source_of(type(module)) for module in reading.around_decoder]
    if not any("masked_scatter(" in source for source in sources):
        return None
    has_blocks = any("block_sequence_ids" in source for source in sources)
    return Merging(decoder, tuple(_towers(reading.model, decoder)), has_blocks)


def _towers(module: nn.Module, decoder: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if child is decoder:
            continue
        if holds(child, decoder):
            yield from _towers(child, decoder)
        elif attends(child):
            yield child
