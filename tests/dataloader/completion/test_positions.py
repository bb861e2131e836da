"""Positions that the batch does not give are those that the model would have made of the whole
sequence.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

from ulysses_accel.dataloader.batch_layout import BatchLayout
from ulysses_accel.dataloader.completion.complete import complete
from ulysses_accel.dataloader.completion.full_batch import FullBatch
from ulysses_accel.errors import BatchError
from ulysses_accel.sequence.batch_rules import BatchRules

IDS = torch.tensor([[5, 6, 7, 8, 9]])
COUNTS = BatchRules(counts_mask=True)
OFFSET = BatchRules(padding_idx=1)
TWO = BatchLayout(2)


def positions(batch: dict[str, Any], rules: BatchRules, layout: BatchLayout = TWO) -> list[Any]:
    found: list[Any] = complete(batch, layout, rules).tensors["position_ids"].tolist()
    return found


def test_positions_counted_by_the_mask() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    assert positions({"input_ids": IDS, "attention_mask": mask}, COUNTS) == [[-1, -1, 0, 1, 2, -1]]
    assert positions({"input_ids": IDS, "attention_mask": 1 - mask}, COUNTS) == [
        [0, 1, -1, -1, -1, -1]
    ]
    assert positions({"input_ids": IDS}, COUNTS) == [[0, 1, 2, 3, 4, -1]]
    hole = torch.tensor([[1, 0, 1, 1, 1]])
    assert positions({"input_ids": IDS, "attention_mask": hole}, COUNTS) == [[0, -1, 1, 2, 3, -1]]


def test_positions_behind_the_padding_token() -> None:
    tokens = torch.tensor([[1, 7, 1, 8, 9]])
    assert positions({"input_ids": tokens}, OFFSET) == [[1, 2, 1, 3, 4, 1]]
    # The model looks at its tokens, not at the mask.
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    assert positions({"input_ids": tokens, "attention_mask": mask}, OFFSET) == [[1, 2, 1, 3, 4, 1]]
    assert positions({"inputs_embeds": torch.zeros(1, 5, 2)}, OFFSET) == [[2, 3, 4, 5, 6, 1]]
    assert positions({"input_ids": IDS}, BatchRules(padding_idx=0)) == [[1, 2, 3, 4, 5, 0]]


def test_marked_documents_count_anew() -> None:
    bounds = {"cu_seq_lens_q": torch.tensor([0, 2, 5])}
    marked = {
        "seq_idx": torch.tensor([[0, 0, 1, 1, 1]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0, 1]]),
    }
    assert positions({"input_ids": IDS, **bounds}, OFFSET) == [[2, 3, 2, 3, 4, 1]]
    assert positions({"input_ids": IDS, **bounds}, COUNTS) == [[0, 1, 0, 1, 2, -1]]
    assert positions({"input_ids": IDS, **marked}, COUNTS) == [[0, 1, 0, -1, 1, -1]]
    assert positions({"input_ids": IDS, **marked}, OFFSET) == [[2, 3, 2, 1, 3, 1]]


@pytest.mark.parametrize("rules", [COUNTS, OFFSET, BatchRules()])
def test_given_positions_are_never_changed(rules: BatchRules) -> None:
    given_ids = torch.tensor([[3, 4, 5, 9, 10]])
    assert positions({"input_ids": IDS, "position_ids": given_ids}, rules) == [[3, 4, 5, 9, 10, 10]]


def test_the_longest_position_is_the_batchs_own() -> None:
    def longest(**batch: Any) -> Any:
        return complete({"input_ids": IDS, **batch}, BatchLayout(4)).description.longest_position

    assert longest() == 4
    assert longest(position_ids=torch.tensor([[0, 1, 2, 0, 1]])) == 2
    planes = torch.stack([torch.zeros(1, 5, dtype=torch.long), torch.arange(5)[None] + 7])
    assert longest(position_ids=torch.cat([planes, planes[:1]])) == 11
    assert complete({"input_ids": IDS}, BatchLayout(4), OFFSET).description.longest_position == 6


def test_padding_stays_within_the_models_table_of_positions() -> None:
    table = 5  # positions 0 to 4, all of which the batch uses
    for layout in (BatchLayout(4), BatchLayout(2, sequence_length=64), BatchLayout(3, ring_size=3)):
        assert max(positions({"input_ids": IDS}, BatchRules(), layout)[0]) < table


def test_positions_that_are_no_tensor() -> None:
    with pytest.raises(BatchError, match="'position_ids' is a list"):
        complete({"input_ids": IDS, "position_ids": [0, 1, 2, 3, 4]}, BatchLayout(2))
    assert positions({"input_ids": IDS, "position_ids": None}, BatchRules()) == [[0, 1, 2, 3, 4, 4]]


def cut(whole: FullBatch) -> torch.Tensor:
    return whole.tensors["position_ids"][:, : whole.tensors["input_ids"].shape[1]]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 12), st.integers(1, 3), st.integers(0, 3))
def test_positions_are_those_of_the_models_themselves(
    data: st.DataObject, length: int, rows: int, padding_idx: int
) -> None:
    numbers = st.lists(st.integers(0, 3), min_size=length * rows, max_size=length * rows)
    tokens = torch.tensor(data.draw(numbers)).view(rows, length)
    mask = (torch.tensor(data.draw(numbers)).view(rows, length) > 0).long()
    batch = {"input_ids": tokens, "attention_mask": mask}

    theirs = RobertaEmbeddings.create_position_ids_from_input_ids(tokens, padding_idx)
    assert torch.equal(
        cut(complete(batch, BatchLayout(1), BatchRules(padding_idx=padding_idx))), theirs
    )

    # Each row of the table is its own number, so that the embedding says which position it looked
    # up.
    table = OPTLearnedPositionalEmbedding(length, 1)
    with torch.no_grad():
        table.weight.copy_(torch.arange(length + 2.0)[:, None])
    ours = cut(complete(batch, BatchLayout(1), COUNTS))
    assert torch.equal(table(mask), table(mask, position_ids=ours))
