"""The parts of a transformers model that sequence parallelism tells apart: its encoder, and what
attends in it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

from ulysses_accel import _private_api
from ulysses_accel.errors import UnsupportedModelError
from ulysses_accel.introspection.source import attention_calls, parameters


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


def is_encoder_decoder(model: Any) -> bool:
    """Returns whether a transformers model reads one sequence and writes another."""
    return (
        bool(getattr(model.config, "is_encoder_decoder", False)) and encoder_of(model) is not None
    )


def encoder_of(model: Any) -> nn.Module | None:
    """Returns the encoder of an encoder-decoder; None where there is none, or it can't be told."""
    if not getattr(model.config, "is_encoder_decoder", False) or not hasattr(model, "get_encoder"):
        return None
    encoder = model.get_encoder()
    inside = (
        encoder is not None
        and encoder is not model
        and any(part is encoder for part in model.modules())
    )
    return encoder if inside and any(True for _ in attending(encoder)) else None


def reads_tokens(encoder: nn.Module) -> bool:
    """Returns whether an encoder reads tokens, which are sharded; sound and images are whole on
    every rank.
    """
    return "input_ids" in parameters(encoder)


def attending(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules that call transformers' attention functions, with their names."""
    return ((name, module) for name, module in model.named_modules() if attention_calls(module))


def source_of(cls: Any) -> str:
    """Returns the source of a class without its comments; nothing where it can't be had, or is
    torch's own.
    """
    return _source_of(cls)


@cache
def _source_of(cls: Any) -> str:
    if not cls.__module__.startswith("torch."):
        try:
            return ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(cls))))
        except (OSError, TypeError, SyntaxError):
            pass
    return ""


def attends_by_itself(module: nn.Module) -> bool:
    """Returns whether a module makes attention weights of its own instead of calling transformers'
    functions.
    """
    cls: Any = type(module)
    source = source_of(cls)
    products = ("matmul(", "einsum(", "bmm(", "scaled_dot_product_attention(")
    weighs = "softmax" in source or "scaled_dot_product_attention(" in source
    return (
        weighs
        and any(product in source for product in products)
        and "ALL_ATTENTION_FUNCTIONS" not in source
    )


def sharded_parts(model: Any) -> list[tuple[str, nn.Module]]:
    """Returns the modules that see sharded tokens, with their names: all but towers for images and
    sound.

    Args:
        model: a transformers model.
    """
    every = list(model.named_modules())
    encoder = encoder_of(model)
    if encoder is not None:
        whole = set() if reads_tokens(encoder) else set(encoder.modules())
        return [(name, module) for name, module in every if module not in whole]
    text = text_config(model)
    if text is model.config or not hasattr(model, "get_decoder"):
        return every
    inside = set(model.get_decoder().modules())
    return (
        [(name, module) for name, module in every if module in inside]
        if model not in inside
        else every
    )


def text_config(model: Any) -> Any:
    """Returns the configuration of the part of a model that reads tokens."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config
