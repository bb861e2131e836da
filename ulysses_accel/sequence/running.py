"""The batch that is running through a model, in the one context variable that says so.

Attention and tensor parallelism need its description alone; `forward.context.RunningBatch` adds
what the other parts of a sharded forward share. A context variable, and not an attribute of the
model: threads, nested forwards and two forwards before one backward pass each see their own batch,
and a checkpoint's recompute sees again the one of its forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from ulysses_accel.sequence.description import SequenceDescription


@dataclass(eq=False)
class DescribedBatch:
    """A batch on its way through a model.

    Args:
        description: of the sharded sequences; None for an ordinary batch.
    """

    description: SequenceDescription | None


_RUNNING: ContextVar[DescribedBatch | None] = ContextVar("ulysses_accel_batch", default=None)


def running_batch() -> DescribedBatch | None:
    """Returns the batch whose forward, or recompute, is running; None outside of any."""
    return _RUNNING.get()


def running_description() -> SequenceDescription | None:
    """Returns the description of the sharded batch that is running; None for an ordinary one, and
    outside of a forward.
    """
    batch = _RUNNING.get()
    return None if batch is None else batch.description


@contextmanager
def run_batch(batch: DescribedBatch | None) -> Iterator[None]:
    """Makes `batch` the running one of everything inside.

    Args:
        batch: of a forward that begins, or that is computed again.
    """
    token = _RUNNING.set(batch)
    try:
        yield
    finally:
        _RUNNING.reset(token)
