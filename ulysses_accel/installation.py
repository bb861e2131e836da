"""Attributes that stand before a class's own on one instance, for the time of a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(target: Any, **values: Any) -> Iterator[None]:
    """Sets attributes of one instance; whatever it had before, or nothing, is there again afterwards."""
    own = vars(target)
    before = {name: own[name] for name in values if name in own}
    own.update(values)
    try:
        yield
    finally:
        for name in values:
            own.pop(name, None)
        own.update(before)
