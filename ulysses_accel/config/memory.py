"""`MemoryConfig`: the techniques that save memory in training, each value with its source."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ulysses_accel.config.settings import FIELDS, MEMORY_FIELDS, Setting, Source, show
from ulysses_accel.config.settings_class import CONSTRUCTOR, SettingsClass
from ulysses_accel.config.sources import (
    Layer,
    argument_layer,
    environment_layer,
    resolve,
    yaml_layer,
)
from ulysses_accel.errors import ConfigError, closest

# What the paper on Arctic Long Sequence Training switches on; all other settings keep their
# defaults.
ALST: dict[str, bool] = {
    "tiled_mlp": True,
    "tiled_norm": True,
    "tiled_loss": True,
    "checkpoint": True,
    "checkpoint_offload": True,
    "expandable_segments": True,
    "bf16_gradient_reduction": True,
}
# Each of these configures another setting, and has no effect without it.
_NEEDS = {
    "tiled_mlp_bytes": "tiled_mlp",
    "tiled_loss_tokens": "tiled_loss",
    "use_liger_loss": "tiled_loss",
    "checkpoint_every_n_layers": "checkpoint",
    "checkpoint_offload": "checkpoint",
    "checkpoint_keep_last": "checkpoint",
    "save_attention": "checkpoint",
    "save_exchange": "save_attention",
    "save_attention_bytes": "save_attention",
}
_FEATURES = (
    "tiled_mlp",
    "tiled_norm",
    "tiled_loss",
    "checkpoint",
    "expandable_segments",
    "bf16_gradient_reduction",
)
_ALST_SOURCE = Source("constructor", "MemoryConfig.alst()")


@dataclass
class MemoryConfig(SettingsClass):
    """Techniques that save memory: `ParallelismConfig(memory_config=...)`, or
    `memory.apply_memory(model, config)` alone.

    A value that is `None` here is taken from the environment (`MEMORY_CONFIG_*`), then from the
    default. Losses and gradients change by rounding only; `bf16_gradient_reduction` rounds to
    bfloat16.

    Args:
        tiled_mlp: compute the MLP blocks in tiles of tokens; false.
        tiled_mlp_bytes: bytes of a tile's intermediate values; chosen for the model by default.
        tiled_norm: compute the norms in tiles of tokens; false.
        tiled_loss: compute the loss in tiles of tokens, without the full logits; false.
        tiled_loss_tokens: tokens of a tile; chosen for the vocabulary by default.
        use_liger_loss: with `tiled_loss`, compute with Liger's fused linear cross-entropy; false.
        checkpoint: save only the inputs of the layers, and recompute the rest in the backward
            pass; false.
        checkpoint_every_n_layers: how many layers share one saved input; 1.
        checkpoint_offload: move the inputs to host memory; false.
        checkpoint_keep_last: how many of the last inputs stay on the device; 1.
        save_attention: with `checkpoint`, also save the output of attention: `no`, on the `device`
            or on the `host`; `no`.
        save_exchange: with `save_attention`, also save what the exchanges received; false.
        save_attention_bytes: bytes that `save_attention` may use on a process; all layers by
            default.
        expandable_segments: let the GPU's allocator grow its blocks, against fragmentation; false.
        bf16_gradient_reduction: reduce gradients in bfloat16; false.

    Raises:
        ConfigError: a value is not legal, or configures something that is switched off.

    Source:
        Bekman et al., Arctic Long Sequence Training, 2025, arXiv:2506.13996.
    """

    tiled_mlp: bool = None  # type: ignore[assignment]
    tiled_mlp_bytes: int | None = None
    tiled_norm: bool = None  # type: ignore[assignment]
    tiled_loss: bool = None  # type: ignore[assignment]
    tiled_loss_tokens: int | None = None
    use_liger_loss: bool = None  # type: ignore[assignment]
    checkpoint: bool = None  # type: ignore[assignment]
    checkpoint_every_n_layers: int = None  # type: ignore[assignment]
    checkpoint_offload: bool = None  # type: ignore[assignment]
    checkpoint_keep_last: int = None  # type: ignore[assignment]
    save_attention: Literal["no", "device", "host"] = None  # type: ignore[assignment]
    save_exchange: bool = None  # type: ignore[assignment]
    save_attention_bytes: int | None = None
    expandable_segments: bool = None  # type: ignore[assignment]
    bf16_gradient_reduction: bool = None  # type: ignore[assignment]

    _attributes: ClassVar[Mapping[str, str]] = {name: name for name in MEMORY_FIELDS}

    @classmethod
    def alst(cls, **overrides: Any) -> MemoryConfig:
        """Builds the configuration of the paper on Arctic Long Sequence Training.

        Args:
            overrides: constructor arguments, which take precedence; where they switch a feature
                off, its details are left out too.

        Returns:
            The config.

        Raises:
            ConfigError: as for the constructor.
        """
        arguments = _layer(overrides, CONSTRUCTOR)
        switched_off = {name for name, setting in arguments.items() if setting.value is False}
        preset = {
            name: value for name, value in ALST.items() if _NEEDS.get(name) not in switched_off
        }
        return cls._from_settings(
            resolve(environment_layer(), argument_layer(preset, _ALST_SOURCE), arguments)
        )

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> MemoryConfig:
        """Builds a config from a YAML file, the environment and arguments; later ones take
        precedence.

        Args:
            path: a file with a section `memory_config:`, or with `memory_config_*` keys in
                `parallelism_config:`.
            overrides: constructor arguments.

        Returns:
            The config.

        Raises:
            ConfigError: the file can't be read, or as for the constructor.
        """
        return cls._from_settings(
            resolve(yaml_layer(path), environment_layer(), _layer(overrides, CONSTRUCTOR))
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MemoryConfig:
        """Builds a config from what `to_dict` returned; values that are left out come from the
        environment.

        Args:
            values: field name to value.

        Returns:
            The config.

        Raises:
            ConfigError: a key is unknown, or as for the constructor.
        """
        return cls._from_settings(resolve(environment_layer(), dict_layer(values)))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values that `from_dict` turns into an equal config."""
        return dataclasses.asdict(self)

    @property
    def is_active(self) -> bool:
        """Whether any feature is switched on."""
        return any(getattr(self, name) for name in _FEATURES)

    def source_of(self, name: str) -> Source:
        """Says where a value came from.

        Args:
            name: a field, such as `tiled_mlp`.

        Returns:
            The source; of kind `assigned` where the attribute was changed after construction.

        Raises:
            ConfigError: there is no such field.
        """
        if name not in MEMORY_FIELDS:
            raise ConfigError(f"unknown setting {show(name)}.{closest(name[:100], MEMORY_FIELDS)}")
        return self.settings[name].source

    @property
    def settings(self) -> dict[str, Setting]:
        """Every field's value and source, as they are now."""
        assigned = Source("assigned", "assigned after construction")
        live = {name: getattr(self, name) for name in self._attributes}
        return {
            name: setting if live[name] == setting.value else Setting(live[name], assigned)
            for name, setting in self._settings.items()
        }

    def explain(self) -> str:
        """Returns one line for each setting: its value and where it came from."""
        return "\n".join(f"{name} = {setting}" for name, setting in self.settings.items())

    def _check(self) -> None:
        off = {name for name in MEMORY_FIELDS if getattr(self, name) in (False, "no")}
        for name, switch in _NEEDS.items():
            setting = self._settings[name]
            if switch in off and setting.value != FIELDS[name].default:
                use = "'device' or 'host'" if switch == "save_attention" else "True"
                raise ConfigError(
                    f"{name}={setting.value} (from {setting.source}) means nothing with {switch}="
                    f"{self._settings[switch].value} ({self._settings[switch].source}). Use "
                    f"{switch}={use}, or leave {name} out."
                )


def dict_layer(values: Mapping[str, Any]) -> Layer:
    """Builds a layer from what `MemoryConfig.to_dict` returned.

    Args:
        values: field name to value; a `None` is a value where it is the default.

    Returns:
        The settings.

    Raises:
        ConfigError: a key is unknown or a value is not legal.
    """
    source = Source("from_dict")
    layer = dict(_layer(values, source))
    for name in values:
        if values[name] is None and FIELDS[name].default is None:
            # Unlike an argument that was left out, a None that to_dict wrote is a value.
            layer[name] = Setting(None, source)
    return layer


def memory_from_settings(settings: Layer, config: MemoryConfig | None) -> MemoryConfig | None:
    """Builds the config that the settings describe.

    Args:
        settings: every field's setting.
        config: the user's config, whose values are among the settings.

    Returns:
        The config; `None` where the user passed none and set no memory field.

    Raises:
        ConfigError: two values contradict each other.
    """
    if config is None and all(settings[name].source.kind == "default" for name in MEMORY_FIELDS):
        return None
    return MemoryConfig._from_settings(settings)


def _layer(values: Mapping[str, Any], source: Source) -> Layer:
    for name in values:
        if name not in MEMORY_FIELDS:
            raise ConfigError(
                f"unknown setting {show(name)} (from "
                f"{source}).{closest(str(name)[:100], MEMORY_FIELDS)}"
            )
    return argument_layer(values, source)
