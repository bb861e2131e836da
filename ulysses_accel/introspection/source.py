"""Reads what a model's forward does from its source, where nothing in the built model tells it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property
from typing import Any

from torch import nn


@cache
def syntax_of(function: Callable[..., Any]) -> ast.FunctionDef | None:
    """Returns the syntax of a class's forward, undecorated; None where its source can't be had, or
    is torch's own.
    """
    forward = inspect.unwrap(function)
    # Code made by `exec` may be of no module.
    if str(forward.__module__).startswith("torch."):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    definition = tree.body[0]
    return definition if isinstance(definition, ast.FunctionDef) else None


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
    """Returns what a call is passed by a keyword, None where it isn't; `name=None` stands for
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
    """Returns an expression in one line of at most `limit` characters."""
    return " ".join(ast.unparse(node).split())[:limit]


def assignments(tree: ast.AST, module: nn.Module) -> Iterator[tuple[str, ast.expr]]:
    """Yields what names are assigned, except where this module's attributes say that it does not
    happen.
    """
    return _assigned(live_nodes(tree, module))


def _assigned(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, ast.expr]]:
    for node in nodes:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and value is not None:
            for target in targets:
                if isinstance(target, ast.Name):
                    yield target.id, value


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
        if decisive in parts:
            return decisive
        return None if None in parts else not decisive
    if isinstance(test, ast.Compare) and _text(test).endswith((" is None", " is not None")):
        is_known, value = _attribute(test.left, module)
        return (value is None) is isinstance(test.ops[0], ast.Is) if is_known else None
    is_known, value = _attribute(test, module)
    return bool(value) if is_known and isinstance(value, bool | int | str | None) else None


def _attribute(node: ast.expr, module: nn.Module) -> tuple[bool, Any]:
    """Returns whether an expression is `self.name` or `self.config.name`, and its value; absent
    names are None.
    """
    text = _text(node)
    if text == "self.training":
        return False, None
    for prefix, owner in (("self.config.", getattr(module, "config", None)), ("self.", module)):
        name = text.removeprefix(prefix)
        if text.startswith(prefix) and name.isidentifier():
            return True, getattr(owner, name, None)
    return False, None


class LiveForward:
    """A forward without the branches that a module's attributes rule out; the same object for all
    modules that rule out the same ones.

    Args:
        tree: of the forward.
        module: one that has these attributes.
    """

    def __init__(self, tree: ast.FunctionDef, module: nn.Module) -> None:
        self.tree = tree
        self.nodes: tuple[ast.AST, ...] = tuple(live_nodes(tree, module))
        self.assigned: tuple[tuple[str, ast.expr], ...] = tuple(_assigned(self.nodes))

    @cached_property
    def attention_calls(self) -> tuple[ast.Call, ...]:
        """Calls of transformers' attention functions."""
        if "ALL_ATTENTION_FUNCTIONS" not in _text(self.tree):
            return ()
        calls: list[ast.Call] = []
        for name, value in self.assigned:
            if "ALL_ATTENTION_FUNCTIONS" in _text(value):
                calls += calls_of(self.tree, name)
        return tuple(dict.fromkeys(calls))

    @cached_property
    def subscripts(self) -> frozenset[str]:
        """The texts of what it takes of tensors by indices or slices."""
        return frozenset(_text(node) for node in self.nodes if isinstance(node, ast.Subscript))


# By the forward and the truth of its conditions: as many as there are classes in a model, or few
# more.
_LIVE: dict[tuple[ast.FunctionDef, tuple[bool | None, ...]], LiveForward] = {}


def live_forward(module: nn.Module) -> LiveForward | None:
    """Returns what of a module's forward can run, None where its source can't be had."""
    tree = forward_of(module)
    if tree is None:
        return None
    key = tree, tuple(_truth(test, module) for test in _conditions(tree))
    if key not in _LIVE:
        _LIVE[key] = LiveForward(tree, module)
    return _LIVE[key]


@cache
def _conditions(tree: ast.FunctionDef) -> tuple[ast.expr, ...]:
    return tuple(node.test for node in ast.walk(tree) if isinstance(node, ast.If | ast.IfExp))


@cache
def _text(node: ast.AST) -> str:
    """Returns the text of a node of a class's forward, which are all kept."""
    return ast.unparse(node)


def attention_calls(module: nn.Module) -> tuple[ast.Call, ...]:
    """Returns the calls of transformers' attention functions in a module's forward; none where it
    routes none.
    """
    forward = live_forward(module)
    return () if forward is None else forward.attention_calls
