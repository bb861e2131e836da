"""Where a model merges images or sound into the embeddings of its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ulysses_accel.dataloader.keys import MERGED_KEYS
from ulysses_accel.introspection.source import parameters
from ulysses_accel.introspection.structure import attending, encoder_of, source_of, text_config


@dataclass(frozen=True)
class Merging:
    """Where a model merges images or sound into its tokens.

    Args:
        decoder: what is given the merged embeddings.
        towers: what attends to images or sound, outermost modules only.
        has_blocks: whether it lets the tokens of one image, or of a prompt, see each other in both
            directions where the batch says of each token which it is.
    """

    decoder: nn.Module
    towers: tuple[nn.Module, ...]
    has_blocks: bool


def merging_of(model: Any) -> Merging | None:
    """Returns where a transformers model merges images or sound; None where it doesn't, or not in a
    known way.

    Args:
        model: a transformers model.
    """
    takes = set(parameters(model)) & set(MERGED_KEYS)
    if not takes or encoder_of(model) is not None or text_config(model) is model.config:
        return None
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or decoder is model or "inputs_embeds" not in parameters(decoder):
        return None
    around = [
        module for module in model.modules() if module is not decoder and _holds(module, decoder)
    ]
    sources = [source_of(type(module)) for module in around]
    if not any("masked_scatter(" in source for source in sources):
        return None
    has_blocks = any("block_sequence_ids" in source for source in sources)
    return Merging(decoder, tuple(_towers(model, decoder)), has_blocks)


def _holds(module: nn.Module, part: nn.Module) -> bool:
    return any(other is part for other in module.modules())


def _towers(module: nn.Module, decoder: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if _holds(child, decoder):
            yield from _towers(child, decoder) if child is not decoder else ()
        elif any(True for _ in attending(child)):
            yield child
