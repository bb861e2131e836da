"""Lengths, prefixes and chunks become the description that was meant."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.dense_attention import self_mask, token_documents
from ulysses_accel.attention.describe import describe
from ulysses_accel.errors import BatchError, ConfigError, ShapeError
from ulysses_accel.sequence.description import SequenceDescription


def described(**given: torch.Tensor | SequenceDescription | None) -> SequenceDescription:
    keys = ("document_ids", "key_lengths", "prefix_lengths")
    return describe(*(given.get(key) for key in keys), (2, 8), 2, 1, "contiguous")  # type: ignore[arg-type]


def test_lengths_and_prefixes() -> None:
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [4, 4, 4, 4, 4, 4, 4, 4]])
    assert described().rows == (((0, 8),), ((0, 8),))
    assert described(key_lengths=torch.tensor([5, 8])).rows == (((0, 5),), ((0, 8),))
    assert described(key_lengths=torch.tensor([0, 2])).rows == ((), ((0, 2),))
    both = described(
        document_ids=ids, key_lengths=torch.tensor([5, 6]), prefix_lengths=torch.tensor([2, 6])
    )
    assert both.rows == (((0, 3), (3, 5)), ((0, 6),))
    assert both.prefixes == ((2, 0), (6,))
    each = described(document_ids=ids, prefix_lengths=torch.tensor([[1, 5], [3, 0]]))
    assert each.prefixes == ((1, 5), (3,))


def test_what_does_not_fit_is_refused() -> None:
    whole = SequenceDescription(8, 2, (((0, 8),),) * 2)
    assert described(document_ids=whole) is whole
    with pytest.raises(ConfigError, match="leave out key_lengths and prefix_lengths"):
        described(document_ids=whole, key_lengths=torch.tensor([5, 8]))
    with pytest.raises(ShapeError, match="each batch anew"):
        described(document_ids=SequenceDescription(6, 2, (((0, 6),),) * 2))
    with pytest.raises(
        BatchError, match=r"key_lengths=\[9, 1\] must be one number of tokens, 0 to 8"
    ):
        described(key_lengths=torch.tensor([9, 1]))
    for lengths in ([9, 1], [[1, 2], [1, 0]], [-1, 0]):
        with pytest.raises(BatchError, match="'prefix_lengths' has"):
            described(prefix_lengths=torch.tensor(lengths))
    with pytest.raises(ShapeError, match="prefix_lengths has 3 rows, the batch 2"):
        described(prefix_lengths=torch.tensor([1, 1, 1]))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_chunks_see_only_themselves(data: st.DataObject) -> None:
    length, size = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 26))
    bounds = sorted({0, length, *data.draw(st.lists(st.integers(0, length), max_size=3))})
    documents = tuple((a, b) for a, b in pairwise(bounds) if data.draw(st.booleans()))
    cuts = [
        sorted(data.draw(st.sets(st.integers(start, stop), max_size=2)))
        for start, stop in documents
    ]
    holes = tuple((cut[0], cut[1]) for cut in cuts if len(cut) == 2)
    prefixes = tuple(data.draw(st.integers(0, stop - start)) for start, stop in documents)
    whole = SequenceDescription(length, 1, (documents,), holes=(holes,), prefixes=(prefixes,))
    chunked = whole.chunked(size)
    assert whole.chunked(size) is chunked
    chunk = torch.full((length,), -1)
    for start, stop in documents:
        chunk[start:stop] = torch.arange(stop - start) // size
    same = chunk[:, None] == chunk[None, :]
    for is_causal in (True, False):
        assert torch.equal(
            self_mask(chunked, is_causal, None), self_mask(whole, is_causal, None) & same
        )
    assert torch.equal(token_documents(chunked) < 0, token_documents(whole) < 0)
    assert all(any(a <= c and d <= b for a, b in chunked.rows[0]) for c, d in chunked.holes[0])


def test_chunks_count_from_the_first_token() -> None:
    description = SequenceDescription(12, 2, (((0, 12),), ((5, 12),)))
    assert description.chunked(4).rows == (((0, 4), (4, 8), (8, 12)), ((5, 9), (9, 12)))
    with pytest.raises(ConfigError, match="chunks of 0 tokens"):
        description.chunked(0)
