"""Faults in the batches of one rank: handled, or the same typed error on every rank, and never a
hang.

The numbers are those of the fault list that DeepSpeed's adapter was measured with. Every case has a
timeout far below that of the process group.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from tests.helpers.loader_samples import (
    Samples,
    adapt,
    error_of,
    from_list,
    joined,
    loader,
    plain,
    stack,
)
from tests.helpers.ranks import RankFailure, run_ranks

T = 20.0


def batch(
    rank: int, step: int = 0, length: int = 8, rows: int = 1, dtype: torch.dtype = torch.long
) -> dict[str, Any]:
    tokens = (torch.arange(rows * length).view(rows, length) + 1000 * rank + 100 * step).to(dtype)
    return {
        "input_ids": tokens,
        "labels": tokens.clone(),
        "position_ids": torch.arange(length).expand(rows, length),
    }


def outcome(make: Callable[[int], Any], **options: Any) -> tuple[list[Any], list[str]]:
    """Iterates an adapter over `make(rank)` on two ranks, then meets in a collective; steps and
    errors by rank.
    """

    def body() -> Any:
        steps: list[Any] = []

        def run() -> None:
            for step in adapt(make(dist.get_rank()), **options):
                steps.append(plain(step))

        message = error_of(run)
        dist.all_reduce(torch.ones(1))  # both ranks have left the loader in step
        return [steps, message]

    ranks = run_ranks(body, 2, timeout=T)
    return [rank[0] for rank in ranks], [rank[1] for rank in ranks]


def expect_handled(make: Callable[[int], Any], steps: int, **options: Any) -> list[Any]:
    ranks, errors = outcome(make, **options)
    assert errors == ["", ""]
    assert [len(rank) for rank in ranks] == [steps, steps]
    return ranks


def expect_refused(make: Callable[[int], Any], kind: str, *parts: str, **options: Any) -> str:
    _, errors = outcome(make, **options)
    assert errors[0] == errors[1]
    assert errors[0].startswith(f"{kind}: ")
    for part in parts:
        assert part in errors[0]
    return errors[0]


def one(**changes: Any) -> Callable[[int], Any]:
    """A loader of one batch whose entries are changed on rank 1; None drops the key."""

    def make(rank: int) -> Any:
        entries = batch(rank)
        if rank == 1:
            entries.update(changes)
        return from_list([{key: value for key, value in entries.items() if value is not None}])

    return make


def test_f00_healthy() -> None:
    ranks = expect_handled(lambda rank: from_list([batch(rank, step) for step in range(3)]), 6)
    assert joined(ranks) == [
        batch(rank, step)["input_ids"].tolist() for step in range(3) for rank in range(2)
    ]


def uneven(rank: int) -> Any:
    return from_list([batch(rank, step) for step in range(3 - rank)])


def test_f01_a_rank_runs_out_of_batches() -> None:
    expect_refused(
        uneven,
        "RankDisagreementError",
        "ranks [1] ran out of batches while ranks [0] still have data",
    )


def test_f01_drop_stops_all_at_the_first_end() -> None:
    ranks = expect_handled(uneven, 4, on_uneven="drop")
    assert joined(ranks) == [
        batch(rank, step)["input_ids"].tolist() for step in range(2) for rank in range(2)
    ]


def test_f01_pad_counts_each_label_once() -> None:
    ranks = expect_handled(uneven, 6, on_uneven="pad")
    assert all(label == -100 for rank in ranks for label in rank[-1]["shift_labels"][0])
    counted = sorted(
        label
        for rank in ranks
        for step in rank
        for label in step["shift_labels"][0]
        if label != -100
    )
    batches = [(rank, step) for rank in range(2) for step in range(3 - rank)]
    assert counted == sorted(
        label for place in batches for label in batch(*place)["labels"][0, 1:].tolist()
    )


def test_f01_pad_with_a_rank_that_never_had_data() -> None:
    ranks = expect_handled(lambda rank: from_list([batch(rank)] * (1 - rank)), 2, on_uneven="pad")
    assert [step["rows"] for step in ranks[1]] == [[[[0, 8]]]] * 2


def test_f01_pad_needs_labels() -> None:
    def make(rank: int) -> Any:
        return from_list(
            [{"input_ids": batch(rank, step)["input_ids"]} for step in range(2 - rank)]
        )

    expect_refused(make, "BatchError", "have no labels", on_uneven="pad")


def test_f01_the_same_batches_but_one_is_missing() -> None:
    def make(rank: int) -> Any:
        return from_list([batch(0, step) for step in range(3 - rank)])

    expect_refused(make, "RankDisagreementError", "ranks [1] ran out of batches", same_batch=True)
    expect_handled(make, 2, same_batch=True, on_uneven="drop")


def test_f02_batch_sizes_differ() -> None:
    ranks = expect_handled(lambda rank: from_list([batch(rank, rows=2 - rank)]), 2)
    assert [len(step["input_ids"]) for step in ranks[0]] == [2, 1]
    expect_refused(
        lambda rank: from_list([batch(0, rows=2 - rank)]),
        "RankDisagreementError",
        "'input_ids' int64 [2 x 8]",
        "'input_ids' int64 [1 x 8]",
        same_batch=True,
    )


def test_f02b_batch_size_two() -> None:
    assert (
        joined(expect_handled(lambda rank: from_list([batch(rank, rows=2)]), 2))[1]
        == batch(1, rows=2)["input_ids"].tolist()
    )


def test_f03_lengths_differ() -> None:
    ranks = expect_handled(lambda rank: from_list([batch(rank, length=8 + 4 * rank)]), 2)
    assert [step["whole"] for step in ranks[0]] == [[8, 2], [12, 2]]


def test_f04_a_length_that_does_not_divide() -> None:
    for uneven_rank in (0, 1):  # F04b: on one rank only
        ranks = expect_handled(
            lambda rank, on=uneven_rank: from_list([batch(rank, length=7 if rank >= on else 8)]), 2
        )
        assert joined(ranks)[1] == [[*batch(1, length=7)["input_ids"][0].tolist(), 0]]
        assert [rank[1]["shift_labels"][0][-1] for rank in ranks][1] == -100


def test_f05_positions_are_missing_on_one_rank() -> None:
    ranks = expect_handled(one(position_ids=None), 2)
    assert [step["position_ids"] for step in ranks[1]] == [[[4, 5, 6, 7]]] * 2


def test_f06_no_labels() -> None:
    ranks = expect_handled(lambda rank: from_list([{"input_ids": batch(rank)["input_ids"]}]), 2)
    assert "shift_labels" not in ranks[0][0]
    expect_refused(
        one(labels=None),
        "RankDisagreementError",
        "'shift_labels' int64 2-D",
        "nothing more on ranks [1]",
    )


def test_f07_a_further_key_on_one_rank() -> None:
    expect_refused(
        one(weights=torch.ones(1, 8)),
        "RankDisagreementError",
        "'weights' float32 2-D sharded on dim 1 on ranks [1]",
    )


def test_f07b_another_order_of_keys() -> None:
    expect_handled(
        lambda rank: from_list([dict(sorted(batch(rank).items(), reverse=rank == 1))]), 2
    )


def test_f08_dtypes_differ() -> None:
    expect_refused(
        one(input_ids=batch(1, dtype=torch.int32)["input_ids"]),
        "RankDisagreementError",
        "'input_ids' int64 2-D sharded on dim 1 on ranks [0]",
        "'input_ids' int32 2-D sharded on dim 1 on ranks [1]",
    )


def test_f09_more_dims() -> None:
    ranks = expect_handled(
        lambda rank: from_list([{**batch(rank), "extra": torch.full((1, 8, 3), float(rank))}]), 2
    )
    assert [step["extra"] for step in ranks[0]] == [
        [[[float(source)] * 3] * 4] for source in range(2)
    ]
    expect_refused(
        lambda rank: from_list([{**batch(rank), "extra": torch.zeros(1, 8, 8)}]),
        "BatchError",
        "batch_schema={'extra'",
    )


def test_f10_entries_that_are_no_tensors() -> None:
    ranks = expect_handled(
        lambda rank: from_list([{**batch(rank), "name": f"doc {rank}", "n": None, "l": [1, "a"]}]),
        2,
    )
    assert [(step["name"], step["n"], step["l"]) for step in ranks[1]] == [
        (f"doc {r}", None, [1, "a"]) for r in (0, 1)
    ]


@pytest.mark.parametrize(("rows", "length"), [(1, 0), (0, 8)])
def test_f11_empty_batches(rows: int, length: int) -> None:
    sentence = expect_refused(
        one(**batch(1, rows=rows, length=length)), "BatchError", f"{rows} rows of {length} tokens"
    )
    assert sentence.startswith(
        "BatchError: rank 1 failed to produce a batch: BatchError: the batch is empty"
    )


def test_f12_the_dataset_raises_on_one_rank() -> None:
    for workers in (0, 1):
        expect_refused(
            lambda rank, n=workers: loader(
                Samples(4, base=10 * rank, fail_at=2 if rank else None), num_workers=n
            ),
            "BatchError",
            "rank 1 failed to produce a batch: OSError: ",
            "disk read failed",
        )


def test_f12_the_cause_is_chained_on_the_failing_rank() -> None:
    def body() -> str:
        try:
            list(
                adapt(
                    loader(
                        Samples(
                            2, base=10 * dist.get_rank(), fail_at=1 if dist.get_rank() else None
                        )
                    )
                )
            )
        except RuntimeError as error:
            return type(error.__cause__).__name__
        return "no error"

    assert run_ranks(body, 2, timeout=T) == ["NoneType", "OSError"]


def test_f12_an_epoch_that_cannot_even_start() -> None:
    class Broken:
        dataset = ()

        def __iter__(self) -> Any:
            raise FileNotFoundError("shards are gone")

    expect_refused(
        lambda rank: Broken() if rank else from_list([batch(0)]),
        "BatchError",
        "rank 1 failed to produce a batch: FileNotFoundError: shards are gone",
    )


class Dying(Dataset[Any]):
    """Its worker process ends without a word."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        if index == 1:
            os._exit(3)
        return Samples(3)[index]


def test_f13_a_worker_dies() -> None:
    expect_refused(
        lambda rank: loader(Dying() if rank else Samples(3, base=10), num_workers=1),
        "BatchError",
        "rank 1 failed to produce a batch: RuntimeError: DataLoader worker",
        "exited unexpectedly",
    )


def test_f14_a_rank_is_killed() -> None:
    def body() -> None:
        rank = dist.get_rank()

        class Killing(Samples):
            def __getitem__(self, index: int) -> Any:
                if rank == 1 and index == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().__getitem__(index)

        sentence = error_of(lambda: list(adapt(loader(Killing(3, base=10 * rank)))))
        os.write(
            1, f"SURVIVOR: {sentence}".encode()
        )  # the rank's log; pytest has its own sys.stdout

    with pytest.raises(
        RankFailure,
        match="SURVIVOR: RankDisagreementError: rank 0 lost contact with the other ranks",
    ):
        run_ranks(body, 2, timeout=T)


def test_f16_scalars_and_one_number_for_each_sample() -> None:
    ranks = expect_handled(
        lambda rank: from_list(
            [{**batch(rank, rows=2), "s": torch.tensor(rank), "each": torch.tensor([rank, 7])}]
        ),
        2,
    )
    assert [(step["s"], step["each"]) for step in ranks[0]] == [(0, [0, 7]), (1, [1, 7])]


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def test_f17_objects_are_not_sent(tmp_path: Path) -> None:
    canary = tmp_path / "executed"
    expect_refused(
        one(extra=Evil(str(canary))),
        "BatchError",
        "rank 1",
        "'extra' holds a Evil, which is not sent",
    )
    expect_refused(one(extra=[{"a": Evil(str(canary))}]), "BatchError", "'extra' holds a Evil")
    assert not canary.exists()


def test_f20_three_position_planes() -> None:
    def make(rank: int) -> Any:
        return from_list([{**batch(rank), "position_ids": torch.arange(8).expand(3, 1, 8)}])

    assert expect_handled(make, 2)[1][0]["position_ids"] == [[[4, 5, 6, 7]]] * 3


def test_f21_the_same_batch_where_it_must_differ() -> None:
    def make(rank: int) -> Any:
        return from_list([batch(0), batch(0)])

    expect_refused(
        make,
        "RankDisagreementError",
        "ranks [0, 1] drew the same first batch",
        "DistributedSampler",
    )
    expect_handled(make, 4, allow_duplicates=True)


def test_f21_different_batches_where_they_must_be_the_same() -> None:
    expect_refused(
        lambda rank: from_list([batch(0), batch(rank)]),
        "RankDisagreementError",
        "ranks of one sequence group drew different batches",
        "on ranks [0]",
        "on ranks [1]",
        same_batch=True,
    )


def test_all_ranks_fail_alike() -> None:
    expect_refused(
        lambda rank: from_list([{**batch(0), "attention_mask": torch.ones(1, 1, 8, 8)}]),
        "BatchError",
        "ranks [0, 1] failed to produce a batch: BatchError: the 4-D 'attention_mask' has values "
        "that change scores",
        same_batch=True,
    )


def test_too_many_keys() -> None:
    expect_refused(
        lambda rank: from_list([{**batch(rank), **{f"k{i}": torch.tensor(i) for i in range(40)}}]),
        "BatchError",
        "has 43 tensors",
    )


def test_a_fixed_length_is_exceeded_on_one_rank() -> None:
    expect_refused(
        lambda rank: from_list([batch(rank, length=8 + 2 * rank)]),
        "BatchError",
        "rank 1",
        "has 10 tokens in a row, but sequence_length=8 is fixed",
        sequence_length=8,
    )


def test_an_error_ahead_is_raised_in_its_turn() -> None:
    """The refill is drawn one step ahead; what went before is delivered first."""
    ranks, errors = outcome(
        lambda rank: loader(Samples(4, base=10 * rank, fail_at=2 if rank else None))
    )
    assert [len(rank) for rank in ranks] == [4, 4]
    assert errors[0] == errors[1] != ""


def test_a_collate_function_that_fails_on_one_rank() -> None:
    def bad(samples: Any) -> Any:
        raise KeyError("text")

    expect_refused(
        lambda rank: loader(Samples(2, base=rank), collate_fn=bad if rank else stack),
        "BatchError",
        "rank 1 failed to produce a batch: KeyError: 'text'",
    )
