"""Facts that only a caller's frame has: the running `Accelerator.__init__`, and the Trainer that
called it.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any


def constructor_frame(accelerator: Any) -> FrameType | None:
    """Returns the frame of the running `Accelerator.__init__`; None when none runs.

    Args:
        accelerator: that is being constructed.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "__init__" and frame.f_locals.get("self") is accelerator:
            return frame
        frame = frame.f_back
    return None


def calling_trainer(accelerator: Any) -> Any:
    """Returns the Trainer whose method called the running `Accelerator.__init__`; None where no
    Trainer did.

    The Trainer is nowhere in what it passes to its accelerator, so the frame that has it is the
    only source.

    Args:
        accelerator: that is being constructed.
    """
    module = sys.modules.get("transformers.trainer")
    if module is None:
        return None
    frame = constructor_frame(accelerator)
    while frame is not None and frame.f_locals.get("self") is accelerator:
        frame = frame.f_back
    owner = None if frame is None else frame.f_locals.get("self")
    return owner if isinstance(owner, module.Trainer) else None
