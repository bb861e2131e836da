"""The only look at callers' frames: which Trainer is constructing an accelerator."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any


def calling_trainer(accelerator: Any) -> Any:
    """Returns the Trainer whose method called the running `Accelerator.__init__`; None where no
    Trainer did.

    transformers 5.23's Trainer passes its accelerator nothing that leads back to the Trainer, so a
    Trainer that is to work unchanged can be found in its frame alone.
    `SequenceParallelTrainerMixin` and `attach_trainer` name the Trainer themselves.

    Args:
        accelerator: that is being constructed.
    """
    module = sys.modules.get("transformers.trainer")
    if module is None:
        return None
    # From the caller on: this function's own frame has itself among its variables, and would keep
    # all that the frames hold, the accelerator too, until the garbage collector runs.
    frame: FrameType | None = sys._getframe(1)
    is_constructor = False
    while frame is not None:
        is_of_accelerator = frame.f_locals.get("self") is accelerator
        if is_constructor and not is_of_accelerator:
            break
        # The constructors of subclasses, which call accelerate's, belong to the accelerator too.
        is_constructor |= is_of_accelerator and frame.f_code.co_name == "__init__"
        frame = frame.f_back
    caller = None if frame is None else frame.f_locals.get("self")
    return caller if isinstance(caller, module.Trainer) else None
