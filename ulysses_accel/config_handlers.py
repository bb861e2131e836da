"""The handlers of the axes: accelerate's classes, ours where the values need checking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from accelerate.utils import DeepSpeedSequenceParallelConfig as _Stock
from accelerate.utils import TorchContextParallelConfig

from ulysses_accel.config_fields import HANDLER_FIELDS, Source
from ulysses_accel.errors import ConfigError, closest
from ulysses_accel.resolve import Layer, argument_layer, environment_layer, resolve

CONSTRUCTOR = Source("constructor")
STOCK_SEQUENCE_CONFIG: type[Any] = _Stock


@dataclass
class DeepSpeedSequenceParallelConfig(_Stock):  # type: ignore[misc]
    """How the sequence is split: its length, and the attention that runs on the gathered heads.

    Args:
        sp_seq_length: tokens of the whole, unsharded sequence; `None` where batches differ in length.
        sp_seq_length_is_variable: whether batches may differ in length; `None` reads the environment, then true.
        sp_attn_implementation: `sdpa`, `flash_attention_2`, `_3`, `_4`, `eager`, or a flash-attn kernel of the
            `kernels-community` hub organization; `None` reads the environment, then `sdpa`.

    Raises:
        ConfigError: a value is not legal, or the length is fixed but not given.
    """

    sp_seq_length: int | None = None
    sp_seq_length_is_variable: bool = None  # type: ignore[assignment]
    sp_attn_implementation: str = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in HANDLER_FIELDS}
        self._settle(resolve(environment_layer(), argument_layer(given, CONSTRUCTOR)))

    @classmethod
    def _from_settings(cls, settings: Layer) -> DeepSpeedSequenceParallelConfig:
        handler = cls.__new__(cls)
        handler._settle(settings)
        return handler

    def _settle(self, settings: Layer) -> None:
        self._settings = {name: settings[name] for name in HANDLER_FIELDS}
        for name, setting in self._settings.items():
            setattr(self, name, setting.value)
        if not self.sp_seq_length_is_variable and self.sp_seq_length is None:
            source = self._settings["sp_seq_length_is_variable"].source
            raise ConfigError(
                f"sp_seq_length_is_variable=False (from {source}) needs sp_seq_length, which is None "
                f"({self._settings['sp_seq_length'].source}). Set sp_seq_length to the tokens of the whole sequence, "
                "or let the length vary."
            )


def check_handler(name: str, handler: object, expected: type[Any]) -> None:
    """Refuses a handler of the wrong type.

    Args:
        name: the argument's name.
        handler: what the user passed.
        expected: accelerate's class.

    Raises:
        ConfigError: the handler is neither `None` nor of that class.
    """
    if handler is not None and not isinstance(handler, expected):
        raise ConfigError(
            f"{name} (from constructor) is a {type(handler).__name__}, not a {expected.__name__}. Pass an "
            f"accelerate.utils.{expected.__name__}, or leave {name} out."
        )


def handler_layer(handler: object) -> Layer:
    """Returns what the user gave to the handler: its defaults must not hide a YAML file's values."""
    if isinstance(handler, DeepSpeedSequenceParallelConfig):
        settings = handler._settings
        given = {name: setting for name, setting in settings.items() if setting.source.kind != "default"}
        changed = {name: getattr(handler, name) for name in settings if getattr(handler, name) != settings[name].value}
        return {**given, **argument_layer(changed, CONSTRUCTOR)}
    names = HANDLER_FIELDS if isinstance(handler, STOCK_SEQUENCE_CONFIG) else ("cp_comm_strategy",)
    return argument_layer({name: getattr(handler, name, None) for name in names}, CONSTRUCTOR)


def handler_values(values: Mapping[str, Any], name: str, legal: tuple[str, ...]) -> dict[str, Any]:
    """Returns a handler's values from the mapping given to `from_dict`.

    Args:
        values: the whole mapping.
        name: the handler's key.
        legal: the handler's fields.

    Returns:
        The handler's fields, empty where there is no handler.

    Raises:
        ConfigError: the handler is not a mapping or has an unknown key.
    """
    handler = values.get(name)
    if handler is None:
        return {}
    if not isinstance(handler, Mapping):
        raise ConfigError(f"{name} (from from_dict) is a {type(handler).__name__}, not a mapping of its fields.")
    for key in handler:
        if key not in legal:
            raise ConfigError(f"unknown key {str(key)[:100]!r} in {name} of from_dict.{closest(str(key)[:100], legal)}")
    return dict(handler)


def context_handler(settings: Layer) -> TorchContextParallelConfig:
    """Builds the handler of the ring axis from settings."""
    return TorchContextParallelConfig(cp_comm_strategy=cast(str, settings["cp_comm_strategy"].value))
