"""A loader that nobody holds any longer is freed at once, not by the garbage collector: no cycle of
references keeps it, its epoch, or the loader that it wraps.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.state import GradientState
from torch.utils.data import DataLoader, Dataset

from tests.helpers.loader_samples import Samples
from ulysses_accel.dataloader import UlyssesSPDataLoaderAdapter
from ulysses_accel.errors import BatchError

FAILURE = r"OSError: no such (sample|workers)"


class BrokenSample(Dataset[dict[str, torch.Tensor]]):
    """The third sample can't be read."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == 2:
            raise OSError("no such sample")
        return {"input_ids": torch.arange(4)}


class NoIterator(DataLoader[Any]):
    """A loader whose workers can't be started."""

    def __iter__(self) -> Any:
        raise OSError("no such workers")


@pytest.fixture(autouse=True)
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def adapter(loader: Any, same_batch: bool = True) -> UlyssesSPDataLoaderAdapter:
    return UlyssesSPDataLoaderAdapter(loader, 0, None, 1, None, same_batch=same_batch)


def accelerates(dataset: Any) -> Any:
    return prepare_data_loader(DataLoader(dataset), num_processes=1, process_index=0)


def one_epoch(loader: Any) -> None:
    assert len([step["input_ids"] for step in loader]) == len(loader)


def two_epochs_by_next(loader: Any) -> None:
    for _ in range(2):
        for _ in range(len(loader)):
            next(loader)
        with pytest.raises(StopIteration):
            next(loader)


def left_early(loader: Any) -> None:
    for _ in loader:
        break


def left_early_by_next(loader: Any) -> None:
    next(loader)


def a_failing_epoch(loader: Any) -> None:
    with pytest.raises(BatchError, match=FAILURE):
        list(loader)


def left_before_the_failure(loader: Any) -> None:
    # A plain loader's failure is known before it is raised; accelerate's loader draws a batch ahead
    # by itself.
    last = 1 if type(loader.dl) is DataLoader else 0
    for number, _ in enumerate(loader):
        if number == last:
            break


def a_failing_epoch_by_next(loader: Any) -> None:
    with pytest.raises(BatchError, match=FAILURE):
        all(next(loader) for _ in range(len(loader)))
    with pytest.raises(StopIteration):
        next(loader)


USES = [one_epoch, two_epochs_by_next, left_early, left_early_by_next]
FAILURES = [a_failing_epoch, a_failing_epoch_by_next]


@pytest.mark.parametrize("same_batch", [True, False])
@pytest.mark.parametrize("wrap", [DataLoader, accelerates])
@pytest.mark.parametrize(
    ("use", "dataset"),
    [
        *((use, Samples(3)) for use in USES),
        *((use, BrokenSample()) for use in [*FAILURES, left_before_the_failure]),
    ],
)
def test_a_loader_is_freed(
    use: Callable[[Any], None], dataset: Any, wrap: Any, same_batch: bool
) -> None:
    inner = wrap(dataset)
    loader = adapter(inner, same_batch)
    watched = [weakref.ref(one) for one in (loader, inner)]
    use(loader)
    del loader, inner
    assert [one() for one in watched] == [None, None]
    assert GradientState().active_dataloader is None


@pytest.mark.parametrize("use", FAILURES)
def test_a_loader_that_can_not_start_is_freed(use: Callable[[Any], None]) -> None:
    loader = adapter(NoIterator(Samples(1)))
    watched = [weakref.ref(one) for one in (loader, loader.dl)]
    use(loader)
    del loader
    assert [one() for one in watched] == [None, None]
