"""Checks of a model's layers: masks of their own, biases, attention without transformers,
statistics of all tokens, and tokens selected or reduced by their index in the sequence.

Poolers that read a row's first token and known heads are passed it, see `sample_heads`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache

from torch import nn

from ulysses_accel.introspection.findings import Finding
from ulysses_accel.introspection.routers import FLAG, read_router_loss
from ulysses_accel.introspection.sample_heads import (
    child_called,
    first_token_modules,
    read_sample_head,
)
from ulysses_accel.introspection.source import (
    LiveForward,
    attention_calls,
    forward_of,
    keyword,
    live_forward,
    text_of,
)
from ulysses_accel.introspection.structure import ModelReading, attends_by_itself, is_model

_REMEDY = "Use a model without it, or sp_size=1 and cp_size=1."
_BY_TOKEN = (nn.Linear, nn.Tanh, nn.GELU, nn.Dropout, nn.Identity, nn.LayerNorm)
_REDUCTIONS = ("mean", "sum", "max", "amax", "min", "amin", "argmax")


def check_masks(reading: ModelReading) -> Iterator[Finding]:
    """Yields the modules that attend with a mask that they, or their model, compute."""
    seen: set[tuple[type, str]] = set()
    for name, module in reading.sharded.items():
        computed = own_mask(module)
        text = computed or joined_masks(module)
        if text is None or (type(module), text) in seen:
            continue
        seen.add((type(module), text))
        what = (
            "attends with a mask that it makes from its own tokens" if computed else "joins masks"
        )
        yield Finding(
            "mask",
            name,
            f"{name} ({type(module).__name__}) {what} ({text}), of which a shard has only a part.",
            _REMEDY,
        )


def own_mask(module: nn.Module) -> str | None:
    """Returns what a module passes to transformers' attention as its mask, where that isn't the
    mask it was passed.
    """
    forward = live_forward(module)
    return None if forward is None else _computed_mask(forward)


@cache
def _computed_mask(forward: LiveForward) -> str | None:
    taken = forward.tree.args
    arguments = {arg.arg for arg in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs)}
    for call in forward.attention_calls:
        mask = keyword(call, "attention_mask") or (call.args[4] if len(call.args) > 4 else None)
        if mask is None or (isinstance(mask, ast.Constant) and mask.value is None):
            continue
        values = [mask]
        if isinstance(mask, ast.Name):
            values += [value for name, value in forward.assigned if name == mask.id]
        for value in values:
            if not _is_argument(value, arguments):
                return text_of(value)
    return None


def _is_argument(value: ast.expr, arguments: set[str]) -> bool:
    """Whether an expression is one of some arguments, or a choice between them."""
    if isinstance(value, ast.IfExp):
        return _is_argument(value.body, arguments) and _is_argument(value.orelse, arguments)
    return isinstance(value, ast.Name) and value.id in arguments


def joined_masks(module: nn.Module) -> str | None:
    """Returns where a module's forward joins masks of two sequences into one, None where it
    doesn't.
    """
    forward = live_forward(module)
    return None if forward is None else _joined_masks(forward)


@cache
def _joined_masks(forward: LiveForward) -> str | None:
    if forward.attention_calls:
        return None
    masks = {name for name, value in forward.assigned if "_mask(" in ast.unparse(value)}
    for node in forward.nodes:
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.cat", "torch.concat"):
            names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            if len(names & masks) > 1:
                return text_of(node)
    return None


def check_attention(reading: ModelReading) -> Iterator[Finding]:
    """Yields layers whose attention is changed by what is not sharded with the heads, or is not
    transformers' at all.
    """
    seen: set[type] = set()
    for name, module in reading.sharded.items():
        if type(module) in seen:
            continue
        biases = (keyword(call, "position_bias") for call in attention_calls(module))
        biased = [text_of(bias) for bias in biases if bias is not None]
        if biased:
            seen.add(type(module))
            yield Finding(
                "attention",
                name,
                f"{name} ({type(module).__name__}) adds a bias by position to its scores "
                f"(position_bias={biased[0]}), which is not distributed with the heads.",
            )
        if attends_by_itself(module) and not is_model(module):
            seen.add(type(module))
            yield Finding(
                "attention",
                name,
                f"{name} ({type(module).__name__}) weighs tokens by itself, past transformers' "
                "AttentionInterface, and "
                f"would see only its shard's.",
                _REMEDY,
            )
    config = reading.text_config
    if (
        getattr(config, "alibi", False)
        or getattr(config, "position_embedding_type", None) == "alibi"
    ):
        yield Finding(
            "attention",
            "config",
            "its positions are ALiBi biases, which are not distributed with the heads.",
        )


def check_statistics(reading: ModelReading) -> Iterator[Finding]:
    """Yields what a model computes of all tokens together, or draws again on each rank."""
    config = reading.text_config
    router = read_router_loss(reading) if getattr(config, FLAG, False) else None
    if isinstance(router, Finding):
        yield router
    for name, module in reading.sharded.items():
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


def check_neighbours(reading: ModelReading) -> Iterator[Finding]:
    """Yields modules that join each token with the one beside it, which another rank may hold."""
    for name, module in reading.sharded.items():
        forward = None if is_model(module) else live_forward(module)
        parts = frozenset() if forward is None else forward.subscripts
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
