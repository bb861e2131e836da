"""Properties of the layout arithmetic, for any documents and any number of ranks."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ulysses_accel.dataloader.completion.labels import shift_labels
from ulysses_accel.sequence.documents import Rows, documents_from_lengths, find_documents
from ulysses_accel.sequence.labels import num_counted
from ulysses_accel.sequence.sharding import (
    next_multiple,
    pad_position_ids,
    pad_sequence_dim,
    shard,
    unshard,
)

ranks = st.sampled_from([1, 2, 3, 4, 8])
layout = settings(max_examples=60, deadline=None)


@st.composite
def packed_rows(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, Rows]:
    """Position ids and mask `[B, S]` made of documents (length 1 too) with padding in front,
    between and behind.
    """
    length = draw(st.integers(1, 24))
    positions = torch.zeros(draw(st.integers(1, 3)), length, dtype=torch.long)
    mask = torch.zeros_like(positions)
    rows = []
    for row in range(len(positions)):
        end = draw(st.integers(0, length))
        segments = []
        while end < length:
            stop = min(length, end + draw(st.integers(1, 8)))
            if draw(st.integers(0, 4)) or (segments and segments[-1][1] != end):
                positions[row, end:stop] = torch.arange(stop - end)
                mask[row, end:stop] = 1
                segments.append((end, stop))
            end = stop
        rows.append(tuple(segments))
    return positions, mask, tuple(rows)


def rows_of(positions: torch.Tensor, mask: torch.Tensor | None = None) -> Rows:
    """The documents that positions `[B, S]` and a mask tell apart."""
    batch = {"position_ids": positions, "attention_mask": mask}
    return find_documents(batch, *positions.shape).rows


def reference_documents(positions: list[int], mask: list[int]) -> tuple[tuple[int, int], ...]:
    """Documents of one row, token by token: padding inside of one is a hole."""
    documents: list[list[int]] = []
    for token, (position, valid) in enumerate(zip(positions, mask)):
        if not valid:
            continue
        follows = False
        if documents:
            last = documents[-1][1] - 1
            step = position - positions[last]
            follows = step == 1 if last == token - 1 else step > 0
        if follows:
            documents[-1][1] = token + 1
        else:
            documents.append([token, token + 1])
    return tuple((start, stop) for start, stop in documents)


def reference_shift(labels: list[int], segments: tuple[tuple[int, int], ...]) -> list[int]:
    shifted = [-100] * len(labels)
    for start, stop in segments:
        for token in range(start, stop - 1):
            shifted[token] = labels[token + 1]
    return shifted


@layout
@given(
    st.integers(1, 3),
    st.integers(1, 30),
    ranks,
    st.sampled_from([torch.int64, torch.bool, torch.bfloat16]),
)
def test_unshard_undoes_pad_and_shard(
    batch: int, length: int, parts: int, dtype: torch.dtype
) -> None:
    whole = torch.randint(0, 2, (batch, length, 2)).to(dtype)
    padded = pad_sequence_dim(whole, next_multiple(length, parts), 0)
    shards = [shard(padded, parts, rank) for rank in range(parts)]
    assert len({piece.shape for piece in shards}) == 1
    assert unshard(shards).dtype == dtype
    assert torch.equal(unshard(shards), padded)
    assert torch.equal(unshard(shards)[:, :length], whole)


@layout
@given(st.integers(1, 30), ranks)
def test_every_token_is_on_exactly_one_rank(length: int, parts: int) -> None:
    tokens = torch.arange(next_multiple(length, parts)).unsqueeze(0)
    seen = [token for rank in range(parts) for token in shard(tokens, parts, rank)[0].tolist()]
    assert seen == list(range(tokens.numel()))


@layout
@given(packed_rows())
def test_documents_are_found_as_token_by_token(
    rows: tuple[torch.Tensor, torch.Tensor, Rows],
) -> None:
    positions, mask, made = rows
    found = rows_of(positions, mask)
    assert found == tuple(
        reference_documents(p, m) for p, m in zip(positions.tolist(), mask.tolist())
    )
    assert found == made


@layout
@given(st.lists(st.integers(-3, 4), min_size=1, max_size=20), st.data())
def test_documents_of_any_numbers(positions: list[int], data: st.DataObject) -> None:
    mask = data.draw(st.lists(st.integers(0, 1), min_size=len(positions), max_size=len(positions)))
    found = rows_of(torch.tensor([positions]), torch.tensor([mask]))
    assert found == (reference_documents(positions, mask),)


@layout
@given(packed_rows())
def test_labels_stay_in_their_document(rows: tuple[torch.Tensor, torch.Tensor, Rows]) -> None:
    positions, _, made = rows
    labels = torch.arange(positions.numel()).view_as(positions)
    shifted = shift_labels(labels, made)
    assert shifted.tolist() == [
        reference_shift(own, segments) for own, segments in zip(labels.tolist(), made)
    ]
    assert num_counted(shifted) == sum(
        stop - start - 1 for segments in made for start, stop in segments
    )


@layout
@given(st.lists(st.sampled_from("dh"), min_size=1, max_size=20))
def test_labels_around_holes(kinds: list[str]) -> None:
    """One document, whose first and last token are none of its holes (h)."""
    tokens = ["d", *kinds, "d"]
    bounds = [index for index in range(1, len(tokens)) if tokens[index] != tokens[index - 1]]
    holes = (tuple(zip(bounds[::2], bounds[1::2])),)
    labels = torch.arange(len(tokens))[None]
    expected = [i + 1 if a == b == "d" else -100 for i, (a, b) in enumerate(pairwise(tokens))]
    assert shift_labels(labels, (((0, len(tokens)),),), holes=holes).tolist() == [[*expected, -100]]


@layout
@given(packed_rows(), ranks)
def test_shards_of_shifted_labels_count_what_the_whole_counts(
    rows: tuple[torch.Tensor, torch.Tensor, Rows], parts: int
) -> None:
    positions, _, made = rows
    labels = torch.arange(positions.numel()).view_as(positions)
    length = next_multiple(labels.shape[1], parts)
    shifted = shift_labels(labels, made)
    # Padding first or shifting first is the same, so a shard of the global shift is all that a rank
    # needs.
    padded_first = shift_labels(pad_sequence_dim(labels, length, -100), made)
    assert torch.equal(padded_first, pad_sequence_dim(shifted, length, -100))
    counts = [num_counted(shard(padded_first, parts, rank)) for rank in range(parts)]
    assert sum(counts) == num_counted(shifted)


@layout
@given(st.lists(st.integers(0, 6), max_size=6), st.integers(0, 5))
def test_cumulative_lengths_give_consecutive_documents(lengths: list[int], tail: int) -> None:
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    segments = documents_from_lengths(bounds, bounds[-1] + tail)
    assert [stop - start for start, stop in segments] == [length for length in lengths if length]
    assert all(a[1] == b[0] for a, b in pairwise(segments))


@layout
@given(packed_rows(), st.integers(0, 9))
def test_padded_positions_start_no_document(
    rows: tuple[torch.Tensor, torch.Tensor, Rows], missing: int
) -> None:
    positions, _, _ = rows
    padded = pad_position_ids(positions, positions.shape[1] + missing)
    assert torch.equal(padded[:, : positions.shape[1]], positions)
    before, after = rows_of(positions), rows_of(padded)
    assert [len(row) for row in before] == [len(row) for row in after]
