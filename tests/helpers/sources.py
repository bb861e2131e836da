"""What the policy tests read: this repository's files, and their syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ulysses_accel"
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".json", ".cfg", ".cff", ".in"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(*folders: str) -> list[Path]:
    """All Python files of the given top-level folders."""
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def text_files() -> list[Path]:
    """Every file that a reader sees."""
    folders = (
        ".github",
        "ulysses_accel",
        "configs",
        "docs",
        "examples",
        "benchmarks",
        "tests",
        "requirements",
    )
    inside = [
        file
        for folder in folders
        for file in (ROOT / folder).rglob("*")
        if file.suffix in TEXT_SUFFIXES
    ]
    top = [
        file
        for file in ROOT.iterdir()
        if file.is_file() and (file.suffix in TEXT_SUFFIXES or file.name == "Makefile")
    ]
    return sorted([*inside, *top, ROOT / ".ci" / "run"])


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), filename=str(file))


def where(file: Path, node: ast.AST | None = None) -> str:
    """A place in the repository, as an editor opens it."""
    return f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> Iterator[tuple[str, ast.AST]]:
    """The dotted names that a file imports, wherever in the file that is."""
    name = module_name(file)
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base]).rstrip(".")
            yield from ((f"{base}.{alias.name}", node) for alias in node.names)


def functions(file: Path) -> Iterator[Function]:
    for node in ast.walk(tree(file)):
        if isinstance(node, Function):
            yield node


def body_lines(function: Function) -> int:
    """Lines of the body; the docstring doesn't count."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def called_name(call: ast.Call) -> str:
    """`a.b.c(...)` is called `a.b.c`; what is not a plain name is left out."""
    return ast.unparse(call.func) if isinstance(call.func, ast.Name | ast.Attribute) else ""
