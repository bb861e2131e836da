"""A config file that stock accelerate can read, where ours has a section that it refuses."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from ulysses_accel.config.settings import MEMORY
from ulysses_accel.config.yaml_file import read_text


@contextmanager
def readable_by_accelerate(path: str | None) -> Iterator[str | None]:
    """Yields the path of a file without the section `memory_config:`, which accelerate does not
    know.

    Args:
        path: a file that our reader has accepted, or `None`.

    Yields:
        The same path where the file has no such section, else that of a copy, which is removed
        afterwards.
    """
    content = {} if path is None else yaml.safe_load(read_text(path))
    if MEMORY not in content:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        # accelerate chooses its reader by the file's suffix.
        copy = Path(folder, "config.yaml")
        copy.write_text(
            yaml.safe_dump({key: value for key, value in content.items() if key != MEMORY})
        )
        yield str(copy)
