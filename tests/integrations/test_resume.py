"""A run that is stopped anywhere and resumed in new processes gives the very losses of the
uninterrupted run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from tests.helpers.engine_jobs import documents, train
from tests.helpers.models import build
from tests.helpers.parity_jobs import Engine
from tests.helpers.ranks import run_ranks
from ulysses_accel.dataloader import UlyssesSPDataLoaderAdapter

EPOCHS = 2
SAMPLES, BATCH = 7, 2
STEPS = 4  # of an epoch: the last batch is one sample
DDP, FSDP2, ZERO2 = Engine("ddp"), Engine("fsdp2"), Engine("deepspeed", 2)


@dataclass
class Job:
    """One training job; another seed gives other weights and another order, which a loaded state
    must undo.
    """

    engine: Engine
    workers: int
    seed: int
    steps: int = 1

    def __post_init__(self) -> None:
        model = build("llama", torch.float32, seed=self.seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        self.accelerator = self.engine.accelerator(sp_size=2, steps=self.steps)
        torch.manual_seed(self.seed)
        batches = DataLoader(
            documents(SAMPLES),  # type: ignore[arg-type]
            batch_size=BATCH,
            shuffle=True,
            num_workers=self.workers,
        )
        self.model, self.optimizer, self.batches, self.scheduler = self.accelerator.prepare(
            model, optimizer, batches, scheduler
        )

    def epoch(self, after: Callable[[int], None] = lambda step: None) -> list[float]:
        """Trains to the end of the epoch from wherever the loader stands; calls `after` behind each
        step.
        """
        losses = []
        for step, batch in enumerate(self.batches):
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch).loss
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            losses.append(float(loss.detach()))
            after(step + 1)
        return losses


def uninterrupted(jobs: list[tuple[Engine, int]], folder: str) -> list[list[float]]:
    """Trains each job to its end, and saves its state at the beginning, in the middle of epochs and
    between them.
    """
    found = []
    for number, (engine, workers) in enumerate(jobs):
        job = Job(engine, workers, seed=0)
        job.accelerator.save_state(f"{folder}/{number}-0", safe_serialization=True)
        losses: list[float] = []
        for epoch in range(EPOCHS):
            saver = _saver(job, f"{folder}/{number}", epoch * STEPS, {1, 3, STEPS})
            losses += job.epoch(saver)
        found.append(losses)
    return found


def _saver(job: Job, path: str, start: int, wanted: set[int]) -> Callable[[int], None]:
    def save(step: int) -> None:
        if step in wanted:
            job.accelerator.save_state(f"{path}-{start + step}", safe_serialization=True)

    return save


def resumed(
    jobs: list[tuple[Engine, int]], folder: str, stops: list[int]
) -> list[dict[str, list[float]]]:
    """Loads each state in a job with other weights and another order, and trains to the end of the
    run.
    """
    found = []
    for number, (engine, workers) in enumerate(jobs):
        losses = {}
        for stop in stops:
            job = Job(engine, workers, seed=5)
            job.accelerator.load_state(f"{folder}/{number}-{stop}")
            rest: list[float] = []
            while stop + len(rest) < EPOCHS * STEPS:
                rest += job.epoch()
            losses[str(stop)] = rest
        found.append(losses)
    return found


@pytest.mark.parametrize(
    ("jobs", "stops"),
    [
        pytest.param([(DDP, 0), (DDP, 2)], [0, 1, 3, STEPS, 5], id="ddp"),
        pytest.param([(FSDP2, 0), (ZERO2, 0)], [0, 3, STEPS, 5], id="fsdp2 and zero 2"),
    ],
)
def test_resumed_losses_are_the_same_bits(
    jobs: list[tuple[Engine, int]], stops: list[int], tmp_path: Path
) -> None:
    ranks = run_ranks(uninterrupted, 2, jobs, str(tmp_path), init=False)
    again = run_ranks(resumed, 2, jobs, str(tmp_path), stops, init=False)
    assert ranks[0] == ranks[1]
    for number, losses in enumerate(ranks[0]):
        assert len(losses) == EPOCHS * STEPS
        for rank in again:
            for stop in stops:
                assert rank[number][str(stop)] == losses[stop:], (jobs[number], stop)
        state = json.loads(
            (tmp_path / f"{number}-{stops[-1]}" / "sequence_loader_0.json").read_text()
        )
        assert (state["epoch"] * STEPS + state["batches"], state["sp_size"]) == (stops[-1], 2)


def drop_in(folder: str, stop: int | None, seed: int) -> list[list[float]]:
    """Each rank brings batches of its own, each of which becomes two micro-steps; returns the two
    epochs' losses.
    """
    model = build("llama", torch.float32, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    accelerator = DDP.accelerator(sp_size=2)
    model, optimizer = accelerator.prepare(model, optimizer)
    rank = dist.get_rank()
    own = documents(10)[rank * 5 : rank * 5 + 5]
    generator = torch.Generator().manual_seed(seed)
    loader: Any = DataLoader(own, batch_size=2, shuffle=True, generator=generator)  # type: ignore[arg-type]
    group = accelerator.torch_device_mesh["sp"].get_group()
    adapter = UlyssesSPDataLoaderAdapter(loader, rank, group, 2, accelerator.device)
    place = Path(folder) / f"stop-{stop}"
    if seed:
        accelerator.load_state(str(place))
        adapter.load_state_dict(json.loads((place / f"rank{rank}.json").read_text()))
    losses = []
    for _ in range(2):
        losses.append([])
        for step, batch in enumerate(adapter):
            losses[-1] += train(accelerator, model, optimizer, [batch])
            if not seed and len(losses) == 1 and step + 1 == stop:
                accelerator.save_state(str(place))
                (place / f"rank{rank}.json").write_text(json.dumps(adapter.state_dict()))
    return losses


def test_resume_in_the_middle_of_a_refill(tmp_path: Path) -> None:
    stop = 3
    ranks = run_ranks(drop_in, 2, str(tmp_path), stop, 0, init=False)
    again = run_ranks(drop_in, 2, str(tmp_path), stop, 5, init=False)
    assert [len(epoch) for epoch in ranks[0]] == [6, 6]
    for whole, rest in zip(ranks, again):
        assert rest == [whole[0][stop:], whole[1]]


def five_epochs() -> dict[str, list[int]]:
    found = {}
    for engine, steps in ((DDP, 1), (DDP, 3), (FSDP2, 3), (ZERO2, 3)):
        job = Job(engine, 0, seed=0, steps=steps)
        optimizer_steps, micro_steps = 0, 0
        for _ in range(5):
            for batch in job.batches:
                with job.accelerator.accumulate(job.model):
                    job.accelerator.backward(job.model(**batch).loss)
                    job.optimizer.step()
                    job.scheduler.step()
                    job.optimizer.zero_grad()
                micro_steps += 1
                optimizer_steps += job.accelerator.sync_gradients
        counted = getattr(job.model, "global_steps", optimizer_steps)
        found[f"{engine} {steps}"] = [
            micro_steps,
            optimizer_steps,
            counted,
            job.scheduler.scheduler.last_epoch,
        ]
    return found


def test_five_epochs_take_five_epochs_steps() -> None:
    for rank in run_ranks(five_epochs, 2, init=False):
        assert len(rank) == 4
        for name, counts in rank.items():
            # 7 samples are 4 batches: 4 optimizer steps alone, or a window of 3 and one of 1.
            steps = 5 * (4 if name.endswith(" 1") else 2)
            assert counts == [5 * STEPS, steps, steps, steps], name
