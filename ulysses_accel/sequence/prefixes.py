"""The prefixes of prefix language modelling: how many of a document's first tokens all of its
tokens see.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ulysses_accel.errors import BatchError
from ulysses_accel.sequence.documents import Rows, Segment

PREFIX_KEY = "prefix_lengths"

Prefixes = tuple[tuple[int, ...], ...]
"""For each row and document the tokens of its prefix; empty where no document has one."""


def find_prefixes(prefix_lengths: Any, rows: Rows, missing_is_zero: bool = False) -> Prefixes:
    """Returns for each row and document the tokens of its prefix; empty where no document has one.

    Args:
        prefix_lengths: `[B]` where each row is one document, or `[B, documents]`, zero after a
            row's last document: an integer tensor or a list. None where there are no prefixes.
        rows: the documents of each row.
        missing_is_zero: whether a row may name the prefixes of its first documents only.

    Raises:
        BatchError: the numbers don't fit the documents.
    """
    if prefix_lengths is None:
        return ()
    numbers = _numbers(prefix_lengths)
    if len(numbers) != len(rows):
        raise BatchError(
            f"'{PREFIX_KEY}' has {len(numbers)} rows, the batch has {len(rows)}. Give [batch] or "
            "[batch, documents]."
        )
    prefixes = []
    for row, (lengths, documents) in enumerate(zip(numbers, rows)):
        if missing_is_zero:
            lengths = lengths + [0] * (len(documents) - len(lengths))
        prefixes.append(_of_row(row, lengths, documents))
    return tuple(prefixes) if any(any(row) for row in prefixes) else ()


def _numbers(prefix_lengths: Any) -> list[list[int]]:
    values = prefix_lengths
    if isinstance(values, Tensor):
        values = values.detach().cpu().tolist()
    if isinstance(values, (list, tuple)):
        nested = [list(value) if isinstance(value, (list, tuple)) else [value] for value in values]
        if all(type(number) is int for row in nested for number in row):
            return nested
    raise BatchError(
        f"'{PREFIX_KEY}' is {prefix_lengths!r:.80}, but it should be the number of tokens in each "
        "document's prefix. Give whole numbers, [batch] or [batch, documents]."
    )


def _of_row(row: int, lengths: list[int], documents: tuple[Segment, ...]) -> tuple[int, ...]:
    prefixes, rest = lengths[: len(documents)], lengths[len(documents) :]
    if len(prefixes) < len(documents) or any(rest):
        raise BatchError(
            f"'{PREFIX_KEY}' has {lengths} for row {row}, which has {len(documents)} documents. "
            "Give one number for each document, and 0 after the last."
        )
    for length, (start, stop) in zip(prefixes, documents):
        if not 0 <= length <= stop - start:
            raise BatchError(
                f"'{PREFIX_KEY}' has {length} for a document of row {row} with {stop - start} "
                f"tokens (from {start} on). Use 0 to {stop - start}."
            )
    return tuple(prefixes)
