"""Whether a block's output is wanted at all: under activation checkpointing the forward recompute
often discards it.

A layer's last block feeds only the residual sum, and nothing reads that sum again when the layer's
forward is rerun for its backward. Who reruns it and has proved that says so here; blocks that can
do without computing their output look.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

# None: outputs are needed. Otherwise what stands in for them: NaN while it is being proved that
# nobody reads them.
_fill_with_nan: ContextVar[bool | None] = ContextVar("fill_with_nan", default=None)


@contextmanager
def skip_unneeded_outputs(*, probe: bool = False) -> Iterator[None]:
    """Lets blocks leave out the products that make only their output; they still save what their
    backward needs.

    Args:
        probe: fill such outputs with NaN, so that the caller sees whether anything is made from
            them.
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
    """Returns what a block hands back in place of its output: a tensor of its shape, uninitialised,
    NaN in a probe.

    Args:
        like: any tensor with the output's shape, dtype and device.
    """
    output = like.new_empty(like.shape)
    return output.fill_(float("nan")) if _fill_with_nan.get() else output
