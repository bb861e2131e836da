"""Proves in every sharded forward that each attention layer that ran attended through us."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ulysses_accel.attention import InstalledAttention
from ulysses_accel.errors import UnsupportedModelError


class Canary:
    """Counts the attention layers that run; all ranks run the same ones, so all of them see the
    same.

    Args:
        attending: the attention layers that see sharded tokens.
        installed: the installation.
    """

    def __init__(self, attending: Mapping[str, nn.Module], installed: InstalledAttention) -> None:
        self._installed = installed
        # A number, not a set of layers: compiled layers share their code, and what it does beside
        # numbers.
        self._entered = 0
        self.handles: list[Any] = []
        for layer in attending.values():
            self.handles.append(layer.register_forward_pre_hook(self._enter))

    def _enter(self, _module: nn.Module, _args: tuple[Any, ...]) -> None:
        self._entered += 1

    def counts(self) -> tuple[int, int]:
        """Returns how many layers have run so far, and how many calls of attention have come
        to us.
        """
        return self._entered, self._installed.num_calls

    def check(self, model: nn.Module, before: tuple[int, int]) -> None:
        """Refuses a forward whose layers did not all call us.

        Args:
            model: for the message.
            before: the counts at its beginning.

        Raises:
            UnsupportedModelError: a layer's tokens have only seen their own shard.
        """
        entered, calls = (now - then for now, then in zip(self.counts(), before))
        if calls and calls >= entered:
            return
        raise UnsupportedModelError(
            f"{type(model).__name__} computed a sharded batch with {calls} attention calls through "
            f"'{self._installed.implementation}' in {entered} attention layers: the others' tokens "
            "have only seen "
            "their own shard. Something replaced the model's attention after prepare; prepare the "
            "model last."
        )
