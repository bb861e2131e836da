"""Lets activation checkpoints recompute within the batch of their forward.

transformers hands each checkpointed layer the function that checkpoints it, as an attribute. Ours
goes around it on the instances, so that a recompute in the backward pass sees the forward's running
batch, whichever batch came last: layers that are given no mask read the batch's description there,
and routers that the forward is over.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ulysses_accel import _private_api
from ulysses_accel.forward.context import ForwardFeature, ModelToShard, RunningBatch
from ulysses_accel.installation import Installation
from ulysses_accel.memory.checkpoint.layers import CheckpointedLayers
from ulysses_accel.sequence.running import run_batch, running_batch

_ATTRIBUTE = _private_api.CHECKPOINT_FUNCTION


@dataclass(frozen=True)
class CheckpointInBatch:
    """A checkpointing function whose recompute runs within the batch of its forward.

    Args:
        stock: transformers' function.
    """

    stock: Callable[..., Any]

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoints a function."""
        batch = running_batch()

        def in_batch(*inner_args: Any, **inner_kwargs: Any) -> Any:
            with run_batch(batch):
                return function(*inner_args, **inner_kwargs)

        return self.stock(in_batch, *args, **kwargs)


class CheckpointContext(ForwardFeature):
    """Goes around the checkpointing functions that a model's layers have when a forward begins."""

    def __init__(self, target: ModelToShard, changes: Installation) -> None:
        # transformers 5 sets the function on modules with this attribute, whether checkpointing
        # is enabled before or after.
        self._layers = []
        for module in target.model.modules():
            if hasattr(module, "gradient_checkpointing"):
                self._layers.append(weakref.ref(module))
        changes.callback(_restore, self._layers)

    def before(self, model: nn.Module, batch: RunningBatch, kwargs: dict[str, Any]) -> None:
        """Goes around those that are not ours; checkpointing may be enabled at any time."""
        for layer in self._layers:
            module = layer()
            stock = None if module is None else vars(module).get(_ATTRIBUTE)
            if stock is None or isinstance(stock, CheckpointInBatch):
                continue
            # Our own checkpoint engine recomputes within the forward's context variables.
            if isinstance(getattr(stock, "__self__", None), CheckpointedLayers):
                continue
            setattr(module, _ATTRIBUTE, CheckpointInBatch(stock))


def _restore(layers: list[weakref.ref[nn.Module]]) -> None:
    """Gives a model's layers the checkpointing functions that transformers gave them."""
    for layer in layers:
        module = layer()
        function = None if module is None else vars(module).get(_ATTRIBUTE)
        if isinstance(function, CheckpointInBatch):
            setattr(module, _ATTRIBUTE, function.stock)
