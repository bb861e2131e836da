"""The base of the classes whose attributes are settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, TypeVar

from ulysses_accel.config.settings import Setting, Source
from ulysses_accel.config.sources import Layer, argument_layer, environment_layer, resolve

CONSTRUCTOR = Source("constructor")
_T = TypeVar("_T", bound="Settled")


class Settled:
    """A class whose values are settings: `_attributes` maps each setting's name to the attribute
    that holds it.
    """

    _attributes: ClassVar[Mapping[str, str]]
    _settings: dict[str, Setting]

    def __post_init__(self) -> None:
        given = {name: getattr(self, attribute) for name, attribute in self._attributes.items()}
        self._settle(resolve(environment_layer(), argument_layer(given, CONSTRUCTOR)))

    @classmethod
    def _from_settings(cls: type[_T], settings: Layer) -> _T:
        handler = cls.__new__(cls)
        handler._settle(settings)
        return handler

    def _settle(self, settings: Layer) -> None:
        self._settings = {name: settings[name] for name in self._attributes}
        for name, attribute in self._attributes.items():
            setattr(self, attribute, self._settings[name].value)
        self._check()

    def _check(self) -> None:
        """Raises ConfigError where two values contradict each other."""

    def _given(self) -> Layer:
        """Returns what the user gave: a handler's defaults must not hide a YAML file's values."""
        given = {
            name: setting
            for name, setting in self._settings.items()
            if setting.source.kind != "default"
        }
        live = {name: getattr(self, attribute) for name, attribute in self._attributes.items()}
        changed = {
            name: value for name, value in live.items() if value != self._settings[name].value
        }
        return {**given, **argument_layer(changed, CONSTRUCTOR)}
