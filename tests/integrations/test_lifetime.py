"""Nothing lives on: what the user deletes is freed at once, as by accelerate alone."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from tests.forward.test_router_loss import build_experts
from tests.helpers.engine_jobs import batches_of, train
from tests.helpers.models import build
from tests.helpers.ranks import run_ranks
from ulysses_accel import MemoryConfig, ParallelismConfig

ROUNDS = 10
CONFIGS: dict[str, dict[str, Any]] = {
    "sp": {"sp_size": 2},
    "cp": {"cp_size": 2},
    "tp": {"tp_size": 2},
    "ep": {"sp_size": 2, "ep_size": 2},
}


def one_job(sizes: dict[str, Any] | None) -> dict[str, weakref.ref[Any]]:
    """Trains a model and returns weak references to all that took part."""
    AcceleratorState._reset_state(True)
    config = None if sizes is None else ParallelismConfig(**sizes)
    accelerator = Accelerator(cpu=True, parallelism_config=config)
    model = build_experts("Mixtral") if sizes is not None and "ep_size" in sizes else build("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    prepared, optimizer, schedule, batches = accelerator.prepare(
        model, optimizer, schedule, batches_of(2)
    )
    train(accelerator, prepared, optimizer, batches, schedule)
    objects = {
        "accelerator": accelerator,
        "model": model,
        "prepared": prepared,
        "optimizer": optimizer,
        "schedule": schedule,
        "loader": batches,
        "gradient state": accelerator.gradient_state,
    }
    if config is not None:
        objects["config"] = config
        objects["session"] = accelerator.ulysses_accel
    return {name: weakref.ref(value) for name, value in objects.items()}


def left_over(sizes: dict[str, Any] | None) -> list[str]:
    """Returns what is left of a job, although the garbage collector did not run."""
    one_job(sizes)
    gc.collect()
    gc.disable()
    references = one_job(sizes)
    # Its shared state has the config.
    AcceleratorState._reset_state(True)
    return sorted(name for name, reference in references.items() if reference() is not None)


def lifetimes() -> dict[str, list[str]]:
    return {name: left_over(sizes) for name, sizes in {"stock": None, **CONFIGS}.items()}


def test_what_is_deleted_is_freed_without_the_garbage_collector() -> None:
    for found in run_ranks(lifetimes, 2, init=False):
        assert found == {name: [] for name in ("stock", *CONFIGS)}


class Job:
    """As accelerate's own test has it: everything in attributes of one object."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        AcceleratorState._reset_state(True)
        self.accelerator = Accelerator(cpu=True, parallelism_config=ParallelismConfig(**sizes))
        model = build("llama")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            model, optimizer, batches_of(2)
        )

    def train(self) -> None:
        train(self.accelerator, self.model, self.optimizer, self.loader)


def loader_of_a_job() -> list[bool]:
    gc.collect()
    gc.disable()
    job = Job({"sp_size": 2})
    gradient_state = weakref.ref(job.accelerator.gradient_state)
    loader = weakref.ref(job.loader)
    assert not gradient_state().dataloader_references[1:]  # type: ignore[union-attr]
    job.train()
    del job
    return [gradient_state() is None, loader() is None]


def test_the_loader_is_cleaned_up() -> None:
    assert run_ranks(loader_of_a_job, 2, init=False) == [[True, True]] * 2


def bytes_of_rounds() -> list[int]:
    """Returns the bytes of all live models' parameters after each of some jobs of one process."""
    sizes = []
    for _ in range(ROUNDS):
        job = Job({"sp_size": 2})
        job.train()
        live = [thing for thing in gc.get_objects() if isinstance(thing, nn.Module)]
        parameters = {id(p): p for module in live for p in module.parameters()}
        sizes.append(sum(p.nbytes for p in parameters.values()))
        job.accelerator.free_memory()
        del job, live, parameters
    return sizes


def test_ten_jobs_leave_one_models_memory() -> None:
    for sizes in run_ranks(bytes_of_rounds, 2, init=False):
        assert sizes == [sizes[0]] * ROUNDS


def chained() -> float:
    """An accelerator that nobody keeps, as in a script's first line."""
    AcceleratorState._reset_state(True)
    config = ParallelismConfig(sp_size=2)
    model, batches = Accelerator(cpu=True, parallelism_config=config).prepare(
        build("llama"), batches_of(2)
    )
    gc.collect()
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        losses.append(float(loss.detach()))
    return sum(losses)


def test_a_model_trains_on_when_its_accelerator_is_gone() -> None:
    plain = build("llama")
    expected = sum(float(plain(**batch).loss) for batch in batches_of(2))
    for found in run_ranks(chained, 2, init=False):
        assert found == pytest.approx(expected, rel=1e-12)


def memory_job() -> list[str]:
    saving = MemoryConfig(tiled_mlp=True, tiled_loss=True)
    return left_over({"sp_size": 2, "memory_config": saving})


def test_a_model_that_saves_memory_is_freed() -> None:
    assert run_ranks(memory_job, 2, init=False) == [[], []]
