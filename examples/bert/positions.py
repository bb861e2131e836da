"""Longer position tables for BERT models that were trained on short sequences."""

from __future__ import annotations

from typing import Any

import torch


def extend_positions(model: Any, length: int) -> None:
    """Makes a BERT take sequences of up to `length` tokens: its position table is repeated, to be
    trained further.

    Args:
        model: a BERT of transformers, with or without heads; changed in place. One whose table
            suffices is left alone.
        length: tokens of the longest sequence.
    """
    embeddings = model.base_model.embeddings
    table = embeddings.position_embeddings.weight
    if len(table) >= length:
        return
    copies = -(-length // len(table))
    longer = torch.nn.Embedding.from_pretrained(
        table.detach().repeat(copies, 1)[:length], freeze=False
    )
    embeddings.position_embeddings = longer
    embeddings.position_ids = torch.arange(length, device=table.device)[None]
    embeddings.token_type_ids = torch.zeros_like(embeddings.position_ids)
    model.config.max_position_embeddings = length
