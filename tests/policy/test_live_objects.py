"""Live objects are changed through `Installation`, which restores them; classes and modules never.

What is set on another object without it stays there, or is restored by code that each technique
writes anew.
"""

from __future__ import annotations

import ast

import pytest

from tests.helpers.sources import PACKAGE, called_name, python_files, tree, where

# Files that set attributes of other objects by name, with the reason.
ALLOWED = {
    "installation.py": "is the place for it",
    "sequence/sharding.py": "marks a tensor that it has just made as a shard",
    "config/parallelism.py": "fills the copy that it makes of itself",
    "attention/huggingface/registry.py": "fills the copies that it makes of configs",
    "introspection/probe/twin.py": "fills the copy that it makes of a config",
    "cli/launch.py": "fills accelerate's parsed arguments",
    "memory/tiling/structure.py": "builds a small twin of a module",
    "memory/tiling/probe.py": "builds a small twin of a module",
    "integrations/accelerate/process_state.py": "sets accelerate's state for CPU ranks",
    "forward/override.py": "overrides a forward that others may wrap again, and restores it",
    "forward/checkpoint_context.py": "goes around a function that transformers may set again",
}
SETTERS = {"setattr", "delattr", "object.__setattr__", "object.__delattr__"}
CHANGES = {"update", "pop", "setdefault", "clear", "popitem"}


def foreign_changes(module: ast.Module) -> list[ast.AST]:
    """Returns where a file sets attributes by name on objects other than `self`: with `setattr`, or
    through `vars(x)` and `x.__dict__`.
    """
    return [node for node in ast.walk(module) if _changes_another(node)]


def _changes_another(node: ast.AST) -> bool:
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
        return _is_foreign_dict(node.value)
    if not isinstance(node, ast.Call):
        return False
    if called_name(node) in SETTERS:
        return not _is_self(node.args[0])
    is_change = isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES
    return is_change and _is_foreign_dict(node.func.value)


def patched_classes_and_modules(module: ast.Module) -> list[ast.AST]:
    """Returns where a file sets an attribute of something that it imports, or of a class."""
    imported = {
        alias.asname or alias.name.partition(".")[0]
        for node in ast.walk(module)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    places: list[ast.AST] = []
    for node in ast.walk(module):
        target: ast.AST | None = None
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            target = node.value
        elif isinstance(node, ast.Call) and called_name(node) in SETTERS:
            target = node.args[0]
        if target is not None and _is_class_or_module(target, imported):
            places.append(node)
    return places


def _is_class_or_module(target: ast.AST, imported: set[str]) -> bool:
    if isinstance(target, ast.Call):
        return called_name(target) == "type"
    if isinstance(target, ast.Attribute):
        return target.attr == "__class__" or _is_class_or_module(target.value, imported)
    return isinstance(target, ast.Name) and (target.id in imported or target.id == "cls")


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _is_foreign_dict(node: ast.AST) -> bool:
    if isinstance(node, ast.Call) and called_name(node) == "vars" and node.args:
        return not _is_self(node.args[0])
    return isinstance(node, ast.Attribute) and node.attr == "__dict__" and not _is_self(node.value)


def test_live_objects_are_changed_through_an_installation() -> None:
    wrong = [
        where(file, node)
        for file in python_files("ulysses_accel")
        for node in foreign_changes(tree(file))
        if file.relative_to(PACKAGE).as_posix() not in ALLOWED
    ]
    assert not wrong


def test_no_class_and_no_module_is_patched() -> None:
    wrong = [
        where(file, node)
        for file in python_files("ulysses_accel")
        for node in patched_classes_and_modules(tree(file))
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("source", "is_foreign"),
    [
        ("setattr(model, name, value)", True),
        ("setattr(self, name, value)", False),
        ("setattr(self.model, name, value)", True),
        ("delattr(model, name)", True),
        ("object.__setattr__(model, 'x', 1)", True),
        ("vars(model)['forward'] = f", True),
        ("vars(model).pop('forward')", True),
        ("model.__dict__.update(x=1)", True),
        ("vars(self)['forward'] = f", False),
        ("x = vars(model).get('forward')", False),
    ],
)
def test_the_check_sees_changes_of_others(source: str, is_foreign: bool) -> None:
    assert bool(foreign_changes(ast.parse(source))) is is_foreign


@pytest.mark.parametrize(
    ("source", "is_patched"),
    [
        ("import torch\ntorch.nn.Linear.forward = f", True),
        ("from transformers import Trainer\nTrainer.compute_loss = f", True),
        ("from transformers import Trainer\nsetattr(Trainer, name, f)", True),
        ("import a.b as c\ndel c.x", True),
        ("type(model).forward = f", True),
        ("model.__class__.forward = f", True),
        ("model.forward = f", False),
        ("import torch\nmodel.dtype = torch.float32", False),
    ],
)
def test_the_check_sees_patches(source: str, is_patched: bool) -> None:
    assert bool(patched_classes_and_modules(ast.parse(source))) is is_patched
