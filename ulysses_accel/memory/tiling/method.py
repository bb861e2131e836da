"""A method of one module instance that is computed in tiles, and its removal."""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ulysses_accel.errors import UlyssesAccelError, UnsupportedModelError
from ulysses_accel.installation import Installation

Method = Callable[..., Any]


class TiledMethod:
    """A method of one module, computed in tiles.

    It is read like a bound method (`__self__`, `__func__`), but holds its module weakly: it is an
    attribute of that module, and a strong reference back would keep the module's memory until the
    garbage collector runs.

    Args:
        module: the instance.
        original: the method that is computed in tiles; takes the module first.
        tiled: called as `tiled(original, module, *args, **kwargs)`.
    """

    def __init__(self, module: nn.Module, original: Method, tiled: Method) -> None:
        self._module = weakref.ref(module)
        self._original, self._tiled = original, tiled

        @functools.wraps(original)
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def function(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return tiled(original, module, *args, **kwargs)

        self.__func__ = function
        # transformers and our own probe read a method's arguments.
        signature = inspect.signature(original)
        parameters = list(signature.parameters.values())
        self.__signature__ = signature.replace(parameters=parameters[1:])

    @property
    def __self__(self) -> nn.Module:
        module = self._module()
        if module is None:
            raise UlyssesAccelError(
                "a tiled method was called after its module was freed. Keep a reference to the "
                "module, not only to its method."
            )
        return module

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Computes one call in tiles."""
        return self.__func__(self.__self__, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> TiledMethod:
        # Of the copied module, as a bound method's deep copy is.
        return TiledMethod(copy.deepcopy(self.__self__, memo), self._original, self._tiled)


class InstalledTiles(Installation):
    """Methods of modules that are computed in tiles; `close` restores the modules.

    Args:
        left_alone: by module name, why a module that was looked at is not tiled.
    """

    def __init__(self, left_alone: dict[str, str] | None = None) -> None:
        super().__init__()
        self.left_alone = left_alone or {}

    def tile(self, module: nn.Module, method: str, tiled: Method) -> None:
        """Computes a method of one module in tiles from now on.

        Args:
            module: the instance; its class and other instances stay as they are.
            method: name of the method.
            tiled: called as `tiled(original, module, *args, **kwargs)`.

        Raises:
            UnsupportedModelError: the instance's own method is bound to another object.
        """
        self.set(module, method, TiledMethod(module, unbound_method(module, method), tiled))


def unbound_method(module: nn.Module, name: str) -> Method:
    """Returns the function of an instance's method, which takes the module first.

    Args:
        module: the instance.
        name: of the method.

    Raises:
        UnsupportedModelError: the instance has one that is bound to another object, so it can't be
            called for a copy.
    """
    attribute = vars(module).get(name)
    if attribute is None:
        method: Method = getattr(type(module), name)
        return method
    if getattr(attribute, "__self__", None) is not module:
        raise UnsupportedModelError(
            f"{type(module).__name__}.{name} was replaced by {attribute!r}, which is not bound to "
            "the module. Install the tiles before whatever replaced it."
        )
    function: Method = attribute.__func__
    return function
