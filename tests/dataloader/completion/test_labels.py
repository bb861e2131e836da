"""Labels as the model's loss asks for them: shifted, a token's own, or the sample's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.loader_samples import adapt, from_list, plain
from tests.helpers.ranks import run_ranks
from ulysses_accel.dataloader.batch_layout import BatchLayout
from ulysses_accel.dataloader.completion.complete import complete
from ulysses_accel.errors import BatchError
from ulysses_accel.sequence.batch_rules import BatchRules

IDS = torch.tensor([[5, 6, 7, 8, 9]])
OWN = BatchRules(labels="same_token")
WHOLE = BatchRules(labels="whole")
MASKED = torch.tensor([[-100, 6, -100, 8, 9]])


def test_a_tokens_own_labels_are_only_cut() -> None:
    done = complete({"input_ids": IDS, "labels": MASKED}, BatchLayout(2), OWN)
    assert "shift_labels" not in done.tensors
    assert done.tensors["labels"].tolist() == [[-100, 6, -100, 8, 9, -100]]
    assert [done.local_batch(rank)["labels"].tolist() for rank in (0, 1)] == [
        [[-100, 6, -100]],
        [[8, 9, -100]],
    ]


def test_a_tokens_own_labels_are_dealt_like_the_tokens() -> None:
    layout = BatchLayout(2, ring_size=2, ring_layout="zigzag")
    done = complete(
        {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}, layout, OWN
    )
    assert (
        done.tensors["labels"].tolist()
        == done.tensors["input_ids"].tolist()
        == [[0, 1, 6, 7, 2, 3, 4, 5]]
    )


@pytest.mark.parametrize("mask", [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 1]])
def test_own_labels_on_padding_are_refused(mask: list[int]) -> None:
    batch = {"input_ids": IDS, "labels": IDS, "attention_mask": torch.tensor([mask])}
    with pytest.raises(
        BatchError, match=f"1 labels count on padding, the first in row 0 at token {mask.index(0)}"
    ):
        complete(batch, BatchLayout(2), OWN)
    batch["labels"] = torch.where(batch["attention_mask"] == 1, IDS, -100)
    assert complete(batch, BatchLayout(2), OWN).dims["labels"] == 1


@pytest.mark.parametrize(
    "labels", [torch.tensor([3]), torch.tensor([[0.5, 1.0]]), torch.ones(1, 5), torch.tensor(1)]
)
def test_labels_of_a_sample_stay_whole(labels: torch.Tensor) -> None:
    done = complete({"input_ids": IDS, "labels": labels}, BatchLayout(2), WHOLE)
    assert done.dims["labels"] is None
    assert all(done.local_batch(rank)["labels"] is labels for rank in (0, 1))


def test_own_labels_need_one_for_each_token() -> None:
    with pytest.raises(
        BatchError, match=r"'labels' has shape \[1\], but one for each of \[1, 5\] tokens"
    ):
        complete({"input_ids": IDS, "labels": torch.tensor([3])}, BatchLayout(2), OWN)


def shorter_on_rank_one(rank: int) -> list[Any]:
    tokens = torch.arange(4)[None] + 10 * rank
    return [{"input_ids": tokens + step, "labels": tokens + step} for step in range(2 - rank)]


def test_missing_batches_are_filled_with_own_labels_that_do_not_count() -> None:
    import torch.distributed as dist

    def body(rules: BatchRules) -> Any:
        adapter = adapt(
            from_list(shorter_on_rank_one(dist.get_rank())), on_uneven="pad", rules=rules
        )
        return [plain(batch) for batch in adapter]

    for steps in run_ranks(body, 2, OWN):
        assert [step["labels"] == [[-100, -100]] for step in steps] == [False, False, False, True]
        assert all("shift_labels" not in step for step in steps)


def test_missing_batches_can_not_be_filled_with_labels_of_samples() -> None:
    import torch.distributed as dist

    def body() -> str:
        adapter = adapt(
            from_list(shorter_on_rank_one(dist.get_rank())), on_uneven="pad", rules=WHOLE
        )
        with pytest.raises(BatchError, match="these batches have no labels of tokens") as caught:
            list(adapter)
        return str(caught.value)

    messages = run_ranks(body, 2)
    assert messages[0] == messages[1]
