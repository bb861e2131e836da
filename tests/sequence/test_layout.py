"""Layout arithmetic on examples that a reader can check by hand."""

from __future__ import annotations

import pytest
import torch

from ulysses_accel.dataloader.completion.labels import shift_labels
from ulysses_accel.errors import BatchError, ShapeError
from ulysses_accel.sequence.description import SequenceDescription
from ulysses_accel.sequence.documents import (
    Rows,
    documents_from_lengths,
    documents_of_ids,
    find_documents,
)
from ulysses_accel.sequence.labels import num_counted
from ulysses_accel.sequence.sharding import (
    next_multiple,
    pad_position_ids,
    pad_sequence_dim,
    shard,
    unshard,
)


def test_shard_is_a_view_of_consecutive_tokens() -> None:
    tokens = torch.arange(12).view(2, 6)
    assert shard(tokens, 3, 1).tolist() == [[2, 3], [8, 9]]
    assert shard(tokens, 3, 1).data_ptr() == tokens[0, 2:].data_ptr()
    assert torch.equal(unshard([shard(tokens, 3, rank) for rank in range(3)]), tokens)


def test_a_length_that_does_not_divide_names_the_next_one() -> None:
    with pytest.raises(
        ShapeError, match=r"4 ranks do not divide a sequence of 6 tokens.*Pad it to 8"
    ):
        shard(torch.zeros(1, 6), 4, 0)


@pytest.mark.parametrize(
    ("length", "multiple", "expected"), [(1, 4, 4), (4, 4, 4), (5, 4, 8), (0, 4, 0), (7, 1, 7)]
)
def test_next_multiple(length: int, multiple: int, expected: int) -> None:
    assert next_multiple(length, multiple) == expected


def test_padding_keeps_dtype_and_counts_positions_on() -> None:
    assert pad_sequence_dim(torch.ones(1, 2, dtype=torch.bool), 3, False).tolist() == [
        [True, True, False]
    ]
    assert pad_position_ids(torch.tensor([[0, 1, 0], [3, 4, 5]]), 5).tolist() == [
        [0, 1, 0, 1, 2],
        [3, 4, 5, 6, 7],
    ]
    same = torch.zeros(1, 3)
    assert pad_sequence_dim(same, 3, 0) is same
    assert pad_position_ids(same, 3) is same


def rows_of(positions: torch.Tensor, mask: torch.Tensor | None = None) -> Rows:
    """The documents that positions `[B, S]` and a mask tell apart."""
    batch = {"position_ids": positions, "attention_mask": mask}
    return find_documents(batch, *positions.shape).rows


def test_documents_of_packed_positions() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]])
    assert rows_of(positions) == (((0, 3), (3, 5), (5, 6)), ((0, 1), (1, 2), (2, 6)))


def test_padding_belongs_to_no_document() -> None:
    positions = torch.arange(5).repeat(4, 1)
    positions[3] = torch.tensor([0, 1, 0, 1, 2])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 1, 0]])
    assert rows_of(positions, mask) == (((2, 5),), ((0, 3),), (), ((0, 1), (2, 4)))


def test_padding_ends_a_document_of_ids() -> None:
    ids = torch.tensor([[3, 3, -1, 3, 0, 0], [-1, 1, 1, 1, -1, -1]])
    assert documents_of_ids(ids).rows == (((0, 2), (3, 4), (4, 6)), ((1, 4),))
    assert documents_of_ids(ids).holes == ()


def test_documents_from_cumulative_lengths() -> None:
    assert documents_from_lengths([0, 3, 3, 5], 8) == ((0, 3), (3, 5))
    for bad in ([1, 3], [0, 4, 2], [0, 9], []):
        with pytest.raises(BatchError, match="do not fit a row of 8 tokens"):
            documents_from_lengths(bad, 8)


def test_no_label_crosses_a_document() -> None:
    labels = torch.arange(8).view(1, 8)
    assert shift_labels(labels, (((0, 3), (3, 4), (5, 8)),)).tolist() == [
        [1, 2, -100, -100, -100, 6, 7, -100]
    ]


def test_a_row_of_padding_has_no_label() -> None:
    assert shift_labels(torch.arange(4).view(1, 4), ((),)).tolist() == [[-100] * 4]


def test_counted_labels() -> None:
    assert num_counted(torch.tensor([[1, -100, 3], [-100, -100, 0]])).item() == 3
    assert num_counted(torch.tensor([7, 1, 7]), ignore_index=7).item() == 1


def test_what_a_description_says() -> None:
    dense = SequenceDescription(8, 2, (((0, 8),), ((0, 8),)))
    assert (
        dense.batch_size,
        dense.shard_length,
        dense.is_dense,
        dense.is_plain_causal,
        dense.is_packed,
    ) == (
        2,
        4,
        True,
        True,
        False,
    )
    padded = SequenceDescription(8, 2, (((0, 5),),))
    assert (padded.is_dense, padded.is_plain_causal) == (False, True)
    left = SequenceDescription(8, 2, (((3, 8),),))
    assert (left.is_plain_causal, left.is_packed) == (False, False)
    assert SequenceDescription(8, 2, (((0, 3), (3, 8)),)).is_packed
    assert dense.to("cpu") is dense
