"""Documents cut into chunks of attention: pure arithmetic on the rows of a description."""

from __future__ import annotations

Segment = tuple[int, int]


def cut_at_multiples(segments: tuple[Segment, ...], origins: tuple[int, ...], size: int) -> tuple[Segment, ...]:
    """Returns each segment cut at every multiple of `size` tokens from its origin on, which lies at or before it."""
    found = []
    for (start, stop), origin in zip(segments, origins):
        while start < stop:
            end = min(stop, start + size - (start - origin) % size)
            found.append((start, end))
            start = end
    return tuple(found)


def chunk_documents(
    documents: tuple[Segment, ...], holes: tuple[Segment, ...], prefixes: tuple[int, ...], size: int
) -> tuple[tuple[Segment, ...], tuple[Segment, ...], tuple[int, ...]]:
    """Returns one row's documents, holes and prefixes, cut every `size` tokens from each document's first one on.

    Args:
        documents: (start, stop) token positions.
        holes: padding inside of the documents.
        prefixes: for each document the length of its prefix; empty where none has any.
        size: tokens of a chunk.
    """
    starts = tuple(start for start, _ in documents)
    homes = tuple(max(start for start in starts if start <= hole_start) for hole_start, _ in holes)
    cut = cut_at_multiples(documents, starts, size)
    lengths = []
    for (start, stop), prefix in zip(documents, prefixes):
        chunks = cut_at_multiples(((start, stop),), (start,), size)
        lengths += [min(max(0, start + prefix - first), last - first) for first, last in chunks]
    return cut, cut_at_multiples(holes, homes, size), tuple(lengths)
