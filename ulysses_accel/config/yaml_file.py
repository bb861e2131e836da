"""Reads the sections `parallelism_config:` and `memory_config:` of a YAML file, with the line of
every value.

Stock accelerate refuses a file with a section that it does not know. In a file that it is to read
too, the memory settings stand in the section `parallelism_config:`, under their full names such as
`memory_config_tiled_mlp`.

Composes nodes and never constructs objects. Anchors, aliases, explicit tags, deep nesting and huge
files are refused: a configuration needs none of them, and each is a way to make a small file
expensive or surprising.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

import yaml

from ulysses_accel.config.settings import (
    FIELDS,
    MEMORY,
    PARALLELISM,
    SECTIONS,
    Setting,
    Source,
    show,
)
from ulysses_accel.errors import ConfigError, closest

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
_NULL = "tag:yaml.org,2002:null"
_EXAMPLES = {PARALLELISM: "sp_size: 2", MEMORY: "tiled_mlp: true"}


def read_yaml_layer(path: str | Path) -> dict[str, Setting]:
    """Reads every setting of the file's sections.

    Args:
        path: an accelerate config file, or any YAML file with such sections.

    Returns:
        The settings that the sections make, empty where the file has none.

    Raises:
        ConfigError: the file can't be read, is not plain YAML, or has an unknown key or an illegal
            value.
    """
    return parse_yaml_layer(read_text(path), str(path))


def parse_yaml_layer(text: str, path: str) -> dict[str, Setting]:
    """Reads the settings from YAML text.

    Args:
        text: the file's text.
        path: the name to show in errors and sources.

    Returns:
        The settings of the sections.

    Raises:
        ConfigError: as for `read_yaml_layer`.
    """
    sections = _sections(compose_mapping(text, path), path)
    layer: dict[str, Setting] = {}
    for section, (key, node, line) in (
        (name, entry) for name in sections for entry in _entries(sections[name], path)
    ):
        name = _field_name(section, key, f"{path}:{line}")
        source = Source("yaml", f"{path}:{line} ({key})")
        if not isinstance(node, yaml.ScalarNode):
            raise ConfigError(
                f"{name} (from {source}) must be one value, not a list or a mapping. Write `{key}: "
                "VALUE`."
            )
        if name in layer:
            raise ConfigError(
                f"{name} is set twice: by {layer[name].source} and by {path}:{line} ({key}). Keep "
                "one."
            )
        if node.tag != _NULL:
            layer[name] = FIELDS[name].check(node.value, source)
    return layer


def _field_name(section: str, key: str, place: str) -> str:
    """Returns the name of the field that a key in a section sets."""
    home = MEMORY if key.startswith(f"{MEMORY}_") else section
    name = key.removeprefix(f"{home}_")
    if name in FIELDS and FIELDS[name].section == home:
        return name
    legal = [field.name for field in FIELDS.values() if field.section == home]
    hint = (
        f" It belongs below '{FIELDS[name].section}:'."
        if name in FIELDS
        else closest(name[:100], legal)
    )
    raise ConfigError(f"{place}: unknown key {show(key)} in the section '{section}:'.{hint}")


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
        raise ConfigError(
            f"{show(str(path))}: can't read this configuration file: {error}. Check its path."
        ) from None
    if len(content) > MAX_BYTES:
        raise ConfigError(
            f"{path}: larger than {MAX_BYTES} bytes. A configuration file is small: check the path."
        )
    return text


def compose_mapping(text: str, path: str) -> yaml.MappingNode:
    """Composes YAML text whose top level must be a mapping.

    Args:
        text: the file's text.
        path: the name to show in errors.

    Returns:
        The top-level mapping's node.

    Raises:
        ConfigError: the text is empty, not YAML, not a mapping, or uses anchors, aliases, tags or
            deep nesting.
    """
    try:
        _refuse_surprises(text, path)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        problem = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{path}: not valid YAML: {ascii(problem)[1:-1]}. Correct the file."
        ) from None
    if node is None:
        raise ConfigError(
            f"{path}: the file is empty. Write a section '{PARALLELISM}:' with keys such as "
            "sp_size."
        )
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{path}: the top level must be `key: value` lines. Write a section '{PARALLELISM}:'."
        )
    return node


def _refuse_surprises(text: str, path: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        tag = getattr(event, "tag", None)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ConfigError(
                f"{path}:{line}: anchors and aliases are not allowed here. Write the value out."
            )
        if tag is not None:
            raise ConfigError(
                f"{path}:{line}: tags such as {show(tag)} are not allowed here. Write a plain "
                "value."
            )
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            depth += 1
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            depth -= 1
        if depth > MAX_DEPTH:
            raise ConfigError(
                f"{path}:{line}: nested deeper than {MAX_DEPTH} levels. Write a flat section."
            )


def _entries(mapping: yaml.MappingNode, path: str) -> Iterator[tuple[str, yaml.Node, int]]:
    for key, value in mapping.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{path}:{line}: a key must be a plain word. Write `key: value`.")
        yield key.value, value, line


def _sections(top: yaml.MappingNode, path: str) -> dict[str, yaml.MappingNode]:
    sections: dict[str, yaml.MappingNode] = {}
    seen: dict[str, int] = {}
    for key, node, line in _entries(top, path):
        if key not in SECTIONS:
            _refuse_stray_key(key, f"{path}:{line}")
            continue
        if key in seen:
            raise ConfigError(
                f"{path}:{line}: a second section '{key}:' (first on line {seen[key]}). Keep one."
            )
        seen[key] = line
        if isinstance(node, yaml.MappingNode):
            sections[key] = node
        elif not (isinstance(node, yaml.ScalarNode) and node.tag == _NULL):
            raise ConfigError(
                f"{path}:{line}: '{key}:' must hold `key: value` lines, such as {_EXAMPLES[key]}."
            )
    return sections


def _refuse_stray_key(key: str, place: str) -> None:
    # Names of memory settings, such as `checkpoint`, are keys of other programs too: only the full
    # name is ours.
    ours = {field.name: field for field in FIELDS.values() if field.section == PARALLELISM}
    field = {**ours, **{field.key: field for field in FIELDS.values()}}.get(key)
    if field is not None:
        raise ConfigError(
            f"{place}: '{key}' stands outside of the section. Indent it below '{field.section}:'."
        )
    for section in SECTIONS:
        if difflib.SequenceMatcher(None, key[:100], section).ratio() > 0.85:
            raise ConfigError(f"{place}: unknown section {show(key)}. Did you mean '{section}:'?")
