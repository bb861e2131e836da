"""Checks of a model's layers: masks of their own, biases, attention without transformers,
statistics of all tokens.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from torch import nn

from ulysses_accel import _private_api
from ulysses_accel.introspection.findings import Finding
from ulysses_accel.introspection.routers import FLAG, read_router_loss
from ulysses_accel.introspection.source import (
    assignments,
    attention_calls,
    forward_of,
    keyword,
    live_nodes,
    text_of,
)
from ulysses_accel.introspection.structure import attends_by_itself, sharded_parts, text_config

_REMEDY = "Use a model without it, or sp_size=1 and cp_size=1."


def check_masks(model: Any) -> Iterator[Finding]:
    """Yields the modules that attend with a mask which they, or their model, make of tensors."""
    seen: set[tuple[type, str]] = set()
    for name, module in sharded_parts(model):
        made = own_mask(module)
        joined = joined_masks(module)
        found = made or joined
        if found is None or (type(module), found) in seen:
            continue
        seen.add((type(module), found))
        what = "attends with a mask that it makes from its own tokens" if made else "joins masks"
        yield Finding(
            "mask",
            name,
            f"{name} ({type(module).__name__}) {what} ({found}), of which a shard has only a part.",
            _REMEDY,
        )


def own_mask(module: nn.Module) -> str | None:
    """Returns what a module passes to transformers' attention as its mask, where that isn't the
    mask it was given.
    """
    forward = forward_of(module)
    calls = attention_calls(module)
    if forward is None or not calls:
        return None
    given = {
        arg.arg for arg in (*forward.args.posonlyargs, *forward.args.args, *forward.args.kwonlyargs)
    }
    assigned = list(assignments(forward, module))
    for call in calls:
        mask = keyword(call, "attention_mask") or (call.args[4] if len(call.args) > 4 else None)
        if mask is None or (isinstance(mask, ast.Constant) and mask.value is None):
            continue
        for value in [
            mask,
            *(value for name, value in assigned if isinstance(mask, ast.Name) and mask.id == name),
        ]:
            if not _is_given(value, given):
                return text_of(value)
    return None


def _is_given(value: ast.expr, given: set[str]) -> bool:
    """Whether an expression is one of some arguments, or a choice between them."""
    if isinstance(value, ast.IfExp):
        return _is_given(value.body, given) and _is_given(value.orelse, given)
    return isinstance(value, ast.Name) and value.id in given


def joined_masks(module: nn.Module) -> str | None:
    """Returns where a module's forward joins masks of two sequences into one, None where it
    doesn't.
    """
    forward = forward_of(module)
    if forward is None or attention_calls(module):
        return None
    masks = {name for name, value in assignments(forward, module) if "_mask(" in ast.unparse(value)}
    for node in live_nodes(forward, module):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.cat", "torch.concat"):
            names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            if len(names & masks) > 1:
                return text_of(node)
    return None


def check_attention(model: Any) -> Iterator[Finding]:
    """Yields layers whose attention is changed by what is not dealt with the heads, or is not
    transformers' at all.
    """
    seen: set[type] = set()
    for name, module in sharded_parts(model):
        if type(module) in seen:
            continue
        given = (keyword(call, "position_bias") for call in attention_calls(module))
        biased = [text_of(bias) for bias in given if bias is not None]
        if biased:
            seen.add(type(module))
            yield Finding(
                "attention",
                name,
                f"{name} ({type(module).__name__}) adds a bias by position to its scores "
                f"(position_bias={biased[0]}), which is not dealt with the heads.",
            )
        if attends_by_itself(module) and not _is_model(module):
            seen.add(type(module))
            yield Finding(
                "attention",
                name,
                f"{name} ({type(module).__name__}) weighs tokens by itself, past transformers' "
                "AttentionInterface, and "
                f"would see only its shard's.",
                _REMEDY,
            )
    config = text_config(model)
    if (
        getattr(config, "alibi", False)
        or getattr(config, "position_embedding_type", None) == "alibi"
    ):
        yield Finding(
            "attention",
            "config",
            "its positions are ALiBi biases, which are not dealt with the heads.",
        )


def _is_model(module: nn.Module) -> bool:
    return _private_api.is_transformers_model(module)


def check_statistics(model: Any) -> Iterator[Finding]:
    """Yields what a model computes of all tokens together, or draws for each rank anew."""
    config = text_config(model)
    router = read_router_loss(model) if getattr(config, FLAG, False) else None
    if isinstance(router, Finding):
        yield router
    for name, module in sharded_parts(model):
        if getattr(module, "token_dropout", False) and "token_dropout" in _conditions(module):
            yield Finding(
                "statistics",
                name,
                f"{name} scales its embeddings by the share of masked tokens (token_dropout=True), "
                "which a shard does "
                f"not know.",
                "Set token_dropout=False.",
            )
        dropped = getattr(module, "layerdrop", 0.0)
        if isinstance(dropped, float) and dropped > 0.0:
            yield Finding(
                "statistics",
                name,
                f"{name} leaves layers out by chance (layerdrop={dropped}), which each rank would "
                "draw for itself.",
                "Set its layerdrop to 0.",
            )


def check_neighbours(model: Any) -> Iterator[Finding]:
    """Yields modules that join each token with the one beside it, which another rank may hold."""
    for name, module in sharded_parts(model):
        forward = forward_of(module) if not _is_model(module) else None
        nodes = live_nodes(forward, module) if forward is not None else ()
        parts = {ast.unparse(node) for node in nodes if isinstance(node, ast.Subscript)}
        shifted = sorted(
            part for part in parts if part.endswith("[:, 1:]") and f"{part[:-3]}:-1]" in parts
        )
        if shifted:
            yield Finding(
                "layers",
                name,
                f"{name} ({type(module).__name__}) joins each token with its neighbours "
                f"({shifted[0]}), of which a "
                f"shard lacks the outermost.",
                _REMEDY,
            )
            return


def _conditions(module: nn.Module) -> str:
    forward = forward_of(module)
    tests = (
        [node.test for node in ast.walk(forward) if isinstance(node, ast.If)]
        if forward is not None
        else []
    )
    return " ".join(ast.unparse(test) for test in tests)
