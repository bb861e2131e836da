"""What a technique changes on live objects, and one `close()` that restores them.

No class and no module global is patched: an accelerator, a Trainer or a model gets attributes of
its own that are found before its class's, and hooks. Each technique keeps one `Installation` of all
that it changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

_ABSENT = object()


class Removable(Protocol):
    """What torch's and accelerate's hook registrations return."""

    def remove(self) -> None:
        """Removes the hook."""


class Installation:
    """Everything that was changed on live objects; `close()` undoes it, the latest change first.

    Targets are held weakly. An accelerator owns the installation that overrides its methods; a
    strong reference back would be a cycle, and neither it nor its models would be freed before the
    garbage collector runs.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()

    def set(self, target: Any, name: str, value: Any) -> None:
        """Sets an attribute of one instance; `close` restores the instance's own earlier one, or
        deletes it.

        Args:
            target: any object with a `__dict__`.
            name: of the attribute.
            value: its new value; a function is called without `target`, as no descriptor binds it.
        """
        before = vars(target).get(name, _ABSENT)
        # Not setattr: a module would register parameters and submodules.
        vars(target)[name] = value
        self._stack.callback(_restore, weakref.ref(target), name, before)

    def hooks(self, handles: Iterable[Removable]) -> None:
        """Takes over hook handles, which `close` removes."""
        for handle in handles:
            self._stack.callback(handle.remove)

    def callback(self, function: Callable[..., object], *args: Any) -> None:
        """Has `close` call a function."""
        self._stack.callback(function, *args)

    def close(self) -> None:
        """Restores everything; calling it again does nothing."""
        self._stack.close()


def _restore(target: weakref.ref[Any], name: str, before: Any) -> None:
    live = target()
    if live is None:
        return
    vars(live).pop(name, None)
    if before is not _ABSENT:
        vars(live)[name] = before


def stock_method(target: Any, name: str) -> Callable[..., Any]:
    """Returns the method that an override of one instance's method calls, without a reference to
    the instance.

    Args:
        target: the instance.
        name: of its method.

    Returns:
        The instance's own attribute where somebody set one before; otherwise its class's method.
    """
    if name in vars(target):
        earlier: Callable[..., Any] = vars(target)[name]
        return earlier
    method, instance = getattr(type(target), name), weakref.ref(target)

    def call(*args: Any, **kwargs: Any) -> Any:
        return method(instance(), *args, **kwargs)

    return call


@contextmanager
def replaced(target: Any, **values: Any) -> Iterator[None]:
    """Sets attributes of one instance for the time of a call.

    Args:
        target: the instance.
        values: its attributes; whatever it had itself before, or nothing, is there again
            afterwards.
    """
    changes = Installation()
    for name, value in values.items():
        changes.set(target, name, value)
    try:
        yield
    finally:
        changes.close()
