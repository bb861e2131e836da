"""Reads the `parallelism_config:` section of a YAML file, with the line of every value.

Composes nodes and never constructs objects. Anchors, aliases, explicit tags, deep nesting and huge files are refused:
a configuration needs none of them, and each is a way to make a small file expensive or surprising.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

import yaml

from ulysses_accel.config_fields import FIELDS, Setting, Source, show
from ulysses_accel.errors import ConfigError, closest

SECTION = "parallelism_config"
PREFIX = "parallelism_config_"
MAX_BYTES = 1 << 20
MAX_DEPTH = 32
_NULL = "tag:yaml.org,2002:null"


def read_yaml_layer(path: str | Path) -> dict[str, Setting]:
    """Reads every setting of the file's `parallelism_config:` section.

    Args:
        path: an accelerate config file, or any YAML file with such a section.

    Returns:
        The settings that the section makes, empty where the file has no section.

    Raises:
        ConfigError: the file can't be read, is not plain YAML, or has an unknown key or an illegal value.
    """
    return parse_yaml_layer(read_text(path), str(path))


def parse_yaml_layer(text: str, path: str) -> dict[str, Setting]:
    """Reads the settings from YAML text.

    Args:
        text: the file's text.
        path: the name to show in errors and sources.

    Returns:
        The settings of the `parallelism_config:` section.

    Raises:
        ConfigError: as for `read_yaml_layer`.
    """
    section = _section(compose_mapping(text, path), path)
    layer: dict[str, Setting] = {}
    for key, node, line in _entries(section, path):
        name = key.removeprefix(PREFIX)
        source = Source("yaml", f"{path}:{line} ({key})")
        if name not in FIELDS:
            raise ConfigError(
                f"{path}:{line}: unknown key {show(key)} in the section '{SECTION}:'.{closest(name[:100], FIELDS)}"
            )
        if not isinstance(node, yaml.ScalarNode):
            raise ConfigError(
                f"{name} (from {source}) must be one value, not a list or a mapping. Write `{key}: VALUE`."
            )
        if name in layer:
            raise ConfigError(f"{name} is set twice: by {layer[name].source} and by {path}:{line} ({key}). Keep one.")
        if node.tag != _NULL:
            layer[name] = FIELDS[name].settle(node.value, source)
    return layer


def read_text(path: str | Path) -> str:
    """Reads a configuration file.

    Args:
        path: the file.

    Returns:
        Its text.

    Raises:
        ConfigError: the file is missing, unreadable, not UTF-8, or above the size limit.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{show(str(path))}: can't read this configuration file: {error}. Check its path.") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes. A configuration file is small: check the path.")
    return text


def compose_mapping(text: str, path: str) -> yaml.MappingNode:
    """Composes YAML text whose top level must be a mapping.

    Args:
        text: the file's text.
        path: the name to show in errors.

    Returns:
        The top-level mapping's node.

    Raises:
        ConfigError: the text is empty, not YAML, not a mapping, or uses anchors, aliases, tags or deep nesting.
    """
    try:
        _refuse_surprises(text, path)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        problem = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{path}: not valid YAML: {ascii(problem)[1:-1]}. Correct the file.") from None
    if node is None:
        raise ConfigError(f"{path}: the file is empty. Write a section '{SECTION}:' with keys such as sp_size.")
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: the top level must be `key: value` lines. Write a section '{SECTION}:'.")
    return node


def _refuse_surprises(text: str, path: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        tag = getattr(event, "tag", None)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ConfigError(f"{path}:{line}: anchors and aliases are not allowed here. Write the value out.")
        if tag is not None:
            raise ConfigError(f"{path}:{line}: tags such as {show(tag)} are not allowed here. Write a plain value.")
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            depth += 1
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            depth -= 1
        if depth > MAX_DEPTH:
            raise ConfigError(f"{path}:{line}: nested deeper than {MAX_DEPTH} levels. Write a flat section.")


def _entries(mapping: yaml.MappingNode, path: str) -> Iterator[tuple[str, yaml.Node, int]]:
    for key, value in mapping.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{path}:{line}: a key must be a plain word. Write `key: value`.")
        yield key.value, value, line


def _section(top: yaml.MappingNode, path: str) -> yaml.MappingNode:
    found = yaml.MappingNode(tag="tag:yaml.org,2002:map", value=[])
    seen: int | None = None
    for key, node, line in _entries(top, path):
        if key == SECTION:
            if seen is not None:
                raise ConfigError(f"{path}:{line}: a second section '{SECTION}:' (first on line {seen}). Keep one.")
            seen = line
            if isinstance(node, yaml.MappingNode):
                found = node
            elif not (isinstance(node, yaml.ScalarNode) and node.tag == _NULL):
                raise ConfigError(f"{path}:{line}: '{SECTION}:' must hold `key: value` lines, such as sp_size: 2.")
        elif key.removeprefix(PREFIX) in FIELDS:
            raise ConfigError(f"{path}:{line}: '{key}' stands outside of the section. Indent it below '{SECTION}:'.")
        elif difflib.SequenceMatcher(None, key[:100], SECTION).ratio() > 0.85:
            raise ConfigError(f"{path}:{line}: unknown section {show(key)}. Did you mean '{SECTION}:'?")
    return found
