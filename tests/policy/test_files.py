"""What a reader of any file meets: its length, its lines, no trace of one machine; and the public
names.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.helpers.sources import python_files, text_files, where

MAX_FILE_LINES = 600
MAX_LINE_CHARACTERS = 100
CODE = ("ulysses_accel", "examples", "benchmarks")


def test_files_fit_the_budget() -> None:
    too_long = {
        where(file): lines
        for file in python_files(*CODE, "tests")
        if (lines := len(file.read_text().splitlines())) > MAX_FILE_LINES
    }
    assert not too_long


def test_lines_of_the_package_fit_the_budget() -> None:
    too_long = [
        f"{where(file)}:{number}"
        for file in python_files("ulysses_accel")
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if len(line.partition("  # type: ignore")[0]) > MAX_LINE_CHARACTERS
    ]
    assert not too_long


def test_public_names() -> None:
    import ulysses_accel

    expected = (Path(__file__).parent / "public_names.txt").read_text().split()
    assert sorted(ulysses_accel.__all__) == expected
    assert all(getattr(ulysses_accel, name) is not None for name in expected)


def test_no_file_names_a_machine() -> None:
    # Written in pieces, or this file would find itself.
    paths = "|".join(
        ["/" + top + "/" for top in ("work", "home", "root", "Users")] + ["/tmp/" + r"\w"]
    )
    hosts = "|".join(
        [
            r"py" + r"pi\.org",
            r"pythonhosted" + r"\.org",
            r"download\.py" + r"torch",
            "npm" + r"js\.org",
        ]
    )
    pattern = re.compile(rf"(?<![\w.]){paths}|{hosts}")
    wrong = [
        f"{where(file)}: {found.group()}"
        for file in text_files()
        if (found := pattern.search(file.read_text())) is not None
    ]
    assert not wrong
