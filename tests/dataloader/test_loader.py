"""The adapter over real loaders: what each rank gets, in both modes, and how it behaves as a data
loader.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

from tests.helpers.loader_samples import (
    Samples,
    Stream,
    adapt,
    error_of,
    from_list,
    ids,
    joined,
    loader,
    plain,
    sample,
)
from tests.helpers.ranks import run_ranks
from ulysses_accel.dataloader import UlyssesSPDataLoaderAdapter
from ulysses_accel.errors import ConfigError


def tokens(index: int, length: int = 4) -> list[list[int]]:
    """One row: what `sample` gives."""
    return [sample(index, length)["input_ids"].tolist()]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_same_batch_gives_each_rank_its_shard(size: int, workers: int) -> None:
    def body() -> Any:
        adapter = adapt(loader(Samples(3), num_workers=workers), same_batch=True)
        return [
            len(adapter),
            [plain(batch) for batch in adapter],
            [plain(batch) for batch in adapter],
        ]

    ranks = run_ranks(body, size)
    assert [rank[0] for rank in ranks] == [3] * size
    for epoch in (1, 2):
        assert joined([rank[epoch] for rank in ranks]) == [tokens(0), tokens(1), tokens(2)]
    labels = [
        [label for rank in ranks for label in rank[1][step]["shift_labels"][0]] for step in range(3)
    ]
    assert labels == [[*tokens(step)[0][1:], -100] for step in range(3)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_own_batches_become_micro_steps(size: int, workers: int) -> None:
    def body() -> Any:
        adapter = adapt(loader(Samples(2, base=10 * dist.get_rank()), num_workers=workers))
        return [len(adapter), [plain(batch) for batch in adapter]]

    ranks = run_ranks(body, size)
    assert [rank[0] for rank in ranks] == [2 * size] * size
    assert joined([rank[1] for rank in ranks]) == [
        tokens(10 * rank + step) for step in range(2) for rank in range(size)
    ]


def test_own_batches_may_differ_in_length_and_rows() -> None:
    def body() -> Any:
        rank = dist.get_rank()
        adapter = adapt(
            loader(Samples(1 + rank, length=3 + 4 * rank, base=10 * rank), batch_size=1 + rank)
        )
        return [plain(batch) for batch in adapter]

    ranks = run_ranks(body, 2)
    padded = [tokens(0, 3)[0] + [0]], [tokens(10, 7)[0] + [0], tokens(11, 7)[0] + [0]]
    assert joined(ranks) == list(padded)
    assert [step["whole"] for step in ranks[0]] == [[4, 2], [8, 2]]
    assert [step["rows"] for step in ranks[1]] == [[[[0, 3]]], [[[0, 7]], [[0, 7]]]]


def test_every_kind_of_entry_arrives() -> None:
    def batch(rank: int) -> Any:
        tokens = torch.arange(6).view(1, 6) + 100 * rank
        return {
            "input_ids": tokens,
            "labels": tokens,
            "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]], dtype=torch.bool),
            "loss_weights": tokens.to(torch.bfloat16),
            "features": torch.full((1, 6, 3), float(rank), dtype=torch.float64),
            "position_ids": torch.arange(6).expand(3, 1, 6),
            "grid": torch.tensor([[rank, 2, 3]], dtype=torch.int32),
            "scale": torch.tensor(rank + 0.5),
            "each": torch.tensor([rank], dtype=torch.uint8),
            "name": f"sample ö {rank}",
            "tags": ["a", {"n": rank}],
            "nothing": None,
        }

    def body() -> Any:
        steps = list(adapt(from_list([batch(dist.get_rank())])))
        kept = [
            [
                str(step["loss_weights"].dtype),
                str(step["features"].dtype),
                list(step["features"].shape),
            ]
            for step in steps
        ]
        return [[plain(step) for step in steps], kept]

    ranks = run_ranks(body, 2)
    for rank, (steps, kept) in enumerate(ranks):
        assert kept == [["torch.bfloat16", "torch.float64", [1, 3, 3]]] * 2
        for source, step in enumerate(steps):
            assert step["name"] == f"sample ö {source}"
            assert (step["tags"], step["nothing"]) == (["a", {"n": source}], None)
            assert (step["scale"], step["each"], step["grid"]) == (
                source + 0.5,
                [source],
                [[source, 2, 3]],
            )
            assert (
                step["attention_mask"] == [[True, True, True]]
                if rank == 0
                else [[True, True, False]]
            )
            assert step["position_ids"] == [[[3 * rank, 3 * rank + 1, 3 * rank + 2]]] * 3
            assert step["rows"] == [[[0, 5]]]


def test_one_exchange_and_one_agreement_per_refill() -> None:
    def body() -> Any:
        counts = []
        for same in (True, False):
            with torch.profiler.profile() as profile:
                steps = len(
                    list(
                        adapt(
                            loader(Samples(3, base=0 if same else 10 * dist.get_rank())),
                            same_batch=same,
                        )
                    )
                )
            calls = {
                event.key: event.count
                for event in profile.key_averages()
                if event.key.startswith("c10d::")
            }
            gathers, exchanges = (
                calls.pop("c10d::_allgather_base_", 0),
                calls.pop("c10d::alltoall_base_", 0),
            )
            assert not calls
            counts.append([steps, gathers, exchanges])
        return counts

    # One more agreement than refills: the common end.
    assert run_ranks(body, 2)[0] == [[3, 4, 0], [6, 4, 3]]


@pytest.mark.parametrize("size", [1, 2])
def test_iterable_datasets(size: int) -> None:
    def body() -> Any:
        found = []
        for workers in (0, 2):
            own = adapt(loader(Stream(3, base=10 * dist.get_rank()), num_workers=workers))
            shared = adapt(loader(Stream(3), num_workers=workers), same_batch=True)
            found += [[plain(batch) for batch in own], [plain(batch) for batch in shared]]
            with pytest.raises(TypeError):
                len(own)
        return found

    ranks = run_ranks(body, size)
    for case in range(4):
        steps = joined([rank[case] for rank in ranks])
        expected = [tokens(i) for i in range(3)]
        if case % 2 == 0:
            expected = [tokens(10 * rank + i) for i in range(3) for rank in range(size)]
        assert sorted(steps) == sorted(expected)


def test_a_break_starts_afresh() -> None:
    adapter = adapt(loader(Samples(5)))
    seen = []
    for batch in adapter:
        seen.append(ids(batch))
        if len(seen) == 3:
            break
    assert [ids(batch) for batch in adapter] == [tokens(index) for index in range(5)]


def test_it_is_its_own_iterator_as_well() -> None:
    adapter = adapt(loader(Samples(3)))
    assert ids(next(adapter)) == tokens(0)
    assert ids(next(adapter)) == tokens(1)
    assert ids(next(iter(adapter))) == tokens(0)
    assert ids(next(adapter)) == tokens(2)
    with pytest.raises(StopIteration):
        next(adapter)
    assert ids(next(adapter)) == tokens(0)


def test_iterators_nest() -> None:
    adapter = adapt(loader(Samples(2)))
    assert [(ids(a), ids(b)) for a in adapter for b in adapter] == [
        (tokens(a), tokens(b)) for a in range(2) for b in range(2)
    ]


def test_no_iterator_before_iter() -> None:
    made = []

    class Watched(Samples):
        def __getitem__(self, index: int) -> Any:
            made.append(index)
            return super().__getitem__(index)

    adapter = adapt(loader(Watched(2)))
    list(adapter)
    assert made == [0, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_epoch_that_was_set_is_the_one_used(workers: int) -> None:
    sampler: Any = DistributedSampler(range(8), num_replicas=1, rank=0, seed=3)  # type: ignore[arg-type]
    adapter = adapt(loader(Samples(8), sampler=sampler, num_workers=workers))
    plain_order = DistributedSampler(range(8), num_replicas=1, rank=0, seed=3)  # type: ignore[arg-type]
    for epoch in (0, 1, 2, 1):
        adapter.set_epoch(epoch)
        plain_order.set_epoch(epoch)
        assert [ids(batch) for batch in adapter] == [tokens(index) for index in plain_order]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_epoch_reaches_iterable_datasets(workers: int) -> None:
    adapter = adapt(loader(Stream(2), num_workers=workers))
    for epoch in (0, 3):
        adapter.set_epoch(epoch)
        assert [ids(batch) for batch in adapter] == [
            tokens(1000 * epoch + index) for index in range(2)
        ]


def test_it_shows_the_wrapped_loader() -> None:
    data = Samples(6)
    inner = loader(data, batch_size=2, num_workers=0, drop_last=True)
    adapter = adapt(inner)
    assert isinstance(adapter, DataLoader)
    assert isinstance(adapter, UlyssesSPDataLoaderAdapter)
    for name in (
        "dataset",
        "sampler",
        "batch_size",
        "batch_sampler",
        "num_workers",
        "drop_last",
        "generator",
        "timeout",
    ):
        assert getattr(adapter, name) is getattr(inner, name), name
    assert adapter.multiprocessing_context is None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = adapter.nonsense


def test_tensors_go_to_the_device_and_own_their_memory() -> None:
    adapter = adapt(loader(Samples(1, length=8)), size=1, device="meta")
    batch = next(iter(adapter))
    assert all(
        value.device.type == "meta" for value in batch.values() if isinstance(value, torch.Tensor)
    )

    def body() -> Any:
        found = []
        for same in (True, False):
            dl = loader(Samples(1, length=8, base=0 if same else dist.get_rank()), batch_size=1)
            for batch in adapt(dl, same_batch=same):
                found += [
                    value.untyped_storage().nbytes()
                    for value in batch.values()
                    if isinstance(value, torch.Tensor)
                ]
        return found

    assert run_ranks(body, 2) == [[4 * 8] * 9] * 2


def test_the_last_micro_step_is_known_before_it_is_yielded() -> None:
    def body() -> Any:
        found = []
        for same, stream in ((True, False), (False, False), (False, True), (True, True)):
            base = 0 if same else 10 * dist.get_rank()
            adapter = adapt(loader((Stream if stream else Samples)(3, base=base)), same_batch=same)
            told: list[bool] = []
            adapter.on_micro_step = told.append
            for _ in range(2):
                before = adapter.end_of_dataloader
                flags = [adapter.end_of_dataloader for _ in adapter]
                found.append([flags, told[-len(flags) :], before])
        return found

    for rank in run_ranks(body, 2):
        for case, (flags, told, _) in enumerate(rank):
            steps = 3 if case // 2 in (0, 3) else 6
            assert flags == told == [False] * (steps - 1) + [True]
        assert rank[0][2] is False


def test_the_last_micro_step_with_uneven_ranks() -> None:
    def body(policy: str) -> Any:
        adapter = adapt(
            loader(Samples(2 + dist.get_rank(), base=10 * dist.get_rank())), on_uneven=policy
        )
        return [adapter.end_of_dataloader for _ in adapter]

    assert run_ranks(body, 2, "drop") == [[False] * 3 + [True]] * 2
    assert run_ranks(body, 2, "pad") == [[False] * 5 + [True]] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_uneven": "ignore"}, "on_uneven='ignore'"),
        ({"on_uneven": "pad", "same_batch": True}, "'pad' only where each rank brings its own"),
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"sp_rank": 2}, "sp_rank=2 is not one of sp_world_size=1"),
        ({"sp_world_size": 2}, "needs the process group"),
    ],
)
def test_arguments_that_are_not_legal(options: dict[str, Any], message: str) -> None:
    arguments = {
        "dl": loader(Samples(1)),
        "sp_rank": 0,
        "sp_group": None,
        "sp_world_size": 1,
        "device": None,
    }
    with pytest.raises(ConfigError, match=message):
        UlyssesSPDataLoaderAdapter(**{**arguments, **options})


def test_the_group_must_fit() -> None:
    def body() -> str:
        make = UlyssesSPDataLoaderAdapter
        return error_of(make, loader(Samples(1)), 0, dist.group.WORLD, 3, None)

    assert all("don't fit the group" in message for message in run_ranks(body, 2))
