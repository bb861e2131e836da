"""Learning-rate schedules at the pace of the data: one step for each batch of an optimizer step,
not for each rank.
"""

from __future__ import annotations

from typing import Any

from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import DummyScheduler

from ulysses_accel import _private_api


class SequenceScheduler(AcceleratedScheduler):  # type: ignore[misc]
    """A schedule whose ranks of one sequence group count as one process.

    accelerate steps a schedule once for each process, as if each had drawn a batch of its own.
    Ranks that share a sequence draw one batch together.

    Args:
        stock: accelerate's wrapper of the schedule.
        data_parallel_size: batches that one optimizer step consumes in parallel.
    """

    def __init__(self, stock: Any, data_parallel_size: int) -> None:
        super().__init__(
            stock.scheduler,
            stock.optimizers,
            step_with_optimizer=stock.step_with_optimizer,
            split_batches=stock.split_batches,
        )
        self.data_parallel_size = data_parallel_size

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Steps the schedule if the optimizer made a step."""
        if (
            not self.step_with_optimizer
            or self.split_batches
            or not self.gradient_state.sync_gradients
        ):
            super().step(*args, **kwargs)
            return
        if any(optimizer.step_was_skipped for optimizer in self.optimizers):
            return
        for _ in range(self.data_parallel_size):
            # torch's OneCycleLR refuses a step after its last one.
            num_steps = _private_api.scheduler_step_count(self.scheduler)
            if num_steps <= getattr(self.scheduler, "total_steps", num_steps):
                self.scheduler.step(*args, **kwargs)


def sequence_schedulers(
    accelerator: Any, objects: tuple[Any, ...], data_parallel_size: int
) -> tuple[Any, ...]:
    """Returns the prepared objects with accelerate's schedulers replaced by ours, in the
    accelerator's list too.
    """
    return tuple(
        _replace(accelerator, obj, data_parallel_size) if type(obj) is AcceleratedScheduler else obj
        for obj in objects
    )


def _replace(
    accelerator: Any, stock: AcceleratedScheduler, data_parallel_size: int
) -> SequenceScheduler:
    ours = SequenceScheduler(stock, data_parallel_size)
    _private_api.mark_prepared(ours)
    schedulers = _private_api.prepared_schedulers(accelerator)
    schedulers[:] = [ours if known is stock else known for known in schedulers]
    return ours


def stretch_dummy_scheduler(obj: Any, sequence_size: int) -> None:
    """Undoes accelerate's division of a DeepSpeed schedule's length by ranks that share a sequence.

    accelerate 1.15 divides `DummyScheduler.total_num_steps` by the number of processes; only data
    parallel ones should count.
    """
    if isinstance(obj, DummyScheduler) and obj.total_num_steps is not None:
        obj.total_num_steps *= sequence_size
