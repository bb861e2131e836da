"""One run of a checkpointed layer, and its recompute in the backward pass.

Saved-tensor hooks replace each tensor that autograd saves by a placeholder. When the backward pass
unpacks the first of them, the layer runs again from its input, under the same random numbers,
autocast and context variables, and fills in all of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ulysses_accel.errors import UlyssesAccelError
from ulysses_accel.memory.checkpoint.saved_results import SavedResults
from ulysses_accel.memory.checkpoint.storage import Source
from ulysses_accel.memory.execution_state import ExecutionState

_RUNNING_AGAIN: ContextVar[bool] = ContextVar("ulysses_accel_running_again", default=False)


def is_running_again() -> bool:
    """Returns whether a layer runs again only for its output, which is the input of the next
    layer.
    """
    return _RUNNING_AGAIN.get()


class _Placeholder:
    """Is in autograd's graph instead of a tensor that was not saved."""

    __slots__ = ("__weakref__",)


class _AllRecomputed(Exception):
    """Ends a recompute as soon as every tensor that the backward pass needs is there."""


class FromLayer(Source):
    """The output of the previous layer, which runs again to compute it.

    Args:
        record: of the previous layer.
        path: index or key of the tensor in its output; None for the output itself.
    """

    def __init__(self, record: LayerRecord, path: int | str | None) -> None:
        self._record, self._path = record, path
        self._tensor: Tensor | None = None

    def fetch(self) -> None:
        """Starts to copy the previous layer's input to the device."""
        if self._tensor is None:
            self._record.fetch()

    def load(self) -> Tensor:
        """Returns it; held, because the layers between two saved inputs have to run anyway."""
        if self._tensor is None:
            output = self._record.run_again()
            self._tensor = (output if self._path is None else output[self._path]).detach()
        return self._tensor


class LayerRecord:
    """One run of one layer.

    Args:
        function: the layer's forward with its keyword arguments.
        position: index of the input among the positional arguments, or its keyword.
        hidden: the input, `[B, S / P, hidden]`; not held.
        args: positional arguments, the input included.
        source: where the input is stored.
        layer: the module.
        recompute: called when the backward pass needs what was not saved; calls `recompute` of
            this record.
        previous: the previous layer's run in the same forward pass.
        saved: results that are not to be computed again; None for none.
    """

    def __init__(
        self,
        function: partial[Any],
        position: int | str,
        hidden: Tensor,
        args: tuple[Any, ...],
        source: Source,
        layer: nn.Module,
        recompute: Callable[[LayerRecord], None],
        previous: weakref.ref[LayerRecord] | None,
        saved: SavedResults | None = None,
    ) -> None:
        self.source, self.layer, self.previous = source, layer, previous
        self._saved = saved
        self._position, self._requires_grad = position, hidden.requires_grad
        self._args = tuple(None if index == position else arg for index, arg in enumerate(args))
        kwargs = {
            key: None if key == position else value for key, value in function.keywords.items()
        }
        self._function = partial(function.func, *function.args, **kwargs)
        self._request_recompute = recompute
        self._context, self._state = copy_context(), ExecutionState.capture(hidden.device)
        # In the order in which autograd saved; one that is gone belongs to a part of the graph
        # that is not differentiated.
        self._placeholders: list[weakref.ref[_Placeholder]] = []
        self._values: WeakKeyDictionary[_Placeholder, Tensor] = WeakKeyDictionary()

    @contextmanager
    def without_saving(self) -> Iterator[None]:
        """Lets autograd save placeholders instead of tensors inside of it."""
        recording = self._saved.recording() if self._saved is not None else nullcontext()
        with recording, saved_tensors_hooks(self._pack, self._unpack):
            yield

    def fetch(self) -> None:
        """Starts to copy what the recompute needs to the device."""
        self.source.fetch()
        if self._saved is not None:
            self._saved.fetch()

    def _pack(self, _: Tensor) -> _Placeholder:
        placeholder = _Placeholder()
        self._placeholders.append(weakref.ref(placeholder))
        return placeholder

    def _unpack(self, placeholder: _Placeholder) -> Tensor:
        if placeholder not in self._values:
            self._request_recompute(self)
        if placeholder not in self._values:
            raise UlyssesAccelError(
                f"a checkpointed layer saved {len(self._placeholders)} tensors in the forward pass "
                "and fewer when it was computed again: it does something else the second time. "
                "Switch checkpointing off for this model."
            )
        return self._values.pop(placeholder)

    def recompute(
        self,
        keep: Callable[[Tensor], Tensor | None] = Tensor.detach,
        inside: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Runs the layer again and holds the tensors that the backward pass needs.

        Args:
            keep: called with each tensor that autograd saves; returns the tensor to hold, None for
                none.
            inside: returns the context that the layer runs in, inside of the forward pass's context
                variables.
        """
        count = 0

        def hold(tensor: Tensor) -> None:
            nonlocal count
            is_counted = count < len(self._placeholders)
            placeholder = self._placeholders[count]() if is_counted else None
            count += 1
            held = keep(tensor)
            if placeholder is not None and held is not None:
                self._values[placeholder] = held
            if count >= len(self._placeholders):
                raise _AllRecomputed

        def run() -> None:
            hidden = self.source.load().detach().requires_grad_(self._requires_grad)
            try:
                with (
                    self._replaying(),
                    inside(),
                    torch.enable_grad(),
                    saved_tensors_hooks(hold, _refuse_backward),
                ):
                    self._call(partial(self._function.func, *self._function.args), hidden)
            except _AllRecomputed:
                pass

        self._as_in_forward(run)

    def run_again(self) -> Any:
        """Returns the layer's output, computed from its input without gradient."""

        def run() -> Any:
            with torch.no_grad():
                token = _RUNNING_AGAIN.set(True)
                try:
                    # The module, not its forward alone: its hooks gather sharded parameters under
                    # FSDP2 and ZeRO-3.
                    with self._replaying():
                        return self._call(self.layer, self.source.load())
                finally:
                    _RUNNING_AGAIN.reset(token)

        return self._as_in_forward(run)

    def _replaying(self) -> AbstractContextManager[None]:
        return self._saved.replaying() if self._saved is not None else nullcontext()

    def _as_in_forward(self, function: Callable[[], Any]) -> Any:
        """Calls a function with the context variables, random numbers and autocast of the forward
        pass.
        """

        def run() -> Any:
            with self._state.same_random_numbers(), self._state.same_autocast():
                return function()

        return self._context.copy().run(run)

    def _call(self, function: Callable[..., Any], hidden: Tensor) -> Any:
        if isinstance(self._position, str):
            kwargs = {**self._function.keywords, self._position: hidden}
            return function(*self._args, **kwargs)
        args = [hidden if index == self._position else arg for index, arg in enumerate(self._args)]
        return function(*args, **self._function.keywords)


def _refuse_backward(_: None) -> Tensor:
    raise UlyssesAccelError(
        "a backward pass went through the recompute of a checkpointed layer, which only gathers "
        "saved tensors. Compute gradients inside of a layer's forward with torch.autograd.grad on "
        "tensors of your own."
    )
