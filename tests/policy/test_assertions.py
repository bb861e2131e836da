"""Every test asserts something, itself or through the functions of this test suite that it
calls.
"""

from __future__ import annotations

import ast
from pathlib import Path

from tests.helpers.sources import (
    ROOT,
    Function,
    called_name,
    functions,
    module_name,
    python_files,
    tree,
    where,
)

ASSERTING = ("raises", "warns", "fail", "assert_close", "assert_equal", "assert_allclose")


def test_every_test_asserts_something() -> None:
    modules = {module_name(file): file for file in python_files("tests")}
    silent = [
        f"{where(file, node)}: {node.name}"
        for file in modules.values()
        for node in functions(file)
        if node.name.startswith("test_") and not _asserts(node, file, modules, set())
    ]
    assert not silent


def _asserts(
    function: Function, file: Path, modules: dict[str, Path], seen: set[tuple[Path, str]]
) -> bool:
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call) and called_name(node).rpartition(".")[2] in ASSERTING:
            return True
    # Ranks are given as functions, not called: every name that is used counts.
    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)} - {function.name}
    names |= {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
    for name in names:
        place = _definition(name, file, modules)
        if place is None or (place[1], name) in seen:
            continue
        seen.add((place[1], name))
        if _asserts(place[0], place[1], modules, seen):
            return True
    return False


def _definition(name: str, file: Path, modules: dict[str, Path]) -> tuple[Function, Path] | None:
    for node in tree(file).body:
        if isinstance(node, Function) and node.name == name:
            return node, file
        if isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definition(alias.name, modules[node.module], modules)
    return None


def test_a_test_without_an_assertion_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "test_x.py"
    file.write_text(
        "def helper():\n    assert 1\n\ndef test_a():\n    print(1)\n\ndef test_b():\n    "
        "run(helper)\n"
    )
    found = {node.name: _asserts(node, file, {}, set()) for node in functions(file)}
    assert found == {"helper": True, "test_a": False, "test_b": True}
    assert not file.is_relative_to(ROOT)
