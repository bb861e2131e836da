"""Finds what a model makes of tokens that it picks or mixes by their place, of which a shard has
only some.

Poolers that read a row's first token and known heads are given it, see `sample_heads`; all others
are findings.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from torch import nn

from ulysses_accel import _private_api
from ulysses_accel.introspection.findings import Finding
from ulysses_accel.introspection.sample_heads import (
    child_called,
    first_token_modules,
    read_sample_head,
)
from ulysses_accel.introspection.source import (
    assignments,
    attention_calls,
    forward_of,
    keyword,
    live_nodes,
    text_of,
)
from ulysses_accel.introspection.structure import sharded_parts

_BY_TOKEN = (nn.Linear, nn.Tanh, nn.GELU, nn.Dropout, nn.Identity, nn.LayerNorm)
_MIXES = ("mean", "sum", "max", "amax", "min", "amin", "argmax")


def check_picks(model: Any) -> Iterator[Finding]:
    """Yields the modules that pick or mix tokens by their place, and are no pooler or head that is
    known.

    Args:
        model: a transformers model.
    """
    # Of a whole encoder's pooled output a decoder reads nothing.
    known = {id(one.module) for one in first_token_modules(model)}
    seen: set[type] = set()
    for name, module in sharded_parts(model):
        is_head = module is model and read_sample_head(model) is not None
        found = (
            None
            if is_head or id(module) in known or type(module) in seen
            else _picked(module, known)
        )
        if found is None:
            continue
        seen.add(type(module))
        yield Finding(
            "loss",
            name or "forward",
            f"{name or 'its forward'} ({type(module).__name__}) picks or mixes tokens by their "
            f"place ({found}), of "
            f"which a shard has only some.",
            "Leave it out (add_pooling_layer=False where there is such a choice) and use "
            "pool_sequence on the last "
            "hidden states, or use sp_size=1 and cp_size=1.",
        )


def _picked(module: nn.Module, known: set[int]) -> str | None:
    """Returns the text of what a module's forward picks or mixes, None for nothing."""
    forward = forward_of(module)
    if forward is None or attention_calls(module):
        return None
    nodes = list(live_nodes(forward, module))
    of_known = {
        id(part)
        for node in nodes
        if id(child_called(module, node)) in known
        for part in ast.walk(node)
    }
    kept = {
        name
        for name, value in assignments(forward, module)
        if "logits_to_keep" in ast.unparse(value)
    }
    is_model = _private_api.is_transformers_model(module)
    for node in nodes:
        if id(node) in of_known:
            continue
        if _is_pick(node, kept) or (
            is_model and (_is_mix(node) or _is_unknown_pooler(module, node, of_known))
        ):
            return text_of(node)
    return None


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


def _is_pick(node: ast.AST, kept: set[str]) -> bool:
    """Whether an expression is `x[:, place]` or `x[rows, place]`; a slice, the places to keep, or a
    mask's is none.
    """
    if not isinstance(node, ast.Subscript) or not isinstance(node.ctx, ast.Load):
        return False
    if (
        not isinstance(node.slice, ast.Tuple)
        or len(node.slice.elts) < 2
        or "mask" in ast.unparse(node.value)
    ):
        return False
    rows, place = node.slice.elts[:2]
    if ast.unparse(rows) != ":":
        return "arange(" in ast.unparse(rows)
    if isinstance(place, ast.Constant):
        return isinstance(place.value, int)
    return not isinstance(place, ast.Slice) and not (
        isinstance(place, ast.Name) and place.id in kept
    )


def _is_mix(node: ast.AST) -> bool:
    """Whether an expression reduces the second dim."""
    if not isinstance(node, ast.Call) or ast.unparse(node.func).rpartition(".")[2] not in _MIXES:
        return False
    dim = keyword(node, "dim") or next(iter(node.args[-1:]), None)
    return isinstance(dim, ast.Constant) and dim.value == 1
