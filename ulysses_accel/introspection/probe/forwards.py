"""Forwards that a model runs beside those of its classes: set on an instance, or of a class that
its architecture does not have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

# Libraries whose layers and wrappers of forwards act on each token by itself.
_TOKEN_WISE = frozenset(
    {
        "accelerate",
        "bitsandbytes",
        "deepspeed",
        "functools",
        "liger_kernel",
        "peft",
        "torch",
        "torchao",
        "trl",
        "ulysses_accel",
    }
)
# Files of `torch.nn.modules` with layers that join places of a sequence.
_MIXING_FILES = frozenset(
    {
        "adaptive",
        "attention",
        "batchnorm",
        "conv",
        "fold",
        "instancenorm",
        "padding",
        "pixelshuffle",
        "pooling",
        "rnn",
        "transformer",
        "upsampling",
    }
)


@dataclass(frozen=True)
class ReplacedForward:
    """A forward that someone set on a module of a model.

    Args:
        name: of the module.
        module: itself.
        forward: what was set.
    """

    name: str
    module: nn.Module
    forward: Any

    @property
    def is_bound(self) -> bool:
        """Whether it is a function bound to its module, that another module can have as well."""
        if not isinstance(self.forward, MethodType) or self.forward.__self__ is not self.module:
            return False
        return getattr(self.function, "__closure__", ()) is None

    @property
    def function(self) -> Any:
        """The function that is bound to the module."""
        return self.forward.__func__


def replaced_forwards(modules: Mapping[str, nn.Module]) -> list[ReplacedForward]:
    """Returns the forwards that were set on modules, other than those of known libraries."""
    replaced = []
    for name, module in modules.items():
        forward = vars(module).get("forward")
        if forward is not None and not _is_known(forward, module):
            replaced.append(ReplacedForward(name, module, forward))
    return replaced


def _is_known(forward: Any, module: nn.Module) -> bool:
    """Whether a forward is the class's, possibly inside of wrappers that known libraries made."""
    for function in _chain(forward):
        if function is inner_function(type(module).forward):
            return True
        if _library(function) not in _TOKEN_WISE:
            return False
    return True


def inner_function(forward: Any) -> Any:
    """Returns the function of a method or partial."""
    while isinstance(forward, MethodType | functools.partial):
        forward = forward.func if isinstance(forward, functools.partial) else forward.__func__
    return forward


def _chain(forward: Any) -> Iterator[Any]:
    """Yields a function and what it wraps, one after another."""
    seen: set[int] = set()
    while forward is not None and id(forward) not in seen:
        seen.add(id(forward))
        wrapped = getattr(forward, "__wrapped__", None)
        function = inner_function(forward)
        yield function
        forward = wrapped if wrapped is not None else getattr(function, "__wrapped__", None)


def _library(function: Callable[..., Any]) -> str:
    """Returns the package whose code a function is; `__module__` is the wrapped function's."""
    if isinstance(function, FunctionType):
        name = str(function.__globals__.get("__name__", ""))
    else:
        name = type(function).__module__
    return name.partition(".")[0]


def foreign_modules(
    modules: Mapping[str, nn.Module], classes: frozenset[type[nn.Module]]
) -> dict[str, nn.Module]:
    """Returns the modules that someone put into a model, other than those of known libraries.

    Args:
        modules: of the model, by name.
        classes: that a model of its class has by itself.
    """
    architecture = {cls.__module__ for cls in classes}
    foreign = {}
    for name, module in modules.items():
        cls = architecture_class(module)
        file = str(cls.__module__)
        if cls in classes or file in architecture:
            # A twin may lack one of its architecture's kinds of layers.
            continue
        if not _is_known_file(file) or (classes and file.startswith("transformers.models.")):
            foreign[name] = module
    return foreign


def _is_known_file(file: str) -> bool:
    """Whether the modules that a file defines are judged by their library."""
    library = file.partition(".")[0]
    if file.startswith("torch.nn.modules."):
        return file.rpartition(".")[2] not in _MIXING_FILES
    return library == "transformers" or library in _TOKEN_WISE


def architecture_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class that a module was built of: torch 2.13's FSDP2 gives modules a subclass of
    their own.
    """
    cls = type(module)
    while issubclass(cls, FSDPModule):
        cls = next(base for base in cls.__mro__[1:] if base is not FSDPModule)
    return cls


def is_materialized(model: nn.Module) -> bool:
    """Returns whether a rank has all values of a model's parameters, and can run it alone."""
    for module in model.modules():
        # Experts on several ranks exchange tokens.
        if type(vars(module).get("forward")).__name__ == "ExpertDispatch":
            return False
    return all(_is_full(parameter) for parameter in model.parameters())


def _is_full(parameter: Tensor) -> bool:
    # DeepSpeed 0.19 marks the parameters that ZeRO-3 partitions by their id there.
    is_partitioned = isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")
    return not parameter.is_meta and not is_partitioned
