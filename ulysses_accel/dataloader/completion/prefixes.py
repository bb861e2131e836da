"""The prefixes of prefix language modelling: how many of a document's first tokens all of its
tokens see.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ulysses_accel.errors import BatchError
from ulysses_accel.sequence.documents import Rows

PREFIX_KEY = "prefix_lengths"

Prefixes = tuple[tuple[int, ...], ...]


def find_prefixes(given: Any, rows: Rows) -> Prefixes:
    """Returns for each row and document the tokens of its prefix; empty where no document has one.

    Args:
        given: `[B]` where each row is one document, or `[B, documents]`, zero behind a row's last
            document: an integer tensor or a list. None where the batch has no prefixes.
        rows: the documents of each row.

    Raises:
        BatchError: the numbers don't fit the documents.
    """
    if given is None:
        return ()
    values = _values(given)
    if len(values) != len(rows):
        raise BatchError(
            f"'{PREFIX_KEY}' has {len(values)} rows, the batch has {len(rows)}. Give [batch] or "
            "[batch, documents]."
        )
    prefixes = tuple(
        _of_row(row, own, segments) for row, (own, segments) in enumerate(zip(values, rows))
    )
    return prefixes if any(any(row) for row in prefixes) else ()


def _values(given: Any) -> list[list[int]]:
    values = given.detach().cpu().tolist() if isinstance(given, Tensor) else given
    if isinstance(values, (list, tuple)):
        nested = [list(value) if isinstance(value, (list, tuple)) else [value] for value in values]
        if all(type(number) is int for row in nested for number in row):
            return nested
    raise BatchError(
        f"'{PREFIX_KEY}' is {given!r:.80}, but it should be the number of tokens in each "
        "document's prefix. "
        f"Give whole numbers, [batch] or [batch, documents]."
    )


def _of_row(row: int, lengths: list[int], segments: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    kept, rest = lengths[: len(segments)], lengths[len(segments) :]
    if len(kept) < len(segments) or any(rest):
        raise BatchError(
            f"'{PREFIX_KEY}' has {lengths} for row {row}, which has {len(segments)} documents. "
            "Give one number for each document, and 0 behind the last."
        )
    for length, (start, stop) in zip(kept, segments):
        if not 0 <= length <= stop - start:
            raise BatchError(
                f"'{PREFIX_KEY}' has {length} for a document of row {row} with {stop - start} "
                f"tokens (from {start} "
                f"on). Use 0 to {stop - start}."
            )
    return tuple(kept)
