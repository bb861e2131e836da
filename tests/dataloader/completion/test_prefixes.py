"""Prefix lengths become part of the description, and must fit the documents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.loader_samples import adapt, error_of, from_list
from tests.helpers.ranks import run_ranks
from ulysses_accel.dataloader.batch_layout import BatchLayout
from ulysses_accel.dataloader.completion.complete import complete
from ulysses_accel.errors import BatchError
from ulysses_accel.sequence.description import DESCRIPTION_KEY

IDS = torch.arange(10).view(2, 5)
PACKED = torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]])


def prefixes(given: Any, **batch: Any) -> Any:
    done = complete({"input_ids": IDS, "prefix_lengths": given, **batch}, BatchLayout(2))
    assert "prefix_lengths" not in {**done.tensors, **done.extras}
    return done.description.prefixes


@pytest.mark.parametrize(
    "given", [torch.tensor([2, 0]), [2, 0], torch.tensor([[2], [0]]), [[2], [0]]]
)
def test_one_number_for_each_row(given: Any) -> None:
    assert prefixes(given) == ((2,), (0,))


@pytest.mark.parametrize("given", [torch.tensor([[1, 3], [5, 0]]), [[1, 3], [5]]])
def test_one_number_for_each_document(given: Any) -> None:
    assert prefixes(given, position_ids=PACKED) == ((1, 3), (5,))


def test_no_prefix_at_all() -> None:
    assert prefixes(torch.zeros(2, dtype=torch.long)) == prefixes(None) == ()


def test_a_row_of_padding() -> None:
    mask = torch.tensor([[0, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
    assert prefixes([0, 4], attention_mask=mask) == ((), (4,))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([2], "has 1 rows, the batch has 2"),
        ([-1, 0], "has -1 for a document of row 0 with 5 tokens"),
        ([0, 6], "has 6 for a document of row 1 with 5 tokens"),
        ([[1, 1], [0, 0]], r"has \[1, 1\] for row 0, which has 1 documents"),
        (torch.tensor([0.5, 1.0]), "should be the number of tokens"),
        ("ab", "should be the number of tokens"),
        ([None, 1], "should be the number of tokens"),
        (torch.tensor([True, False]), "should be the number of tokens"),
        (torch.ones(2, 1, 1, dtype=torch.long), "should be the number of tokens"),
    ],
)
def test_prefixes_that_do_not_fit(given: Any, message: str) -> None:
    with pytest.raises(BatchError, match=message):
        prefixes(given)


def test_one_number_does_not_do_for_several_documents() -> None:
    with pytest.raises(BatchError, match=r"has \[1\] for row 0, which has 2 documents"):
        prefixes(torch.tensor([1, 1]), position_ids=PACKED)


def test_prefixes_and_holes_travel_to_the_other_ranks() -> None:
    def body() -> Any:
        rank = dist.get_rank()
        batch = {
            "input_ids": IDS[:1] + rank,
            "attention_mask": torch.tensor([[1, 0, 1, 1, 1]]),
            "prefix_lengths": torch.tensor([2 + rank]),
        }
        described = [step[DESCRIPTION_KEY] for step in adapt(from_list([batch]))]
        return [[list(one.prefixes), list(one.holes), one.longest_position] for one in described]

    assert run_ranks(body, 2) == [[[[(2 + rank,)], [((1, 2),)], 4] for rank in (0, 1)]] * 2


def test_ranks_that_read_other_prefixes_are_found_out() -> None:
    def body() -> str:
        batch = {"input_ids": IDS, "prefix_lengths": [dist.get_rank(), 0]}
        return error_of(lambda: list(adapt(from_list([batch]), same_batch=True)))

    messages = run_ranks(body, 2)
    assert messages[0] == messages[1]
    assert "drew different batches (same_batch=True)" in messages[0]
