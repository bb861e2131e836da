"""The base class of configs whose attributes are checked settings with sources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, TypeVar

from ulysses_accel.config.settings import Setting, Source
from ulysses_accel.config.sources import Layer, argument_layer, environment_layer, resolve

CONSTRUCTOR = Source("constructor")
_T = TypeVar("_T", bound="SettingsClass")


class SettingsClass:
    """A config class; `_attributes` maps each setting's name to the attribute that holds it."""

    _attributes: ClassVar[Mapping[str, str]]
    _settings: dict[str, Setting]

    def __post_init__(self) -> None:
        arguments = {name: getattr(self, attribute) for name, attribute in self._attributes.items()}
        self._apply(resolve(environment_layer(), argument_layer(arguments, CONSTRUCTOR)))

    @classmethod
    def _from_settings(cls: type[_T], settings: Layer) -> _T:
        handler = cls.__new__(cls)
        handler._apply(settings)
        return handler

    def _apply(self, settings: Layer) -> None:
        self._settings = {name: settings[name] for name in self._attributes}
        for name, attribute in self._attributes.items():
            setattr(self, attribute, self._settings[name].value)
        self._check()

    def _check(self) -> None:
        """Raises ConfigError where two values contradict each other."""

    def explicit_settings(self) -> Layer:
        """Returns what was set explicitly; defaults must not override a YAML file's values."""
        explicit = {
            name: setting
            for name, setting in self._settings.items()
            if setting.source.kind != "default"
        }
        live = {name: getattr(self, attribute) for name, attribute in self._attributes.items()}
        changed = {
            name: value for name, value in live.items() if value != self._settings[name].value
        }
        return {**explicit, **argument_layer(changed, CONSTRUCTOR)}
