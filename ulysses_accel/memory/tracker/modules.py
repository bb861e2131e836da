"""Which module an operation belongs to, in forward and in backward, without touching the graph."""

from __future__ import annotations

import bisect
import threading
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ulysses_accel import _private_api
from ulysses_accel.memory.tracker.ledger import Ledger


class ModulePlaces:
    """Hooks on a model's modules that say which of them an operation is part of.

    Autograd numbers its nodes in the order of forward: the numbers at a module's entry and exit
        tell in backward whose
    a node is, and no hook needs to be in the graph.

    Args:
        model: whose modules are told apart; None: all is outside.
        ledger: is told of the parameters and gradients.
    """

    def __init__(self, model: nn.Module | None, ledger: Ledger) -> None:
        self._ledger = ledger
        self._stack: list[str] = []
        self._numbers: list[int] = []
        self._names: list[str] = []
        self._thread = threading.get_ident()
        self._handles: list[RemovableHandle] = []
        if model is not None:
            self._watch(model)

    def current(self) -> tuple[str, str]:
        """Returns the running module's name and the phase, `forward` or `backward`."""
        node = _private_api.running_node()
        if node is None or self._stack:
            return self._stack[-1] if self._stack else "", "forward" if node is None else "backward"
        place = bisect.bisect_right(self._numbers, _private_api.sequence_number(node)) - 1
        return self._names[place] if place >= 0 else "", "backward"

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watch(self, model: nn.Module) -> None:
        for tensor in (*model.parameters(), *model.buffers()):
            self._ledger.note(tensor, "parameters")
        for name, module in model.named_modules():
            self._handles += [
                module.register_forward_pre_hook(
                    partial(self._enter, name or type(model).__name__)
                ),
                module.register_forward_hook(
                    partial(self._leave, name or type(model).__name__), always_call=True
                ),
            ]
        for parameter in model.parameters():
            if parameter.grad is not None:
                self._ledger.note(parameter.grad, "gradients")
            if parameter.requires_grad:
                self._handles.append(
                    parameter.register_post_accumulate_grad_hook(self._note_gradient)
                )

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        self._stack.append(name)
        self._mark()
        # Engines put gathered parameters in place of the sharded ones just before a module runs.
        for parameter in _private_api.module_parameters(module).values():
            if parameter is not None:
                self._ledger.note(parameter, "parameters")

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        while self._stack and self._stack.pop() != name:
            pass
        self._mark()

    def _mark(self) -> None:
        """Notes that nodes from here on belong to the module on top."""
        # Every thread numbers its own nodes; on CUDA what backward computes anew is built in
        # another thread.
        if threading.get_ident() != self._thread:
            return
        number = _private_api.next_sequence_number()
        name = self._stack[-1] if self._stack else ""
        if self._numbers and self._numbers[-1] == number:
            self._names[-1] = name
        else:
            self._numbers.append(number)
            self._names.append(name)

    def _note_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._ledger.note(parameter.grad, "gradients")
