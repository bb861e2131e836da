"""Where a model selects or reduces tokens by their index in the sequence, of which a shard has only
some.

Poolers that read a row's first token and known heads are passed it, see `sample_heads`; all others
are findings.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache

from torch import nn

from ulysses_accel.introspection.findings import Finding
from ulysses_accel.introspection.sample_heads import (
    child_called,
    first_token_modules,
    read_sample_head,
)
from ulysses_accel.introspection.source import LiveForward, keyword, live_forward, text_of
from ulysses_accel.introspection.structure import ModelReading, is_model

_BY_TOKEN = (nn.Linear, nn.Tanh, nn.GELU, nn.Dropout, nn.Identity, nn.LayerNorm)
_REDUCTIONS = ("mean", "sum", "max", "amax", "min", "amin", "argmax")


def check_selections(reading: ModelReading) -> Iterator[Finding]:
    """Yields the modules that select or reduce tokens by their index, and are no pooler or head
    that is known.
    """
    # Of a full encoder's pooled output a decoder reads nothing.
    known = {id(one.module) for one in first_token_modules(reading)}
    has_head = read_sample_head(reading) is not None
    seen: set[type] = set()
    for name, module in reading.sharded.items():
        is_head = module is reading.model and has_head
        if is_head or id(module) in known or type(module) in seen:
            continue
        selection = _selection(module, known)
        if selection is None:
            continue
        seen.add(type(module))
        yield Finding(
            "loss",
            name or "forward",
            f"{name or 'its forward'} ({type(module).__name__}) picks or mixes tokens by their "
            f"place ({selection}), of "
            f"which a shard has only some.",
            "Leave it out (add_pooling_layer=False where there is such a choice) and use "
            "pool_sequence on the last "
            "hidden states, or use sp_size=1 and cp_size=1.",
        )


def _selection(module: nn.Module, known: set[int]) -> str | None:
    """Returns the text of what a module's forward selects or reduces, None for nothing."""
    forward = live_forward(module)
    if forward is None or forward.attention_calls:
        return None
    of_known: set[int] = set()
    for node in forward.nodes:
        if isinstance(node, ast.Call) and id(child_called(module, node)) in known:
            of_known |= {id(part) for part in ast.walk(node)}
    for node in _selecting(forward):
        if id(node) not in of_known:
            return text_of(node)
    if is_model(module):
        for node in forward.nodes:
            is_pooler = _is_reduction(node) or _is_unknown_pooler(module, node, of_known)
            if id(node) not in of_known and is_pooler:
                return text_of(node)
    return None


@cache
def _selecting(forward: LiveForward) -> tuple[ast.AST, ...]:
    """Returns the nodes that select one token."""
    kept = {name for name, value in forward.assigned if "logits_to_keep" in ast.unparse(value)}
    return tuple(node for node in forward.nodes if _is_selection(node, kept))


def _is_unknown_pooler(module: nn.Module, node: ast.AST, of_known: set[int]) -> bool:
    """Whether a child is called that its name makes a pooler, and it isn't known to work on each
    token by itself.
    """
    child = child_called(module, node)
    if (
        child is None
        or isinstance(child, _BY_TOKEN)
        or any(id(part) in of_known for part in ast.walk(node))
    ):
        return False
    return "pool" in ast.unparse(node.func)  # type: ignore[attr-defined]


def _is_selection(node: ast.AST, kept: set[str]) -> bool:
    """Whether an expression is `x[:, index]` or `x[rows, index]`; a slice, the indices to keep, or
    a mask's is none.
    """
    if not isinstance(node, ast.Subscript) or not isinstance(node.ctx, ast.Load):
        return False
    if (
        not isinstance(node.slice, ast.Tuple)
        or len(node.slice.elts) < 2
        or "mask" in ast.unparse(node.value)
    ):
        return False
    rows, index = node.slice.elts[:2]
    if ast.unparse(rows) != ":":
        return "arange(" in ast.unparse(rows)
    if isinstance(index, ast.Constant):
        return isinstance(index.value, int)
    return not isinstance(index, ast.Slice) and not (
        isinstance(index, ast.Name) and index.id in kept
    )


def _is_reduction(node: ast.AST) -> bool:
    """Whether an expression reduces the second dim."""
    if (
        not isinstance(node, ast.Call)
        or ast.unparse(node.func).rpartition(".")[2] not in _REDUCTIONS
    ):
        return False
    dim = keyword(node, "dim") or next(iter(node.args[-1:]), None)
    return isinstance(dim, ast.Constant) and dim.value == 1
