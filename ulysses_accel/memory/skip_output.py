"""Leaving out a block's output where the recompute of an activation checkpoint discards it.

A layer's last block feeds only the residual sum, and no backward needs that sum when the layer's
forward runs again. The checkpoint first proves this by a probe, then recomputes inside
`skip_unneeded_outputs`; tiled blocks ask `recomputing()` before they compute their output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

# None: outputs are needed. True: outputs are NaN, to see whether anything reads them. False: they
# are uninitialised.
_fill_with_nan: ContextVar[bool | None] = ContextVar("fill_with_nan", default=None)


@contextmanager
def skip_unneeded_outputs(*, probe: bool = False) -> Iterator[None]:
    """Lets blocks skip the products that only their output needs; they still save what their
    backward needs.

    Args:
        probe: fill such outputs with NaN, so that the caller sees whether anything is computed
            from them.
    """
    token = _fill_with_nan.set(probe)
    try:
        yield
    finally:
        _fill_with_nan.reset(token)


def recomputing() -> bool:
    """Returns True where the caller's output is not needed: inside `skip_unneeded_outputs`."""
    return _fill_with_nan.get() is not None


def unneeded_output(like: Tensor) -> Tensor:
    """Returns what a block returns instead of its output: an uninitialised tensor of the same
    shape, or NaN in a probe.

    Args:
        like: any tensor with the output's shape, dtype and device.
    """
    output = like.new_empty(like.shape)
    return output.fill_(float("nan")) if _fill_with_nan.get() else output
