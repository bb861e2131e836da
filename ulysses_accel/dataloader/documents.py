"""Where the documents of a batch lie, from whatever the batch says about them.

In this order: `cu_seq_lens_q`, `seq_idx`, an attention mask that numbers its documents, and positions that start over.
A plain attention mask takes padding out of them. Works on the host: a batch that lies on a device is read once here.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ulysses_accel.errors import BatchError
from ulysses_accel.sequence import Rows, documents_from_lengths, find_documents

CUMULATIVE_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def find_rows(batch: Mapping[str, Any], batch_size: int, length: int) -> tuple[Rows, bool]:
    """Returns each row's documents, and whether something other than positions told them apart.

    Args:
        batch: may hold `cu_seq_lens_q` `[n]`, `seq_idx` `[B, S]`, `attention_mask` `[B, S]`, and `position_ids`
            `[B, S]`, `[1, S]` or `[k, B, S]`.
        batch_size: rows B.
        length: tokens S, before padding.

    Raises:
        BatchError: a mask that is not `[B, S]` or has holes, or cumulative lengths that don't fit the batch.
    """
    mask = _mask(batch.get("attention_mask"), batch_size, length)
    valid = None if mask is None else mask != 0
    if batch.get("cu_seq_lens_q") is not None:
        segments = _cumulative(batch["cu_seq_lens_q"], batch_size, length)
        if valid is None:
            return (segments,), True
        ids = torch.full((1, length), -1)
        for number, (start, stop) in enumerate(segments):
            ids[0, start:stop] = number
        return _rows_of_ids(ids, valid), True
    if isinstance(batch.get("seq_idx"), Tensor):
        return _rows_of_ids(_as_rows(batch["seq_idx"], "seq_idx", batch_size, length), valid), True
    if mask is not None and mask.numel() and int(mask.max()) > 1:
        return _rows_of_ids(mask, valid), True
    positions = batch.get("position_ids")
    if not isinstance(positions, Tensor):
        positions = torch.arange(length).expand(batch_size, length)
    rows = _rows_of_positions(positions, valid, batch_size, length)
    if valid is not None and positions.ndim <= 2:
        _refuse_holes(rows, _as_rows(positions, "position_ids", batch_size, length))
    return rows, False


def _refuse_holes(rows: Rows, positions: Tensor) -> None:
    """Refuses padding inside of a document: tokens on both sides see each other, which documents can't express."""
    for row, segments in enumerate(rows):
        for (_, stop), (start, _) in pairwise(segments):
            if start > stop and positions[row, start] > positions[row, stop - 1]:
                raise BatchError(
                    f"the attention_mask has a hole: row {row} has padding at tokens {stop} to {start - 1}, between "
                    f"tokens whose positions go on. Move padding to an end of the row, or start the positions over "
                    f"where another document begins."
                )


def restarting_positions(rows: Rows, length: int, device: torch.device) -> Tensor:
    """Returns positions `[B, S]` that start at 0 in each document; tokens in no document count on."""
    positions = torch.arange(length).repeat(len(rows), 1)
    for row, segments in enumerate(rows):
        for start, stop in segments:
            positions[row, start:stop] = torch.arange(stop - start)
    return positions.to(device)


def _mask(mask: Any, batch_size: int, length: int) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or tuple(mask.shape) != (batch_size, length):
        shape = f"of shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"that is a {type(mask).__name__}"
        raise BatchError(
            f"the batch has an attention_mask {shape}, but only a [batch, sequence] mask, here "
            f"[{batch_size}, {length}], can be sharded. Tell documents apart by position_ids that start over instead."
        )
    host = mask.detach().cpu()
    if host.is_floating_point() and not bool(((host == 0) | (host == 1)).all()):
        raise BatchError("the attention_mask has values other than 0 and 1. Give 1 for tokens and 0 for padding.")
    return host.to(torch.int64)


def _as_rows(tensor: Tensor, name: str, batch_size: int, length: int) -> Tensor:
    if tensor.ndim not in (1, 2) or tensor.shape[-1] != length or tensor.numel() not in (length, batch_size * length):
        raise BatchError(
            f"'{name}' has shape {list(tensor.shape)}, but the batch's sequence is [{batch_size}, {length}]. "
            "Give one number for each token."
        )
    return tensor.detach().cpu().reshape(-1, length).expand(batch_size, length)


def _cumulative(bounds: Any, batch_size: int, length: int) -> tuple[tuple[int, int], ...]:
    values = bounds.detach().cpu().flatten().tolist() if isinstance(bounds, Tensor) else bounds
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, (int, float)) for value in values):
        raise BatchError(
            f"cu_seq_lens_q is {bounds!r:.80}, but it should be the cumulative lengths of the row's documents, "
            "[0, end of first, end of second, ...]. Give them as a 1-D integer tensor."
        )
    if batch_size != 1:
        raise BatchError(
            f"cu_seq_lens_q describes one row of packed documents, but the batch has {batch_size} rows. "
            "Use batch size 1 with it, or position_ids that start over in each row."
        )
    return documents_from_lengths([int(value) for value in values], length)


def _rows_of_ids(ids: Tensor, valid: Tensor | None) -> Rows:
    """Runs of one number are documents; a negative number is padding."""
    index = torch.arange(ids.shape[1]).expand_as(ids)
    changed = torch.zeros_like(ids, dtype=torch.bool)
    changed[:, 1:] = ids[:, 1:] != ids[:, :-1]
    start = torch.cummax(torch.where(changed, index, 0), dim=1).values
    inside = ids >= 0
    return find_documents(index - start, inside if valid is None else inside & valid)


def _rows_of_positions(positions: Tensor, valid: Tensor | None, batch_size: int, length: int) -> Rows:
    if positions.ndim == 3 and positions.shape[1:] == (batch_size, length):
        first = positions[0].detach().cpu()
        # Four planes: transformers puts plain text positions first. Three: the first is time, which stands still within
        # an image and jumps behind it, so that only going down tells a new document.
        if positions.shape[0] == 4:
            return find_documents(first, valid)
        down = torch.zeros_like(first)
        down[:, 1:] = first[:, 1:] < first[:, :-1]
        ids = down.cumsum(1)
        return _rows_of_ids(ids, valid)
    return find_documents(_as_rows(positions, "position_ids", batch_size, length), valid)
