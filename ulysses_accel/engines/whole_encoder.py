"""An encoder that every rank has all of (sound, images) runs inside a sharded forward as it always does.

Its work is replicated, and its gradients are right: on each rank they are what that rank's tokens contribute through
cross-attention, and the loss carries the factor by which engines average them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from ulysses_accel.attention import describe_forward


def hook_whole_encoder(encoder: nn.Module) -> list[Any]:
    """Hides the sharded batch from an encoder.

    Args:
        encoder: of an encoder-decoder.

    Returns:
        What takes the hooks off.
    """
    entered: list[AbstractContextManager[None]] = []

    def before(_module: nn.Module, _args: tuple[Any, ...]) -> None:
        context = describe_forward(None)
        context.__enter__()
        entered.append(context)

    def after(_module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        entered.pop().__exit__(None, None, None)

    return [encoder.register_forward_pre_hook(before), encoder.register_forward_hook(after, always_call=True)]
