"""Padding inside of a document is a hole in it; between documents and at the ends it belongs to
none.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ulysses_accel.dataloader.batch_layout import BatchLayout
from ulysses_accel.dataloader.completion.complete import complete
from ulysses_accel.sequence.documents import Documents, find_documents

IDS = torch.arange(5, 13)[None]


def found(length: int = 8, **batch: Any) -> tuple[Any, Any]:
    documents = find_documents(
        {name: torch.tensor(value) for name, value in batch.items()}, 1, length
    )
    return documents.rows[0], documents.holes[0] if documents.holes else ()


def test_padding_that_positions_count_over_is_a_hole() -> None:
    assert found(attention_mask=[[0, 1, 1, 0, 0, 1, 1, 0]]) == (((1, 7),), ((3, 5),))
    assert found(attention_mask=[[1, 0, 1, 0, 1, 1, 1, 1]]) == (((0, 8),), ((1, 2), (3, 4)))


def test_positions_that_count_tokens_only_go_on_over_a_hole_too() -> None:
    mask, positions = [[1, 1, 0, 0, 1, 1, 1, 0]], [[0, 1, 1, 1, 2, 3, 4, 4]]
    assert found(attention_mask=mask, position_ids=positions) == (((0, 7),), ((2, 4),))


def test_padding_between_documents_is_not_a_hole() -> None:
    mask, positions = [[0, 1, 1, 0, 1, 0, 1, 1]], [[0, 0, 1, 2, 0, 1, 0, 1]]
    assert found(attention_mask=mask, position_ids=positions) == (((1, 3), (4, 5), (6, 8)), ())


@pytest.mark.parametrize(
    "batch",
    [
        {"seq_idx": [[0, 0, 0, 0, 1, 1, 1, 1]], "attention_mask": [[1, 0, 1, 1, 1, 1, 0, 1]]},
        {"cu_seq_lens_q": [0, 4, 8], "attention_mask": [[1, 0, 1, 1, 1, 1, 0, 1]]},
        {"attention_mask": [[1, 0, 1, 1, 2, 2, 0, 2]]},
        {"position_ids": [[0, 1, 2, 3, 0, 1, 2, 3]], "attention_mask": [[1, 0, 1, 1, 1, 1, 0, 1]]},
    ],
)
def test_marked_documents_have_holes(batch: Any) -> None:
    assert found(**batch) == (((0, 4), (4, 8)), ((1, 2), (6, 7)))


def test_documents_that_only_padding_parts_are_not_joined() -> None:
    batch: dict[str, Any] = {
        "seq_idx": [[0, 0, 0, 0, 1, 1, 1, 1]],
        "attention_mask": [[1, 1, 0, 0, 0, 0, 1, 1]],
    }
    assert found(**batch) == (((0, 2), (6, 8)), ())


def test_a_hole_counts_no_label_and_neither_does_the_token_before_it() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1]])
    done = complete({"input_ids": IDS, "labels": IDS, "attention_mask": mask}, BatchLayout(2))
    assert done.tensors["shift_labels"].tolist() == [[6, 7, -100, -100, -100, 11, 12, -100]]
    assert (done.description.rows, done.description.holes) == ((((0, 8),),), (((3, 5),),))
    assert not done.description.is_plain_causal


def test_rows_without_holes_beside_one_with() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])
    assert find_documents({"attention_mask": mask}, 2, 4) == Documents(
        4, (((0, 4),), ((0, 4),)), ((), ((1, 2),))
    )
    assert find_documents({"attention_mask": mask[:1]}, 1, 4).holes == ()


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(1, 16))
def test_who_sees_whom_is_as_token_by_token(data: st.DataObject, length: int) -> None:
    """Two tokens are in one document if no token of another one lies between them; padding is in
    none.
    """
    ids = sorted(data.draw(st.lists(st.integers(0, 3), min_size=length, max_size=length)))
    mask = data.draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
    documents = find_documents(
        {"seq_idx": torch.tensor([ids]), "attention_mask": torch.tensor([mask])}, 1, length
    )
    tokens = documents.token_mask[0].tolist()
    assert tokens == [bool(one) for one in mask]
    together = {
        (a, b)
        for start, stop in documents.rows[0]
        for a in range(start, stop)
        for b in range(start, stop)
        if tokens[a] and tokens[b]
    }
    every = range(length)
    assert together == {
        (a, b) for a in every for b in every if mask[a] and mask[b] and ids[a] == ids[b]
    }
    assert all(tokens[start] and tokens[stop - 1] for start, stop in documents.rows[0])
