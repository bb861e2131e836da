"""Labels of a sequence: moved to the token that predicts them within each document, and counted."""

from __future__ import annotations

import torch
from torch import Tensor

from ulysses_accel.sequence.documents import Rows, Segment

IGNORE_INDEX = -100


def shift_labels(
    labels: Tensor, rows: Rows, ignore_index: int = IGNORE_INDEX, holes: Rows = ()
) -> Tensor:
    """Returns labels moved one token to the left, so that a token's label is its successor in the
    same document.

    Args:
        labels: `[B, S]`, unshifted, as transformers' data collators give them.
        rows: the documents of each row.
        ignore_index: the label of tokens that don't count.
        holes: the padding inside of each row's documents; empty where there is none.

    Returns:
        `[B, S]`; the last token of every document, the last one before a hole, and padding, have
        `ignore_index`.
    """
    shifted = torch.full_like(labels, ignore_index)
    for row, segments in enumerate(rows):
        # One copy for the row, then the few seams: documents are many, seams are one token each.
        shifted[row, :-1] = labels[row, 1:]
        last = torch.tensor(
            [stop - 1 for _, stop in segments], dtype=torch.long, device=labels.device
        )
        shifted[row, last] = ignore_index
        _ignore_padding(shifted[row], segments, ignore_index)
    for row, gaps in enumerate(holes):
        for start, stop in gaps:
            # A hole begins behind its document's first token, so there is one before it.
            shifted[row, start - 1 : stop] = ignore_index
    return shifted


def _ignore_padding(row: Tensor, segments: tuple[Segment, ...], ignore_index: int) -> None:
    """Sets `ignore_index` on every token of the row that lies in no document."""
    end = 0
    for start, stop in segments:
        if start > end:
            row[end:start] = ignore_index
        end = stop
    row[end:] = ignore_index


def num_counted(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Returns how many labels count, as an integer scalar on the labels' device (no host
    synchronization).
    """
    return (labels != ignore_index).sum()
