"""A batch's labels, as the model's loss takes them: moved to the token that predicts them and then
sharded, only sharded, or replicated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ulysses_accel.dataloader.batch_layout import BatchLayout
from ulysses_accel.dataloader.completion.draft import SequenceDraft
from ulysses_accel.errors import BatchError
from ulysses_accel.sequence.batch_rules import BatchRules
from ulysses_accel.sequence.documents import Documents, Rows, Segment
from ulysses_accel.sequence.labels import IGNORE_INDEX


def place_labels(sequence: SequenceDraft, layout: BatchLayout, rules: BatchRules) -> None:
    """Changes `labels` into what the model's loss takes on shards.

    Args:
        sequence: its documents are known, from one of which to the next no label crosses; may hold
            `labels` `[B, S]`, and `shift_labels` `[B, S]`, which are kept as they are.
        layout: the ignored label, and a rule for labels that belong to the sample.
        rules: whether the model's loss shifts labels.

    Raises:
        BatchError: labels of another shape or dtype, or one that counts on padding where labels are
            not shifted.
    """
    tensors, documents = sequence.tensors, sequence.documents
    labels = tensors.get("labels")
    if labels is None:
        return
    if _are_of_samples(layout, rules):
        sequence.dims["labels"] = None
        return
    shape = [sequence.batch_size, sequence.length]
    if list(labels.shape) != shape:
        raise BatchError(
            f"'labels' has shape {list(labels.shape)}, but one for each of {shape} tokens is "
            "needed. Labels of a whole sample can be kept with "
            "batch_schema={'labels': 'replicate'}."
        )
    if not labels.dtype.is_signed:
        raise BatchError(
            f"'labels' is {labels.dtype}, which can't hold the ignored label "
            f"{layout.ignore_index}. Use torch.int64."
        )
    if rules.labels == "same_token":
        _refuse_labelled_padding(labels, documents, layout.ignore_index)
        return
    del tensors["labels"]
    if "shift_labels" not in tensors:
        tensors["shift_labels"] = shift_labels(
            labels, documents.rows, layout.ignore_index, documents.holes
        )


def shift_labels(
    labels: Tensor, rows: Rows, ignore_index: int = IGNORE_INDEX, holes: Rows = ()
) -> Tensor:
    """Returns labels moved one token to the left, so that a token's label is its successor in the
    same document.

    Args:
        labels: `[B, S]`, unshifted, as transformers' data collators return them.
        rows: the documents of each row.
        ignore_index: the label of tokens that don't count.
        holes: the padding inside of each row's documents; empty where there is none.

    Returns:
        `[B, S]`; the last token of every document, the last one before a hole, and padding, have
        `ignore_index`.
    """
    shifted = torch.full_like(labels, ignore_index)
    for row, documents in enumerate(rows):
        # One copy for the row, then the few seams: documents are many, seams are one token each.
        shifted[row, :-1] = labels[row, 1:]
        last = torch.tensor(
            [stop - 1 for _, stop in documents], dtype=torch.long, device=labels.device
        )
        shifted[row, last] = ignore_index
        _ignore_outside(shifted[row], documents, ignore_index)
    for row, gaps in enumerate(holes):
        for start, stop in gaps:
            # A hole begins after its document's first token, so there is one before it.
            shifted[row, start - 1 : stop] = ignore_index
    return shifted


def _ignore_outside(row: Tensor, documents: tuple[Segment, ...], ignore_index: int) -> None:
    """Sets `ignore_index` on every token of the row that lies in no document."""
    end = 0
    for start, stop in documents:
        if start > end:
            row[end:start] = ignore_index
        end = stop
    row[end:] = ignore_index


def token_label_keys(batch: Mapping[str, Any], layout: BatchLayout, rules: BatchRules) -> list[str]:
    """Returns the keys of a completed batch that hold one label for each token."""
    keys = [key for key in ("shift_labels", "labels") if key in batch]
    if "labels" in keys and _are_of_samples(layout, rules):
        keys.remove("labels")
    return keys


def _are_of_samples(layout: BatchLayout, rules: BatchRules) -> bool:
    """Returns whether `labels` belong to the sample rather than to its tokens."""
    return rules.labels == "whole" or layout.batch_schema.get("labels") == "replicate"


def _refuse_labelled_padding(labels: Tensor, documents: Documents, ignore_index: int) -> None:
    """Refuses a loss on padding: what attention gives there is zero, and not what one device would
    have computed.
    """
    counted = (labels.detach().cpu() != ignore_index) & ~documents.token_mask
    if bool(counted.any()):
        row, token = counted.nonzero()[0].tolist()
        raise BatchError(
            f"{int(counted.sum())} labels count on padding, the first in row {row} at token "
            f"{token}, where attention computes nothing. Give padding the label {ignore_index}, or "
            "let the attention mask show these tokens."
        )
