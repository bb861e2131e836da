"""Reads what a model's forward does from its source, where nothing in the built model tells it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from torch import nn


@cache
def syntax_of(function: Callable[..., Any]) -> ast.FunctionDef | None:
    """Returns the syntax of a class's forward, undecorated; None where its source can't be had, or
    is torch's own.
    """
    forward = inspect.unwrap(function)
    if forward.__module__.startswith("torch."):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    found = tree.body[0]
    return found if isinstance(found, ast.FunctionDef) else None


def forward_of(module: nn.Module) -> ast.FunctionDef | None:
    """Returns the syntax of a module's forward, None where it can't be had."""
    return syntax_of(type(module).forward)


@cache
def _parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    """Returns the parameters of a module's forward by their names."""
    return _parameters_of(type(module).forward)


def takes_keywords(module: nn.Module) -> bool:
    """Returns whether a module's forward takes any further keyword argument."""
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters(module).values())


def calls_of(tree: ast.AST, function: str) -> list[ast.Call]:
    """Returns every call of a function, by the text that it is called by."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == function
    ]


def keyword(call: ast.Call, name: str | None) -> ast.expr | None:
    """Returns what a call is given by a keyword, None where it isn't; `name=None` stands for
    `**keywords`.
    """
    return next((word.value for word in call.keywords if word.arg == name), None)


def is_name(node: ast.AST | None, name: str) -> bool:
    """Returns whether a node is a variable of that name."""
    return isinstance(node, ast.Name) and node.id == name


def mentions(node: ast.AST, name: str) -> bool:
    """Returns whether a variable of that name occurs in an expression."""
    return any(is_name(part, name) for part in ast.walk(node))


def text_of(node: ast.AST, limit: int = 80) -> str:
    """Returns an expression in one line, cut at `limit` characters."""
    return " ".join(ast.unparse(node).split())[:limit]


def assignments(tree: ast.AST, module: nn.Module) -> Iterator[tuple[str, ast.expr]]:
    """Yields what names are assigned, except where this module's attributes say that it does not
    happen.
    """
    for node in live_nodes(tree, module):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and value is not None:
            yield from ((target.id, value) for target in targets if isinstance(target, ast.Name))


def live_nodes(tree: ast.AST, module: nn.Module) -> Iterator[ast.AST]:
    """Yields the nodes of a forward, without the branches that this module's attributes rule
    out.
    """
    children: list[ast.AST] = list(ast.iter_child_nodes(tree))
    if isinstance(tree, ast.If):
        decided = _truth(tree.test, module)
        children = [
            tree.test,
            *([] if decided is False else tree.body),
            *([] if decided is True else tree.orelse),
        ]
    if isinstance(tree, ast.IfExp):
        decided = _truth(tree.test, module)
        children = [
            tree.test,
            *([] if decided is False else [tree.body]),
            *([] if decided is True else [tree.orelse]),
        ]
    for node in children:
        yield node
        yield from live_nodes(node, module)


def _truth(test: ast.expr, module: nn.Module) -> bool | None:
    """Returns what a condition on a module's own attributes is, None where it asks for anything
    else.
    """
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = _truth(test.operand, module)
        return None if inner is None else not inner
    if isinstance(test, ast.BoolOp):
        decisive = isinstance(test.op, ast.Or)
        parts = [_truth(part, module) for part in test.values]
        return decisive if decisive in parts else None if None in parts else not decisive
    if isinstance(test, ast.Compare) and ast.unparse(test).endswith((" is None", " is not None")):
        known, value = _own_value(test.left, module)
        return (value is None) is isinstance(test.ops[0], ast.Is) if known else None
    known, value = _own_value(test, module)
    return bool(value) if known and isinstance(value, bool | int | str | None) else None


def _own_value(node: ast.expr, module: nn.Module) -> tuple[bool, Any]:
    """Returns whether an expression is `self.name` or `self.config.name`, and its value; absent
    names are None.
    """
    text = ast.unparse(node)
    if text == "self.training":
        return False, None
    for prefix, owner in (("self.config.", getattr(module, "config", None)), ("self.", module)):
        name = text.removeprefix(prefix)
        if text.startswith(prefix) and name.isidentifier():
            return True, getattr(owner, name, None)
    return False, None


@cache
def _names_interface(forward: ast.FunctionDef) -> bool:
    """Whether it is worth looking at each module of a class; most route no attention."""
    return "ALL_ATTENTION_FUNCTIONS" in ast.unparse(forward)


def attention_calls(module: nn.Module) -> list[ast.Call]:
    """Returns the calls of transformers' attention functions in a module's forward; none where it
    routes none.
    """
    forward = forward_of(module)
    if forward is None or not _names_interface(forward):
        return []
    interfaces = {
        name
        for name, value in assignments(forward, module)
        if "ALL_ATTENTION_FUNCTIONS" in ast.unparse(value)
    }
    return [call for interface in interfaces for call in calls_of(forward, interface)]
