"""Makes activation checkpoints remember the batch they belong to, for layers that are given no
mask.

transformers hands each checkpointed layer the function that checkpoints it, as an attribute. Ours
goes around it on the instances, so that a recompute in the backward pass sees the forward's
description whichever batch came last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ulysses_accel import _private_api
from ulysses_accel.attention import active_description, describe_forward
from ulysses_accel.forward.router_loss import active_record, running_for
from ulysses_accel.memory.checkpoint.layers import CheckpointedLayers

_ATTRIBUTE = _private_api.CHECKPOINT_FUNCTION


@dataclass(frozen=True)
class DescribedCheckpoint:
    """A checkpointing function whose recompute has the description that its forward had.

    Args:
        stock: transformers' function.
    """

    stock: Callable[..., Any]

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoints a function."""
        description, record = active_description(), active_record()

        def described(*inner_args: Any, **inner_kwargs: Any) -> Any:
            with describe_forward(description), running_for(record):
                return function(*inner_args, **inner_kwargs)

        return self.stock(described, *args, **kwargs)


def describe_checkpoints(model: nn.Module) -> None:
    """Goes around the checkpointing functions that a model's layers have by now."""
    for module in model.modules():
        stock = vars(module).get(_ATTRIBUTE)
        # Our own engine recomputes within the forward's context variables, the description among
        # them.
        if stock is None or isinstance(
            getattr(stock, "__self__", stock), (DescribedCheckpoint, CheckpointedLayers)
        ):
            continue
        setattr(module, _ATTRIBUTE, DescribedCheckpoint(stock))


def restore_checkpoints(model: nn.Module) -> None:
    """Gives a model's layers their own checkpointing functions back."""
    for module in model.modules():
        described = vars(module).get(_ATTRIBUTE)
        if isinstance(described, DescribedCheckpoint):
            setattr(module, _ATTRIBUTE, described.stock)
