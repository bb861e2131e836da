"""Private names of other libraries are used in `_private_api.py` only, where each has a test."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.helpers.sources import PACKAGE, python_files, tree, where

PRIVATE_API = PACKAGE / "_private_api.py"
# Names outside of that file that no other place can hold, with the reason.
ALLOWED = {
    # The only walk of frames.
    ("integrations/frames.py", "_getframe"),
    # The end that the names of all of a torch module's tables of hooks have.
    ("memory/tiling/probe.py", "_hooks"),
    # Operators whose bytes and products the tracker counts, public ones among them: names that it
    # compares what ran with. One that torch renames is counted as an ordinary operator.
    *(
        ("memory/tracker/tracker.py", name)
        for name in (
            *("_to_copy", "_foreach_copy_", "_pin_memory", "_grouped_mm", "_scaled_mm"),
            *("_addmm_activation", "_scaled_dot_product_", "_flash_attention_"),
            *("_efficient_attention_", "_cudnn_attention_"),
        )
    ),
}
FRAME_WALKS = {"_getframe", "currentframe", "f_back"}


def is_private(name: str) -> bool:
    return name.isidentifier() and name.strip("_") != "" and name[0] == "_" and name[:2] != "__"


def defined_names(module: ast.Module) -> set[str]:
    """Returns what a file defines: functions, classes, arguments, variables, attributes of self."""
    names = set()
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Attribute):
            is_set = isinstance(node.ctx, ast.Store)
            names |= {node.attr} if is_set and _is_self(node.value) else set()
    return names


def used_names(module: ast.Module) -> list[tuple[str, ast.AST, bool]]:
    """Returns the private names that a file reads of others: attributes, imports, and texts that
    can name an attribute; and whether it is an attribute of self.
    """
    used: list[tuple[str, ast.AST, bool]] = []
    pieces = {
        id(piece)
        for node in ast.walk(module)
        if isinstance(node, ast.JoinedStr)
        for piece in node.values
    }
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute):
            used.append((node.attr, node, _is_self(node.value)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in pieces:
                used.append((node.value, node, False))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            base = (getattr(node, "module", "") or "").split(".")
            if base[0] == "ulysses_accel":
                continue
            parts = [*base, *(part for alias in node.names for part in alias.name.split("."))]
            used += [(part, node, False) for part in parts]
    return [(name, node, on_self) for name, node, on_self in used if is_private(name)]


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def foreign_names(
    modules: dict[Path, ast.Module], upstream: ast.Module
) -> dict[tuple[str, str], str]:
    """Returns the private names of other libraries that files use, with the place of one use.

    A name is another library's where nothing in the package defines it, or where `_private_api.py`
    uses it and the object is not the file's own `self`.
    """
    ours = set().union(*map(defined_names, modules.values()))
    theirs = {name for name, _, _ in used_names(upstream)}
    foreign = {}
    for file, module in modules.items():
        for name, node, on_self in used_names(module):
            if name not in ours or (name in theirs and not on_self):
                foreign[(file.relative_to(PACKAGE).as_posix(), name)] = where(file, node)
    return foreign


def test_private_names_of_other_libraries_are_in_one_file() -> None:
    files = [file for file in python_files("ulysses_accel") if file != PRIVATE_API]
    foreign = foreign_names({file: tree(file) for file in files}, tree(PRIVATE_API))
    assert not {place: use for place, use in foreign.items() if place not in ALLOWED}
    assert set(foreign) >= ALLOWED, "an exception that nothing needs any more"


def test_frames_are_walked_in_one_file() -> None:
    wrong = [
        f"{where(file, node)}: {node.attr}"
        for file in python_files("ulysses_accel")
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Attribute) and node.attr in FRAME_WALKS
        if file != PACKAGE / "integrations" / "frames.py"
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch\ntorch._C.f()", {"_C"}),
        ("from torch.utils._pytree import tree_leaves", {"_pytree"}),
        ("from transformers.x import _kernel", {"_kernel"}),
        ("import a._b.c", {"_b"}),
        ("getattr(model, '_flag', None)", {"_flag"}),
        ("class A:\n    def f(self):\n        self._x = 1\n        return self._x", set()),
        ("def _f(): ...\n_f()\nobj._f", set()),
        # A name that is both ours and upstream's is ours on self only.
        ("class A:\n    def f(self):\n        self._version = 1", set()),
        ("class A:\n    def f(self, x):\n        self._version = x._version", {"_version"}),
        ("f'{x}_size'; '_'; '__init__'; 'a _b'", set()),
    ],
)
def test_the_check_sees_what_it_should(source: str, names: set[str]) -> None:
    file = PACKAGE / "x.py"
    foreign = foreign_names({file: ast.parse(source)}, ast.parse("tensor._version"))
    assert {name for _, name in foreign} == names
