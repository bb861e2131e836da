"""`batch_schema`: how the tensors of keys that only the user knows are sharded, as a
mapping and as text.

Imports neither torch nor accelerate, as `config.settings` does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Rule: TypeAlias = "str | int | Callable[..., Any]"

_WORDS = ("shard", "replicate")
_KEY = re.compile(r"[^\s=,()]+")
_DIM = re.compile(r"[+-]?[0-9]{1,3}")
_FORMS = (
    "Use 'shard' (the second dim is the sequence), 'replicate' (none is), "
    "or the sequence dim's number"
)


class BatchSchema(dict[str, Rule]):
    """A checked rule for each key; its text is `key=rule, key=rule`, functions by their
    names.

    Args:
        raw: a mapping from key to rule, or such text, which has no functions.

    Raises:
        ValueError: with the end of a sentence that begins with the setting and its value.
    """

    def __init__(self, raw: object) -> None:
        if isinstance(raw, str):
            super().__init__(_read(raw))
        elif isinstance(raw, Mapping):
            super().__init__({_key(name): _rule(name, rule) for name, rule in raw.items()})
        else:
            raise ValueError(
                "must map a batch's keys to rules. Use {'my_key': 'replicate'}, or "
                "my_key=replicate."
            )

    def __str__(self) -> str:
        return ", ".join(f"{name}={_written(rule)}" for name, rule in self.items())

    @property
    def plain(self) -> dict[str, str | int]:
        """The schema as JSON can have it: functions are their names, which are not read back."""
        return {name: _written(rule) if callable(rule) else rule for name, rule in self.items()}


def _written(rule: Rule) -> str:
    if callable(rule):
        return f"{getattr(rule, '__qualname__', type(rule).__name__)}()"
    return str(rule)


def _read(text: str) -> dict[str, Rule]:
    rules: dict[str, Rule] = {}
    for entry in filter(None, map(str.strip, text.split(","))):
        name, equals, rule = map(str.strip, entry.partition("="))
        if not equals:
            raise ValueError(
                f"has {entry[:80]!r}, which is no key=rule. Write my_key=replicate, other_key=2."
            )
        if name in rules:
            raise ValueError(f"has the key {name[:80]!r} twice. Keep one.")
        rules[_key(name)] = _rule(name, int(rule) if _DIM.fullmatch(rule) else rule)
    return rules


def _key(name: object) -> str:
    if not isinstance(name, str) or not _KEY.fullmatch(name):
        raise ValueError(
            f"has the key {name!r:.80}, which is no name in a batch. Use the key's name alone."
        )
    return name


def _rule(name: object, rule: object) -> Rule:
    is_dim = isinstance(rule, int) and not isinstance(rule, bool)
    if is_dim or rule in _WORDS or callable(rule):
        return rule  # type: ignore[return-value]
    raise ValueError(
        f"has the rule {rule!r:.80} for the key {name!r:.80}. {_FORMS}; a function only in Python, "
        "in the constructor."
    )
