"""Skipping micro-steps, accelerate's loaders inside of the adapter, layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import RandomSampler

from tests.helpers.loader_samples import (
    Samples,
    Stream,
    adapt,
    error_of,
    ids,
    joined,
    loader,
    plain,
    sample,
    stack,
)
from tests.helpers.ranks import run_ranks
from ulysses_accel.dataloader import skip_first_batches
from ulysses_accel.sequence.description import DESCRIPTION_KEY


def tokens(index: int, length: int = 4) -> list[list[int]]:
    """One row: what `sample` gives."""
    return [sample(index, length)["input_ids"].tolist()]


@pytest.mark.parametrize("skip", [0, 1, 3, 5, 6, 9])
def test_our_skip_counts_micro_steps(skip: int) -> None:
    def body() -> Any:
        found = []
        for same in (True, False):
            adapter = adapt(
                loader(Samples(6 if same else 3, base=0 if same else 10 * dist.get_rank())),
                same_batch=same,
            )
            everything = [ids(batch) for batch in adapter]
            skipped = skip_first_batches(adapter, skip)
            found.append(
                [
                    len(skipped),
                    [ids(batch) for batch in skipped] == everything[skip:],
                    len(list(adapter)),
                ]
            )
        return found

    assert run_ranks(body, 2) == [[[max(0, 6 - skip), True, 6]] * 2] * 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("iterable", [False, True])
def test_accelerates_own_skip_keeps_the_shards(workers: int, iterable: bool) -> None:
    """Transformers' Trainer calls accelerate's module function on whatever loader it has."""

    def body() -> Any:
        from accelerate import skip_first_batches as stock
        from accelerate.state import PartialState

        PartialState(cpu=True)
        data: Any = Stream(4) if iterable else Samples(4)
        adapter = adapt(loader(data, num_workers=workers), same_batch=True)
        return [
            [plain(batch) for batch in stock(adapter, 2)],
            [plain(batch) for batch in adapter][2:],
        ]

    ranks = run_ranks(body, 2, env={"ACCELERATE_USE_CPU": "true"})
    assert [len(rank[0]) for rank in ranks] == [2, 2]
    if not (
        iterable and workers
    ):  # two workers deal the stream's samples out in turn, from its beginning
        assert joined([rank[0] for rank in ranks]) == [tokens(2), tokens(3)]
    for skipped, rest in ranks:
        assert skipped == rest


def test_accelerates_own_skip_is_refused_where_it_cannot_be_right() -> None:
    def body() -> str:
        from accelerate import skip_first_batches as stock
        from accelerate.state import PartialState

        PartialState(cpu=True)
        return error_of(lambda: list(stock(adapt(loader(Samples(4, base=dist.get_rank()))), 1)))

    for message in run_ranks(body, 2, env={"ACCELERATE_USE_CPU": "true"}):
        assert message.startswith("BatchError: this loader was rebuilt")
        assert "skip_first_batches" in message


def test_around_accelerates_loader_the_gradient_state_is_in_step() -> None:
    def body() -> Any:
        from accelerate.data_loader import DataLoaderShard, prepare_data_loader, skip_first_batches
        from accelerate.state import GradientState, PartialState

        PartialState(cpu=True)
        inner = prepare_data_loader(
            loader(Samples(3)), num_processes=1, process_index=0, put_on_device=False
        )
        adapter = adapt(inner, same_batch=True)
        state = GradientState()
        found = []
        for dl in (adapter, skip_first_batches(adapter, 1), adapter):
            found.append(
                [[ids(batch)[0][0], state.end_of_dataloader, state.in_dataloader] for batch in dl]
            )
        return [
            found,
            isinstance(adapter, DataLoaderShard),
            adapter.iteration,
            adapter.state_dict()["epoch"],
        ]

    first, second = run_ranks(body, 2, env={"ACCELERATE_USE_CPU": "true"})
    for rank, (found, is_shard, iteration, epoch) in enumerate((first, second)):
        steps = [[100 * (i + 1) + 2 * rank, i == 2, True] for i in range(3)]
        assert found == [steps, steps[1:], steps]
        assert is_shard
        assert iteration == epoch == 2


def test_epochs_are_counted_once_when_the_first_was_a_rest() -> None:
    def body() -> Any:
        from accelerate.data_loader import prepare_data_loader
        from accelerate.state import PartialState

        PartialState(cpu=True)
        inner = prepare_data_loader(loader(Samples(3)), num_processes=1, process_index=0)
        adapter = adapt(inner, same_batch=True)
        counts = []
        for dl in (adapter.skip_first_batches(1), adapter, adapter):
            list(dl)
            counts.append([adapter.iteration, dl.state_dict()["epoch"]])
        return counts

    assert run_ranks(body, 1, env={"ACCELERATE_USE_CPU": "true"}) == [[[1, 1], [2, 2], [3, 3]]]


def test_all_ranks_know_the_last_step_that_only_one_saw_coming() -> None:
    class Knowing:
        """Like accelerate's loader, it says with a batch that it is the last."""

        def __init__(self, count: int) -> None:
            self.dataset, self.end_of_dataloader = Samples(count), False

        def __iter__(self) -> Any:
            for index in range(len(self.dataset)):
                self.end_of_dataloader = index == len(self.dataset) - 1
                yield stack([self.dataset[index]])

    def body() -> Any:
        adapter = adapt(Knowing(2 + dist.get_rank()), same_batch=True, on_uneven="drop")
        return [adapter.end_of_dataloader for _ in adapter]

    assert run_ranks(body, 2) == [[False, True]] * 2


@pytest.mark.parametrize("same", [True, False])
def test_a_ring_layout_is_told_in_both_modes(same: bool) -> None:
    def body() -> Any:
        dl = loader(Samples(1, length=8, base=0 if same else dist.get_rank()))
        steps = list(adapt(dl, same_batch=same, ring_size=2, ring_layout="zigzag"))
        return [
            [ids(step)[0], step[DESCRIPTION_KEY].ring_size, step[DESCRIPTION_KEY].layout]
            for step in steps
        ]

    order = [[0, 1, 6, 7], [2, 3, 4, 5]]
    for found, places in zip(run_ranks(body, 2), order):
        assert found == [
            [[100 * (step + 1) + t for t in places], 2, "zigzag"]
            for step in range(1 if same else 2)
        ]


def test_shuffling_follows_the_wrapped_loader() -> None:
    torch.manual_seed(5)
    direct = [
        batch["input_ids"].tolist() for _ in range(2) for batch in loader(Samples(6), shuffle=True)
    ]
    torch.manual_seed(5)
    inner = loader(Samples(6), shuffle=True)
    adapter = adapt(inner)
    assert [ids(batch) for _ in range(2) for batch in adapter] == direct
    assert isinstance(adapter.sampler, RandomSampler)


def test_a_fixed_length_over_ranks() -> None:
    def body() -> Any:
        adapter = adapt(
            loader(Samples(1, length=5)), same_batch=True, sequence_length=12, pad_token_id=9
        )
        return [plain(batch) for batch in adapter]

    ranks = run_ranks(body, 3)
    assert joined(ranks) == [[tokens(0, 5)[0] + [9] * 7]]
    assert [rank[0]["shift_labels"] for rank in ranks] == [
        [[101, 102, 103, 104]],
        [[-100] * 4],
        [[-100] * 4],
    ]


def test_stack_is_what_the_samples_say() -> None:
    assert stack([sample(0, 2), sample(1, 2)])["input_ids"].tolist() == [[100, 101], [200, 201]]
