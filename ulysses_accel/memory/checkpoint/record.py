"""One run of a checkpointed layer: what it keeps of the forward pass, and its recompute in the
backward pass.

What autograd wants to save is left out and counted; when the backward pass asks for the first of
it, the layer runs once more, from its input, with the same random numbers, autocast and context
variables, and hands it all over.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ulysses_accel.errors import UlyssesAccelError
from ulysses_accel.memory.checkpoint.saved_results import Keeper
from ulysses_accel.memory.checkpoint.storage import Source

_RUNNING_AGAIN: ContextVar[bool] = ContextVar("ulysses_accel_running_again", default=False)


def is_running_again() -> bool:
    """Returns whether a layer runs again only for its output, which the layer behind starts
    from.
    """
    return _RUNNING_AGAIN.get()


class _Place:
    """Stands in autograd's graph for a tensor that was not saved."""

    __slots__ = ("__weakref__",)


class _AllRecomputed(Exception):
    """Ends a recompute once everything that the backward pass can ask for is there."""


class FromLayer(Source):
    """The output of the layer before, which is run again to get it.

    Args:
        record: of that layer.
        path: where in its output the tensor is; None for the output itself.
    """

    def __init__(self, record: LayerRecord, path: int | str | None) -> None:
        self._record, self._path = record, path
        self._tensor: Tensor | None = None

    def fetch(self) -> None:
        """Starts to bring back what the layer before starts from."""
        if self._tensor is None:
            self._record.fetch()

    def load(self) -> Tensor:
        """Returns it; kept for the layers in between, which have to be run for it anyway."""
        if self._tensor is None:
            output = self._record.run_again()
            self._tensor = (output if self._path is None else output[self._path]).detach()
        return self._tensor


@dataclass(frozen=True)
class _Surroundings:
    """What a run depends on besides its arguments."""

    context: Context
    random: Tensor
    device: torch.device
    device_random: Tensor | None
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    autocast_cache: bool

    @classmethod
    def now(cls, device: torch.device) -> _Surroundings:
        types = ("cpu",) if device.type == "cpu" else ("cpu", device.type)
        return cls(
            copy_context(),
            torch.get_rng_state(),
            device,
            torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            tuple(
                (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
                for kind in types
            ),
            torch.is_autocast_cache_enabled(),
        )

    def run(self, function: Callable[[], Any]) -> Any:
        """Calls a function as if it were called then; random numbers go on afterwards as if it had
        not been.
        """
        return self.context.copy().run(self._run, function)

    def _run(self, function: Callable[[], Any]) -> Any:
        devices = [self.device] if self.device_random is not None else []
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=devices))
            torch.set_rng_state(self.random)
            if self.device_random is not None:
                torch.cuda.set_rng_state(self.device_random, self.device)
            for kind, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled, self.autocast_cache))
            return function()


class LayerRecord:
    """One run of one layer.

    Args:
        function: the layer's forward without the input.
        position: where in the arguments the input stands; a name among the keywords.
        hidden: the input, `[B, S / P, hidden]`.
        args: positional arguments, the input's place included.
        source: where the input is kept.
        layer: whose run it is.
        recompute: called when the backward pass asks for what was not saved; calls `recompute` of
            this record.
        previous: the run that came before in the same forward pass.
        keeper: holds what is not to be computed again besides; None for nothing.
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
        keeper: Keeper | None = None,
    ) -> None:
        self.source, self.layer, self.previous = source, layer, previous
        self._keeper = keeper
        self._position, self._requires_grad = position, hidden.requires_grad
        self._args = tuple(None if index == position else arg for index, arg in enumerate(args))
        kwargs = {
            key: None if key == position else value for key, value in function.keywords.items()
        }
        self._function = partial(function.func, *function.args, **kwargs)
        self._demand = recompute
        self._surroundings = _Surroundings.now(hidden.device)
        self._places: list[weakref.ref[_Place]] = []
        self._values: WeakKeyDictionary[_Place, Tensor] = WeakKeyDictionary()

    @contextmanager
    def leaving_out(self) -> Iterator[None]:
        """Runs the forward pass without saving anything of it."""
        recording = self._keeper.recording() if self._keeper is not None else nullcontext()
        with recording, saved_tensors_hooks(self._leave_out, self._hand_over):
            yield

    def fetch(self) -> None:
        """Starts to bring back what the recompute needs."""
        self.source.fetch()
        if self._keeper is not None:
            self._keeper.fetch()

    def _leave_out(self, _: Tensor) -> _Place:
        place = _Place()
        self._places.append(weakref.ref(place))
        return place

    def _hand_over(self, place: _Place) -> Tensor:
        if place not in self._values:
            self._demand(self)
        if place not in self._values:
            raise UlyssesAccelError(
                f"a checkpointed layer saved {len(self._places)} tensors in the forward pass and "
                "fewer when it was "
                "computed again: it does something else the second time. Switch checkpointing off "
                "for this model."
            )
        return self._values.pop(place)

    def recompute(
        self,
        keep: Callable[[Tensor], Tensor | None] = Tensor.detach,
        inside: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Runs the layer again and holds what the backward pass will ask for.

        Args:
            keep: called with each tensor that autograd saves; returns what is held of it, None for
                nothing.
            inside: makes the context that the layer runs in, within the context variables of the
                forward pass.
        """
        count = 0

        def hold(tensor: Tensor) -> None:
            nonlocal count
            place = self._places[count]() if count < len(self._places) else None
            count += 1
            held = keep(tensor)
            if place is not None and held is not None:
                self._values[place] = held
            if count >= len(self._places):
                raise _AllRecomputed

        def run() -> None:
            hidden = self.source.load().detach().requires_grad_(self._requires_grad)
            replaying = self._keeper.replaying() if self._keeper is not None else nullcontext()
            try:
                with (
                    replaying,
                    inside(),
                    torch.enable_grad(),
                    saved_tensors_hooks(hold, _refuse_backward),
                ):
                    self._call(partial(self._function.func, *self._function.args), hidden)
            except _AllRecomputed:
                pass

        self._surroundings.run(run)

    def run_again(self) -> Any:
        """Returns the layer's output, computed from its input without gradient."""

        def run() -> Any:
            with torch.no_grad():
                token = _RUNNING_AGAIN.set(True)
                try:
                    # Not the forward alone: the module's hooks bring its parameters where they are
                    # sharded.
                    with self._keeper.replaying() if self._keeper is not None else nullcontext():
                        return self._call(self.layer, self.source.load())
                finally:
                    _RUNNING_AGAIN.reset(token)

        return self._surroundings.run(run)

    def _call(self, function: Callable[..., Any], hidden: Tensor) -> Any:
        if isinstance(self._position, str):
            kwargs = {**self._function.keywords, self._position: hidden}
            return function(*self._args, **kwargs)
        args = [hidden if index == self._position else arg for index, arg in enumerate(self._args)]
        return function(*args, **self._function.keywords)


def _refuse_backward(_: None) -> Tensor:
    raise UlyssesAccelError(
        "a backward pass went through the recompute of a checkpointed layer, which only gathers "
        "saved tensors. "
        "Compute gradients inside of a layer's forward with torch.autograd.grad on tensors of your "
        "own."
    )
