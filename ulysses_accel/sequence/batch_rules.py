"""What a model requires of a batch that only the full batch can tell: its labels, its positions,
its decoder's tokens.

It is read from the prepared model; the data loader follows it before the batch is sharded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class BatchRules:
    """How a batch without further keys is completed for one model.

    Args:
        labels: `next_token`: the model's loss shifts them, so they are shifted before they are
            sharded;
            `same_token`: a token's label is its own (masked language models, decoders that
            take shifted tokens), so they are only sharded; `whole`: they belong to the sample.
        counts_mask: positions that the batch lacks are counted by its attention mask,
            padding getting -1.
        padding_idx: positions that the batch lacks start after this number, counted over
            the tokens that differ from it, which have it themselves; None for models whose
            positions start at 0. Both rules hold for an encoder's positions and a decoder's.
        decoder_inputs: makes `decoder_input_ids` `[B, T]` of `labels` `[B, T]`, as the model's own
            forward would; None for models without an encoder.
        merges: images or audio are merged into the full sequence's tokens, whose embeddings are
            sharded after that; in a batch with any the keys that this takes are replicated.
        is_causal: whether all of the model's layers see each token's document up to itself (True)
            or all of it (False), which is what a 4-D mask may say too; None where windows, chunks
            or both kinds of layers let no such mask be read.
    """

    labels: Literal["next_token", "same_token", "whole"] = "next_token"
    counts_mask: bool = False
    padding_idx: int | None = None
    decoder_inputs: Callable[[Tensor], Tensor] | None = None
    merges: bool = False
    is_causal: bool | None = True


RulesSource = BatchRules | Callable[[], BatchRules]
"""Rules, or what returns them once the model is known."""

PLAIN_RULES = BatchRules()
"""The rules of a causal language model whose positions count from 0."""


def resolve_rules(source: RulesSource) -> BatchRules:
    """Returns the rules themselves."""
    return source if isinstance(source, BatchRules) else source()
