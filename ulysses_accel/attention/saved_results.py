"""Results that a checkpointed layer keeps, so that its recompute need not compute or exchange them
again.

Attention is the one part of a layer whose recompute costs as much as its forward. Whoever computes
it calls `kept` for the result; the checkpoint engine (`memory.checkpoint`) answers, where one runs
the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from torch import Tensor

Part = Literal["attention", "exchange"]
Results = tuple[Tensor, ...]
Answer = Callable[[Part, Callable[[], Results]], Results]

_ANSWER: ContextVar[Answer | None] = ContextVar("ulysses_accel_answer", default=None)


@contextmanager
def answering(answer: Answer) -> Iterator[None]:
    """Lets `answer` decide what `kept` returns: what is computed, or what was."""
    token = _ANSWER.set(answer)
    try:
        yield
    finally:
        _ANSWER.reset(token)


def kept(part: Part, compute: Callable[[], Results]) -> Results:
    """Returns what `compute` returns; in a checkpointed layer's recompute what it returned the
    first time.

    Args:
        part: `attention`: a core attention's output and log-sum-exp; `exchange`: what a collective
            delivered.
        compute: computes the results, without autograd recording it (call this in a Function's
            forward).
    """
    answer = _ANSWER.get()
    return compute() if answer is None else answer(part, compute)


def is_keeping() -> bool:
    """Returns whether the running layer keeps its attention, which must then go through `kept`."""
    return _ANSWER.get() is not None
