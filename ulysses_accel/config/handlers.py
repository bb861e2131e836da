"""The handlers of the mesh axes: subclasses of accelerate's where values need checking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from accelerate.utils import DeepSpeedSequenceParallelConfig as _Stock

from ulysses_accel.config.settings import EXCHANGES, HANDLER_FIELDS, RING_FIELDS
from ulysses_accel.config.settings_class import CONSTRUCTOR, SettingsClass
from ulysses_accel.config.sources import Layer, argument_layer
from ulysses_accel.errors import ConfigError, closest
from ulysses_accel.sequence.layout import Layout

STOCK_SEQUENCE_CONFIG: type[Any] = _Stock


@dataclass
class DeepSpeedSequenceParallelConfig(SettingsClass, _Stock):  # type: ignore[misc]
    """How the sequence is split: its length, and the attention that runs on the gathered heads.

    Args:
        sp_seq_length: tokens of the full, unsharded sequence; `None` where batches differ in
            length.
        sp_seq_length_is_variable: whether batches may differ in length; `None` reads the
            environment, then true.
        sp_attn_implementation: `sdpa`, `flash_attention_2`, `_3`, `_4`, `eager`, or a flash-attn
            kernel of the `kernels-community` hub organization; `None` reads the environment, then
            `sdpa`.
        sp_head_chunks: in how many chunks a rank's heads are exchanged and computed, one after
            another; attention's working set shrinks by it, the result and the bytes sent don't
            change. `None` reads the environment, then 1.

    Raises:
        ConfigError: a value is not legal, or the length is fixed but not given.
    """

    sp_seq_length: int | None = None
    sp_seq_length_is_variable: bool = None  # type: ignore[assignment]
    sp_attn_implementation: str = None  # type: ignore[assignment]
    sp_head_chunks: int = None  # type: ignore[assignment]

    _attributes: ClassVar[Mapping[str, str]] = {name: name for name in HANDLER_FIELDS}

    def _check(self) -> None:
        if not self.sp_seq_length_is_variable and self.sp_seq_length is None:
            source = self._settings["sp_seq_length_is_variable"].source
            raise ConfigError(
                f"sp_seq_length_is_variable=False (from {source}) needs sp_seq_length, which is "
                f"None ({self._settings['sp_seq_length'].source}). Set sp_seq_length to the tokens "
                "of the full sequence, or let the length vary."
            )


@dataclass
class RingAttentionConfig(SettingsClass):
    """How ring attention works: the `cp_handler`. A `None` reads the environment
    (`PARALLELISM_CONFIG_CP_*`), then the default.

    Args:
        layout: how tokens are distributed over the ring: `zigzag` (the default: causal work is
            balanced, and a quarter of the bytes need not be sent), `contiguous` or `striped`.
        exchange: how keys and values reach the other ranks: `p2p` (the default) rotates them, in
            memory of one shard; `all_gather` sends each rank all that it attends to in one
            collective, with a sliding window only those in it.
        head_stride: with `all_gather`, how many key/value heads are gathered at a time; all where
            `None`.

    Raises:
        ConfigError: a value is not legal, or a stride without `all_gather`.
    """

    layout: Layout = None  # type: ignore[assignment]
    exchange: Literal["p2p", "all_gather"] = None  # type: ignore[assignment]
    head_stride: int | None = None

    _attributes: ClassVar[Mapping[str, str]] = RING_FIELDS

    @property
    def cp_comm_strategy(self) -> str:
        """The exchange by accelerate's name, `allgather` or `alltoall`."""
        return next(theirs for theirs, ours in EXCHANGES.items() if ours == self.exchange)

    def _check(self) -> None:
        if self.head_stride is not None and self.exchange != "all_gather":
            raise ConfigError(
                f"cp_head_stride={self.head_stride} (from "
                f"{self._settings['cp_head_stride'].source}) divides an all_gather, but "
                f"cp_exchange={self.exchange} ({self._settings['cp_exchange'].source}). "
                "Use exchange='all_gather', or leave the stride out."
            )


def check_handler(name: str, handler: object, *expected: type[Any]) -> None:
    """Refuses a handler of the wrong type.

    Args:
        name: the argument's name.
        handler: what the user passed.
        expected: the accepted classes.

    Raises:
        ConfigError: the handler is neither `None` nor of one of the classes.
    """
    if handler is not None and not isinstance(handler, expected):
        names = " or ".join(kind.__name__ for kind in expected)
        raise ConfigError(
            f"{name} (from constructor) is a {type(handler).__name__}, not a {names}. Pass one, or "
            f"leave {name} out."
        )


def handler_layer(handler: object) -> Layer:
    """Returns what the user set on a handler, ours or accelerate's."""
    if isinstance(handler, SettingsClass):
        return handler.explicit_settings()
    names: tuple[str, ...] = HANDLER_FIELDS
    if not isinstance(handler, STOCK_SEQUENCE_CONFIG):
        names = ("cp_comm_strategy",)
    return argument_layer({name: getattr(handler, name, None) for name in names}, CONSTRUCTOR)


def ring_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the ring's settings from the mapping passed to `from_dict`; see `handler_values`."""
    fields = {attribute: name for name, attribute in RING_FIELDS.items()}
    handler = handler_values(values, "cp_handler", (*fields, "cp_comm_strategy"))
    return {fields.get(attribute, attribute): value for attribute, value in handler.items()}


def handler_values(values: Mapping[str, Any], name: str, legal: tuple[str, ...]) -> dict[str, Any]:
    """Returns a handler's values from the mapping passed to `from_dict`.

    Args:
        values: the full mapping.
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
        raise ConfigError(
            f"{name} (from from_dict) is a {type(handler).__name__}, not a mapping of its fields."
        )
    for key in handler:
        if key not in legal:
            raise ConfigError(
                f"unknown key {str(key)[:100]!r} in {name} of "
                f"from_dict.{closest(str(key)[:100], legal)}"
            )
    return dict(handler)
