"""Proves in every sharded forward that each attention layer that ran attended through us."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ulysses_accel.errors import UnsupportedModelError
from ulysses_accel.forward.context import ForwardFeature, ModelToShard, RunningBatch
from ulysses_accel.installation import Installation


class Coverage(ForwardFeature):
    """Counts the attention layers that run; all ranks run the same ones, so all of them see the
    same.
    """

    def __init__(self, target: ModelToShard, changes: Installation) -> None:
        self._installed = target.attention
        # A number, not a set of layers: compiled layers share their code, and what it does beside
        # numbers.
        self._entered = 0
        for layer in target.profile.attending.values():
            changes.hooks([layer.register_forward_pre_hook(self._enter)])

    def _enter(self, _module: nn.Module, _args: tuple[Any, ...]) -> None:
        self._entered += 1

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Leaves out the layers that run inside: those of an ordinary forward, which may be nested
        in a sharded one of the same model.
        """
        before = self._entered
        try:
            yield
        finally:
            self._entered = before

    def before(self, model: nn.Module, batch: RunningBatch, kwargs: dict[str, Any]) -> None:
        """Notes how many layers have run so far, and how many calls of attention came to us."""
        batch.counted_before = (self._entered, self._installed.num_calls)

    def after(self, model: nn.Module, batch: RunningBatch, output: Any) -> Any:
        """Refuses a forward whose layers did not all call us.

        Raises:
            UnsupportedModelError: a layer's tokens have only seen their own shard.
        """
        entered_before, calls_before = batch.counted_before
        entered = self._entered - entered_before
        calls = self._installed.num_calls - calls_before
        if calls and calls >= entered:
            return output
        raise UnsupportedModelError(
            f"{type(model).__name__} computed a sharded batch with {calls} attention calls through "
            f"'{self._installed.implementation}' in {entered} attention layers: the others' tokens "
            "have only seen their own shard. Something replaced the model's attention after "
            "prepare; prepare the model last."
        )
