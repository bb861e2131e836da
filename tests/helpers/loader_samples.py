"""Datasets and loaders for the data loader's tests: token t of sample i is `100 * (i + 1) + t`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ulysses_accel.dataloader import UlyssesSPDataLoaderAdapter
from ulysses_accel.errors import UlyssesAccelError
from ulysses_accel.sequence.description import DESCRIPTION_KEY

Batch = dict[str, Any]


def sample(index: int, length: int) -> Batch:
    tokens = torch.arange(length) + 100 * (index + 1)
    return {"input_ids": tokens, "labels": tokens.clone()}


class Samples(Dataset[Batch]):
    """Map-style; `base` shifts the sample numbers; `fail_at` raises there; `loaded` counts
    accesses.
    """

    def __init__(
        self, count: int, length: int = 4, base: int = 0, fail_at: int | None = None
    ) -> None:
        self.count, self.length, self.base, self.fail_at = count, length, base, fail_at
        self.loaded = 0
        self.epoch = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        self.loaded += 1
        if index == self.fail_at:
            raise OSError("disk read failed")
        return sample(self.base + index, self.length)


class Stream(IterableDataset[Batch]):
    """Iterable, without a length; split over workers; its samples start at 1000 for each epoch that
    was set.
    """

    def __init__(self, count: int, length: int = 4, base: int = 0) -> None:
        self.count, self.length, self.base = count, length, base
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        info = torch.utils.data.get_worker_info()
        start, step = (info.id, info.num_workers) if info else (0, 1)
        for index in range(start, self.count, step):
            yield sample(self.base + index + 1000 * self.epoch, self.length)


def stack(samples: list[Batch]) -> Batch:
    return {key: torch.stack([one[key] for one in samples]) for key in samples[0]}


def loader(dataset: Any, batch_size: int = 1, **options: Any) -> DataLoader[Any]:
    return DataLoader(
        dataset, batch_size=batch_size, collate_fn=options.pop("collate_fn", stack), **options
    )


def from_list(batches: list[Any]) -> DataLoader[Any]:
    """A loader that yields these very batches."""
    return DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]


def adapt(dl: Any, size: int | None = None, **options: Any) -> UlyssesSPDataLoaderAdapter:
    """An adapter over the world group, or for one process alone where there is none."""
    device = options.pop("device", None)
    if not dist.is_initialized():
        return UlyssesSPDataLoaderAdapter(dl, 0, None, size or 1, device, **options)
    group = dist.group.WORLD
    return UlyssesSPDataLoaderAdapter(
        dl, dist.get_rank(), group, dist.get_world_size(), device, **options
    )


def plain(batch: Batch) -> Batch:
    """The batch with its description as lists, as a forked rank can return it."""
    found = {
        key: value.tolist() if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }
    description = found.pop(DESCRIPTION_KEY)
    found["rows"] = [[list(segment) for segment in row] for row in description.rows]
    found["whole"] = [description.sequence_length, description.num_shards]
    return found


def ids(batch: Batch) -> list[list[int]]:
    found: list[list[int]] = batch["input_ids"].tolist()
    return found


def error_of(function: Any, *args: Any) -> str:
    """Returns `Type: message` of the package's error that the call raises, "" when it returns."""
    try:
        function(*args)
    except UlyssesAccelError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def joined(ranks: list[list[Batch]]) -> list[list[list[int]]]:
    """The token ids of each micro-step, put together from all ranks' shards."""
    return [
        [
            [token for step in steps for token in step["input_ids"][row]]
            for row in range(len(steps[0]["input_ids"]))
        ]
        for steps in zip(*ranks)
    ]
