"""What a model computes of whole samples: poolers that read the first token, and the heads after
its layers.

Read from the structure and the source of the forward. A head whose loss is one of tokens is none of
these.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from torch import nn

from ulysses_accel.introspection.source import (
    assignments,
    attention_calls,
    calls_of,
    forward_of,
    is_name,
)
from ulysses_accel.introspection.structure import ModelReading, attends, is_model, once_per_reading

Reads = Literal["nothing", "first", "logits", "all"]
ANSWERS = ("start_positions", "end_positions")
"""The labels of an answer: the tokens where it starts and ends."""


@dataclass(frozen=True)
class FirstToken:
    """A module that is to have a row's first token, of which only one rank knows.

    Args:
        module: itself.
        is_cut: whether it is passed that token alone `[B, D]`, rather than the sequence that it
            takes it from.
    """

    module: nn.Module
    is_cut: bool


@dataclass(frozen=True)
class SampleHead:
    """What follows the layers of a model whose loss is one of samples.

    Args:
        base: the model's part that holds all of its layers.
        reads: what the head reads of the last hidden states: `nothing` (the pooled output only),
            the `first` token, `logits` that a linear layer computes of each token, or `all`.
        linears: the layers that compute those logits, where nothing else is read.
        answers: whether it is to find the tokens where an answer starts and ends.
    """

    base: nn.Module
    reads: Reads
    linears: tuple[nn.Module, ...]
    answers: bool


@once_per_reading
def first_token_modules(reading: ModelReading) -> tuple[FirstToken, ...]:
    """Returns the modules of a transformers model that read each row's first token, and nothing
    else of it.
    """
    readers: list[FirstToken] = []
    for module in reading.sharded.values():
        if _reads_first(module):
            readers.append(FirstToken(module, is_cut=False))
        forward = forward_of(module) if is_model(module) else None
        for call in _calls(forward):
            child = child_called(module, call) if call.args and _is_first(call.args[0]) else None
            if child is not None:
                readers.append(FirstToken(child, is_cut=True))
    return tuple(readers)


@cache
def _calls(forward: ast.FunctionDef | None) -> tuple[ast.Call, ...]:
    if forward is None:
        return ()
    return tuple(node for node in ast.walk(forward) if isinstance(node, ast.Call))


@once_per_reading
def read_sample_head(reading: ModelReading) -> SampleHead | None:
    """Returns the head of a transformers model whose loss is one of whole samples; None where there
    is none known, as of an encoder-decoder.
    """
    model, forward = reading.model, reading.forward
    if forward is None or not _may_be_of_samples(reading, forward):
        return None
    base, output = _base_and_output(model, forward)
    if base is None or output is None or reading.encoder is not None:
        return None
    uses = list(_uses(forward, model, output))
    # The pooled output is right where it is made of a first token that can be passed.
    if "other" in uses or ("pooled" in uses and not first_token_modules(ModelReading(base))):
        return None
    reads, answers = _summary([use for use in uses if use != "pooled"]), _finds_answers(reading)
    # A loss of the pooled output alone can't be one of tokens.
    if not answers and reads != "nothing" and not _classifies(model, forward):
        return None
    linears = {id(use): use for use in uses if isinstance(use, nn.Module) and reads == "logits"}
    return SampleHead(base, reads, tuple(linears.values()), answers)


def _finds_answers(reading: ModelReading) -> bool:
    return set(ANSWERS) <= set(reading.parameters)


def _may_be_of_samples(reading: ModelReading, forward: ast.FunctionDef) -> bool:
    """Whether it is worth looking further."""
    if _finds_answers(reading):
        return True
    if "labels" not in reading.parameters:
        return False
    return not calls_of(forward, "self.loss_function") or _classifies(reading.model, forward)


def _classifies(model: Any, forward: ast.FunctionDef) -> bool:
    """Whether `labels` are those of whole samples."""
    if calls_of(forward, "self.loss_function"):
        return getattr(model, "loss_type", None) == "ForSequenceClassification"
    return "problem_type" in ast.unparse(forward)


def _base_and_output(
    model: nn.Module, forward: ast.FunctionDef
) -> tuple[nn.Module | None, str | None]:
    """Returns the child that holds all layers, and the variable that its output goes to; None where
    not clear.
    """
    bases = [(name, child) for name, child in model.named_children() if attends(child)]
    if len(bases) != 1:
        return None, None
    name, base = bases[0]
    calls = calls_of(forward, f"self.{name}")
    if getattr(model, "base_model_prefix", None) == name:
        calls += calls_of(forward, "getattr(self, self.base_model_prefix)")
    is_clear = len(calls) == 1 and _gives_tokens(forward, calls[0])
    return base, _name_of(forward, calls[0]) if is_clear else None


def _gives_tokens(forward: ast.FunctionDef, call: ast.Call) -> bool:
    """Whether a call passes on the tokens as they came, which are not choices or parts of them."""
    passed = [*call.args[:1], *(word.value for word in call.keywords if word.arg == "input_ids")]
    targets = [
        node
        for node in ast.walk(forward)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]
    return any(is_name(value, "input_ids") for value in passed) and not any(
        is_name(node, "input_ids") for node in targets
    )


def _name_of(forward: ast.FunctionDef, call: ast.Call) -> str | None:
    """Returns the variable that a call's result goes to, if that is assigned nothing else."""
    stored = [node for node in ast.walk(forward) if isinstance(node, ast.Assign | ast.AnnAssign)]
    for node in stored:
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if node.value is call and isinstance(target, ast.Name):
            stores = 0
            for part in ast.walk(forward):
                if isinstance(part, ast.Name) and part.id == target.id:
                    stores += isinstance(part.ctx, ast.Store)
            return target.id if stores == 1 else None
    return None


def _uses(forward: ast.FunctionDef, model: nn.Module, output: str) -> Iterator[str | nn.Module]:
    """Yields how each use of the last hidden states in a base model's output reads them; a linear
    layer as itself.
    """
    hidden = _hidden_names(forward, model, output)
    parents = {
        id(child): node for node in ast.walk(forward) for child in ast.iter_child_nodes(node)
    }
    for node in ast.walk(forward):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            continue
        if is_name(node, output):
            yield from _use_of_output(parents[id(node)], parents[id(parents[id(node)])])
        elif _is_hidden(node, output, hidden):
            parent = parents[id(node)]
            if isinstance(parent, ast.Assign | ast.AnnAssign):
                continue
            yield from _use(node, parent, model)


def _use_of_output(part: ast.AST, parent: ast.AST) -> Iterator[str]:
    """Yields how one part of a base model's output is read, other than its hidden states."""
    name = (
        part.attr
        if isinstance(part, ast.Attribute)
        else ast.unparse(part).partition("[")[2].rstrip("]")
    )
    if name in ("1", ":2", "pooler_output"):
        yield "pooled"
    # What else there is may only be passed on to the caller.
    elif name not in ("0", "last_hidden_state") and not isinstance(parent, ast.keyword | ast.BinOp):
        yield "other"


def _use(node: ast.AST, parent: ast.AST, model: nn.Module) -> Iterator[str | nn.Module]:
    """Yields how one use of the hidden states reads them; nothing where they are only passed on."""
    called = child_called(model, parent) if isinstance(parent, ast.Call) else None
    if _is_first(parent):
        yield "first"
    elif called is None or not isinstance(parent, ast.Call) or parent.args[0] is not node:
        yield "all"
    elif not isinstance(called, nn.Dropout | nn.Identity):
        if hasattr(called, "in_features") and hasattr(called, "out_features"):
            yield called
        else:
            yield "first" if _reads_first(called) else "all"


def _summary(uses: list[str | nn.Module]) -> Reads:
    kinds = {"logits" if isinstance(use, nn.Module) else use for use in uses}
    if len(kinds) > 1:
        return "all"
    return next((kind for kind in ("first", "logits", "all") if kind in kinds), "nothing")


def _hidden_names(forward: ast.FunctionDef, model: nn.Module, output: str) -> set[str]:
    """Returns the variables that hold the last hidden states, with dropout or without."""
    names: set[str] = set()
    for node in ast.walk(forward):
        if isinstance(node, ast.Assign) and ast.unparse(node.value) == f"{output}[:2]":
            target = node.targets[0]
            names |= {ast.unparse(target.elts[0])} if isinstance(target, ast.Tuple) else set()
    while True:
        more = {
            name
            for name, value in assignments(forward, model)
            if _hands_on(value, model, output, names)
        }
        if more <= names:
            return names
        names |= more


def _hands_on(value: ast.expr, model: nn.Module, output: str, names: set[str]) -> bool:
    if isinstance(value, ast.Call) and value.args and _is_hidden(value.args[0], output, names):
        return isinstance(child_called(model, value), nn.Dropout | nn.Identity)
    return _is_hidden(value, output, names)


def _is_hidden(node: ast.AST, output: str, names: set[str]) -> bool:
    if isinstance(node, ast.Name):
        return node.id in names
    is_part = isinstance(node, ast.Subscript | ast.Attribute)
    return is_part and ast.unparse(node) in (f"{output}[0]", f"{output}.last_hidden_state")


def child_called(model: nn.Module, call: ast.AST) -> nn.Module | None:
    """Returns the child that a call in a forward runs, None where it runs something else."""
    function = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
    child = (
        getattr(model, function.removeprefix("self."), None)
        if function.startswith("self.")
        else None
    )
    return child if isinstance(child, nn.Module) else None


def _is_first(node: ast.AST) -> bool:
    return isinstance(node, ast.Subscript) and ast.unparse(node.slice) in (
        "(:, 0)",
        ":, 0",
        "(:, 0, :)",
        ":, 0, :",
    )


def _reads_first(module: nn.Module) -> bool:
    """Whether a module reads nothing but the first token of the sequence that it is given."""
    forward = forward_of(module) if not attention_calls(module) else None
    return forward is not None and _uses_only_first(forward)


@cache
def _uses_only_first(forward: ast.FunctionDef) -> bool:
    if len(forward.args.args) < 2:
        return False
    name = forward.args.args[1].arg
    parents = {
        id(child): node for node in ast.walk(forward) for child in ast.iter_child_nodes(node)
    }
    uses = [node for node in ast.walk(forward) if is_name(node, name)]
    return bool(uses) and all(
        _is_first(parents[id(node)]) and parents[id(node)].value is node  # type: ignore[attr-defined]
        for node in uses
    )
