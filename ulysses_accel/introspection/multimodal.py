"""Where a model merges images or audio into the embeddings of its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ulysses_accel.dataloader.keys import MERGED_KEYS
from ulysses_accel.introspection.source import parameters
from ulysses_accel.introspection.structure import ModelReading, attends, holds, source_of


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
