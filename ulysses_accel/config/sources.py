"""Default < YAML < environment < command line < constructor: one value for each setting, with its
source.

A layer is a mapping from field name to `Setting`; in `resolve`, later layers take precedence.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeAlias, cast

from ulysses_accel.config.settings import (
    DEFAULT,
    EXCHANGES,
    FIELDS,
    SECTIONS,
    SOURCE_KINDS,
    Setting,
    Source,
    SourceKind,
    show,
)
from ulysses_accel.config.yaml_file import read_yaml_layer
from ulysses_accel.errors import ConfigError, closest

Layer: TypeAlias = Mapping[str, Setting]

VARIABLE_PREFIXES = tuple(f"{section.upper()}_" for section in SECTIONS)
SOURCES_VARIABLE = "ULYSSES_ACCEL_SOURCES"
STOCK_GATE_VARIABLE = "ACCELERATE_USE_PARALLELISM_CONFIG"
_MAX_SOURCES = 1 << 16
_UNSET_WORDS = ("none", "null")


def resolve(*layers: Layer) -> dict[str, Setting]:
    """Returns every field's value and source.

    Args:
        layers: settings, the weakest layer first.

    Returns:
        A setting for every field; fields that no layer sets have their default.

    Raises:
        ConfigError: a layer names a field that does not exist.
    """
    resolved = {name: Setting(field.default, DEFAULT) for name, field in FIELDS.items()}
    for layer in layers:
        for name, setting in _with_both_names(layer).items():
            if name not in FIELDS:
                raise ConfigError(
                    f"unknown setting {show(name)} (from "
                    f"{setting.source}).{closest(name[:100], FIELDS)}"
                )
            resolved[name] = setting
    return resolved


def _with_both_names(layer: Layer) -> Layer:
    """Makes cp_exchange and accelerate's cp_comm_strategy, which mean the same, agree in a layer
    that sets either.
    """
    strategy, exchange = layer.get("cp_comm_strategy"), layer.get("cp_exchange")
    if strategy is not None and strategy.source.kind == "launcher":
        # Not the user's choice: it must not override a weaker layer's.
        return _with_both_names(
            {name: setting for name, setting in layer.items() if setting is not strategy}
        )
    if strategy is None:
        if exchange is None:
            return layer
        words = {ours: theirs for theirs, ours in EXCHANGES.items()}
        strategy = Setting(words[str(exchange.value)], exchange.source, str(exchange.value))
    elif exchange is None:
        exchange = Setting(EXCHANGES[str(strategy.value)], strategy.source, str(strategy.value))
    elif EXCHANGES[str(strategy.value)] != exchange.value:
        raise ConfigError(
            f"cp_exchange={exchange.value} (from {exchange.source}) and "
            f"cp_comm_strategy={strategy.value} (from {strategy.source}) "
            f"contradict each other: {strategy.value} is accelerate's name for "
            f"{EXCHANGES[str(strategy.value)]}. Keep cp_exchange alone."
        )
    return {**layer, "cp_exchange": exchange, "cp_comm_strategy": strategy}


def yaml_layer(path: str | Path) -> dict[str, Setting]:
    """Reads the layer of a YAML file's sections; see `yaml_file.read_yaml_layer`.

    Args:
        path: the file.

    Returns:
        The settings that the file makes.

    Raises:
        ConfigError: the file or a value in it is not legal.
    """
    return read_yaml_layer(path)


def environment_layer(environ: Mapping[str, str] | None = None) -> dict[str, Setting]:
    """Reads the layer of the `PARALLELISM_CONFIG_*` and `MEMORY_CONFIG_*` variables; an empty one
    counts as unset.

    Args:
        environ: the variables, those of this process where `None`.

    Returns:
        The settings that the environment makes. Where `ulysses-accel launch` exported a variable,
        the setting's source is the one that the launcher recorded.

    Raises:
        ConfigError: a variable with the prefix is unknown, or its value is not legal.
    """
    environ = os.environ if environ is None else environ
    variables = {field.variable: field for field in FIELDS.values()}
    recorded = _recorded_sources(environ.get(SOURCES_VARIABLE, ""))
    layer: dict[str, Setting] = {}
    for variable, text in environ.items():
        if not variable.startswith(VARIABLE_PREFIXES) or not text.strip():
            continue
        if variable not in variables:
            raise ConfigError(
                "unknown environment variable "
                f"{ascii(variable)[1:-1][:100]}.{closest(variable[:100], variables)}"
            )
        field = variables[variable]
        if field.name == "sp_attn_implementation" and text.strip().lower() in _UNSET_WORDS:
            continue
        layer[field.name] = field.check(
            text, _environment_source(variable, field.name, text, environ, recorded)
        )
    return layer


def argument_layer(values: Mapping[str, object], source: Source) -> dict[str, Setting]:
    """Builds a layer from Python values that share a source; `None` counts as unset.

    Args:
        values: field name to value.
        source: where all of them came from.

    Returns:
        The settings of the values that are not `None`.

    Raises:
        ConfigError: a name is unknown or a value is not legal.
    """
    layer: dict[str, Setting] = {}
    for name, value in values.items():
        if name not in FIELDS:
            raise ConfigError(
                f"unknown setting {show(name)} (from {source}).{closest(str(name)[:100], FIELDS)}"
            )
        if value is not None:
            layer[name] = FIELDS[name].check(value, source)
    return layer


def command_line_layer(values: Mapping[str, str]) -> dict[str, Setting]:
    """Builds the layer of the launcher's flags.

    Args:
        values: field name to the text after its flag, only for flags that the user wrote.

    Returns:
        The settings, each with its flag as the source.

    Raises:
        ConfigError: a name is unknown or a value is not legal.
    """
    layer: dict[str, Setting] = {}
    for name, text in values.items():
        flag = FIELDS[name].flag if name in FIELDS else f"--parallelism-config-{name}"
        layer.update(argument_layer({name: text}, Source("command line", f"command line {flag}")))
    return layer


def export_environment(
    settings: Mapping[str, Setting], always: Collection[str] = ()
) -> dict[str, str]:
    """Writes settings as the variables that `environment_layer` reads back in a worker process.

    Args:
        settings: the launcher's resolved settings.
        always: fields to write even where they are defaults.

    Returns:
        One variable for each setting that is not a default, and one that carries their sources.
    """
    exported: dict[str, str] = {}
    recorded: dict[str, dict[str, str]] = {}
    for name, setting in settings.items():
        if setting.source.kind == "default" and name not in always:
            continue
        text = str(setting.value)
        exported[FIELDS[name].variable] = text
        recorded[name] = {"value": text, "kind": setting.source.kind, "source": str(setting.source)}
    exported[SOURCES_VARIABLE] = json.dumps(recorded, sort_keys=True)
    return exported


def _environment_source(
    variable: str,
    name: str,
    text: str,
    environ: Mapping[str, str],
    recorded: Mapping[str, tuple[str, Source]],
) -> Source:
    # A recorded source holds only while the variable still has the value that the launcher set.
    if name in recorded and recorded[name][0] == text:
        return recorded[name][1]
    stock_launched = (
        not environ.get(SOURCES_VARIABLE) and environ.get(STOCK_GATE_VARIABLE, "").lower() == "true"
    )
    if stock_launched and name.endswith("_size") and text.strip() == "1":
        # accelerate 1.15's launcher exports 1 for every size that was left out: not a choice.
        return Source(
            "launcher",
            f"env {variable}, which accelerate launch sets to 1 where the size is left out",
        )
    if stock_launched and name == "cp_comm_strategy" and text.strip() == "allgather":
        return Source(
            "launcher",
            f"env {variable}, which accelerate launch sets to allgather by default",
        )
    return Source("env", f"env {variable}")


def _recorded_sources(text: str) -> dict[str, tuple[str, Source]]:
    # Sources are for messages only: a damaged record must not stop a job, so what does not parse is
    # left out.
    try:
        record = json.loads(text) if 0 < len(text) <= _MAX_SOURCES else {}
    except (ValueError, RecursionError):
        return {}
    sources: dict[str, tuple[str, Source]] = {}
    for name, entry in record.items() if isinstance(record, dict) else ():
        if name not in FIELDS or not isinstance(entry, dict):
            continue
        value, kind, source = (str(entry.get(key, "")) for key in ("value", "kind", "source"))
        if kind in SOURCE_KINDS:
            sources[name] = (value, Source(cast(SourceKind, kind), ascii(source)[1:-1][:200]))
    return sources
