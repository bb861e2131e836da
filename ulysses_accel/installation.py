"""What a technique changes on live objects, and one `close()` that restores them.

No class and no module global is patched: an accelerator, a Trainer or a model gets attributes of
its own that are found before its class's, and hooks. Each technique keeps one `Installation` of all
that it changed. `AcceleratorFeature` is what a technique on an accelerator derives from.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar, Protocol
from weakref import WeakSet

_ABSENT = object()
# The attribute of an instance that has its overrides.
_OVERRIDES = "overrides_of_ulysses_accel"

# Called with what it overrides, and then with the arguments of that method.
Override = Callable[..., Any]


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

    def set(self, target: Any, name: str, value: Any, *, keeps_later: bool = False) -> None:
        """Sets an attribute of one instance; `close` restores the instance's own earlier one, or
        deletes it.

        Args:
            target: any object with a `__dict__`.
            name: of the attribute.
            value: its new value; a function is called without `target`, as no descriptor binds it.
            keeps_later: whether `close` leaves alone what others set after us, which may call
                `value`; that must do nothing more by then.
        """
        before = vars(target).get(name, _ABSENT)
        # Not setattr: a module would register parameters and submodules.
        vars(target)[name] = value
        ours = weakref.ref(value) if keeps_later else None
        self._stack.callback(_restore, weakref.ref(target), name, before, ours)

    def override(self, target: Any, methods: Mapping[str, Callable[..., Any]]) -> None:
        """Overrides methods of one instance by a subclass of its class, as torch's FSDP2 does to
        modules; `close` gives the instance its class again.

        Unlike a function in the instance's `__dict__`, a method of a class holds the instance
        while it runs: `Accelerator(...).prepare(model)` works although nobody keeps the
        accelerator.

        Args:
            target: whose methods are overridden; it owns the new ones.
            methods: by name, called without `target`.
        """
        base = type(target)
        # The class has no reference to the methods: a class is freed by the garbage collector only.
        subclass = types.new_class(base.__name__, (base,))
        subclass.__module__ = base.__module__
        subclass.__qualname__ = base.__qualname__
        for name in methods:
            setattr(subclass, name, _overridden(subclass, name, getattr(base, name)))
        overrides = vars(target).setdefault(_OVERRIDES, {})
        overrides[subclass] = dict(methods)
        target.__class__ = subclass
        self._stack.callback(_restore_class, weakref.ref(target), subclass)
        for name, method in methods.items():
            if name in vars(target):
                # An earlier attribute of the instance is found before the class's.
                self.set(target, name, method)

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


def _restore(
    target: weakref.ref[Any], name: str, before: Any, ours: weakref.ref[Any] | None
) -> None:
    live = target()
    if live is None or (ours is not None and vars(live).get(name) is not ours()):
        return
    vars(live).pop(name, None)
    if before is not _ABSENT:
        vars(live)[name] = before


def _overridden(subclass: type, name: str, stock: Callable[..., Any]) -> Callable[..., Any]:
    # `wraps` keeps the signature: transformers 5.23's Trainer reads from it whether
    # `gather_for_metrics` takes use_gather_object.
    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        overrides = vars(self).get(_OVERRIDES, {})
        if subclass not in overrides:
            # Another instance of the class: scripts write `type(accelerator)(...)`.
            return stock(self, *args, **kwargs)
        return overrides[subclass][name](*args, **kwargs)

    return method


def _restore_class(target: weakref.ref[Any], subclass: type) -> None:
    live = target()
    if live is None:
        return
    live.__class__ = subclass.__base__
    overrides = vars(live)[_OVERRIDES]
    del overrides[subclass]
    if not overrides:
        del vars(live)[_OVERRIDES]


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


class FeatureSession(Protocol):
    """What a feature knows of the session that runs an accelerator's features."""

    def close(self) -> None:
        """Restores everything that the features changed."""


class AcceleratorFeature:
    """One technique on one accelerator; derive from it, and add the class to
    `integrations.attach.FEATURES`.

    An accelerator's session calls the features in the order of that list. A model passes through
    `check_model` of all of them, then through `prepare_model`, and then the engine takes it (DDP,
    FSDP2, DeepSpeed), within every `around_engine`. `after_prepare` sees what the accelerator
    returns, in the reverse order. Every method does nothing by default.

    A feature refers to its accelerator, session and models weakly: they own it.

    Args:
        config: the accelerator's `ParallelismConfig`.
        accelerator: the `accelerate.Accelerator` that is being constructed.
        session: that runs the features of this accelerator.

    Raises:
        ConfigError: an engine or a setting that the technique does not go with.
    """

    name: ClassVar[str]
    """The attribute of the accelerator under which users reach the feature."""

    settings: ClassVar[tuple[str, ...]]
    """The fields of `ParallelismConfig` that request it."""

    def __init__(self, config: Any, accelerator: Any, session: FeatureSession) -> None:
        self.config = config
        self.installation = Installation()
        self.models: WeakSet[Any] = WeakSet()
        self._accelerator = weakref.ref(accelerator)
        self._session = weakref.ref(session)

    @classmethod
    def is_requested(cls, config: Any) -> bool:
        """Returns whether a config requests the technique."""
        return False

    @classmethod
    def model_checks(cls, model: Any, config: Any) -> list[Callable[[], object]]:
        """Returns what `prepare` checks of a model, for `supports`; each raises what it would.

        Args:
            model: that is not prepared, possibly without weights; nothing of it is changed.
            config: that requests the technique.
        """
        return []

    @property
    def accelerator(self) -> Any:
        """The accelerator, while it lives."""
        return _alive(self._accelerator, "accelerator")

    @property
    def session(self) -> Any:
        """The session, while its accelerator lives."""
        return _alive(self._session, "accelerator")

    def is_new(self, model: Any) -> bool:
        """Returns whether a model was not prepared yet, neither by itself nor as a part of
        another.
        """
        return not any(known is model or model in known.modules() for known in self.models)

    def check_model(self, model: Any) -> Any:
        """Refuses a model that the technique is not exact for; changes nothing.

        Returns:
            What `prepare_model` needs to know of the model.
        """
        return None

    def prepare_model(self, model: Any, checked: Any) -> None:
        """Changes a model that the engine does not have yet.

        Args:
            model: that passed every feature's check.
            checked: what this feature's `check_model` returned.
        """

    def before_engine(self, objects: tuple[Any, ...]) -> None:
        """Sees all objects of one `prepare` call, after `prepare_model` of its models."""

    def around_engine(self, objects: tuple[Any, ...]) -> AbstractContextManager[None]:
        """Surrounds accelerate's own code, which hands these objects to the engine."""
        return nullcontext()

    def after_prepare(self, prepared: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns what `prepare` or one of `prepare_model`, `prepare_optimizer` and
        `prepare_scheduler` is to return, in place of what accelerate returned.
        """
        return prepared

    def overrides(self) -> Mapping[str, Override]:
        """Returns overrides of other methods of the accelerator, by name.

        The first feature of the list that has one is called first; its first argument calls the
        next one's, and in the end accelerate's.
        """
        return {}

    @property
    def holds_parts(self) -> bool:
        """Whether a rank holds parts of weights that no engine gathers for a checkpoint."""
        return False

    def gathering(self) -> AbstractContextManager[None]:
        """While open, on every rank, states of models and optimizers come with full tensors."""
        return nullcontext()

    def close(self) -> None:
        """Restores the accelerator, its models and its Trainer, for all features together: they
        build on each other. Every rank must call it.
        """
        self.session.close()


def _alive(reference: weakref.ref[Any], what: str) -> Any:
    target = reference()
    if target is None:
        raise ReferenceError(f"the {what} was deleted. Keep it as long as its methods are used.")
    return target
