"""Overrides the forward of one module, so that all of it runs within one function of ours.

Hooks before and after a forward would have to be balanced by hand where a forward raises or is
nested in another; around it, a `with` does it.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from ulysses_accel.installation import Installation

Forward = Callable[..., Any]
Around = Callable[[nn.Module, Forward, tuple[Any, ...], dict[str, Any]], Any]


class WeakMethod:
    """A bound method that holds its instance weakly, so that the instance can have it as an
    attribute without a reference cycle.

    Args:
        function: the method's function.
        instance: what it is bound to.
    """

    def __init__(self, function: Callable[..., Any], instance: nn.Module) -> None:
        # The name is a bound method's: accelerate 1.15 wraps `forward.__func__` in autocast, and
        # binds the result to the model, in `prepare_model` and again in
        # `extract_model_from_parallel`.
        self.__func__ = function
        self._instance = weakref.ref(instance)
        self.__signature__ = inspect.signature(MethodType(function, instance))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function with the instance."""
        return self.__func__(self._instance(), *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> WeakMethod:
        """Binds a copied instance's method to the copy."""
        instance = self._instance()
        assert instance is not None
        return WeakMethod(self.__func__, memo.get(id(instance), instance))


def override_forward(module: nn.Module, around: Around, changes: Installation) -> None:
    """Overrides a module's forward until `changes` is closed.

    Args:
        module: whose forward is overridden; later overrides are outside of this one.
        around: called with the module, its own forward, and the arguments; returns the output.
        changes: takes over the override.
    """
    earlier = vars(module).get("forward")
    is_open = True

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def stock(*args: Any, **kwargs: Any) -> Any:
            # The class's at the time of the call: FSDP2 gives a module another class.
            return type(self).forward(self, *args, **kwargs)

        ordinary = stock if earlier is None else earlier
        return around(self, ordinary, args, kwargs) if is_open else ordinary(*args, **kwargs)

    def close() -> None:
        nonlocal is_open
        is_open = False

    # A copy of the signature, and no `__wrapped__`: accelerate 1.15 follows that to get rid of its
    # own wrappers, and would drop ours too. Trainers read from the signature what a model takes.
    signature = inspect.signature(module.forward)
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    unbound = signature.replace(parameters=[this, *signature.parameters.values()])
    forward.__signature__ = unbound  # type: ignore[attr-defined]
    # Where somebody wraps ours, as accelerate does for mixed precision, their wrapper stays.
    changes.set(module, "forward", WeakMethod(forward, module), keeps_later=True)
    changes.callback(close)
