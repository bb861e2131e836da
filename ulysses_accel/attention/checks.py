"""Finds what in a model can't be computed exactly on a sharded sequence, before anything is changed.

By structure and configuration values, not by a list of model names. Each finding says what was found and what to do.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from torch import nn

from ulysses_accel.errors import UnsupportedModelError

_WHOLE_SEQUENCE_ROPE = ("dynamic", "longrope")
# The last two work on each token by itself.
_EXACT_LAYERS = {"full_attention", "attention", "sliding_attention", "mlp", "moe"}


def transformers_model(model: nn.Module) -> Any:
    """Returns the transformers model inside of `model` (itself, or wrapped by an adapter library).

    Raises:
        UnsupportedModelError: there is none.
    """
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation_internal") and hasattr(
            module, "_can_set_attn_implementation"
        ):
            return module
    raise UnsupportedModelError(
        f"{type(model).__name__} holds no transformers model, so its attention can't be sharded over the sequence. "
        f"Call ulysses_accel.ulysses_attention in its attention layers, or use sp_size=1 and cp_size=1."
    )


def check_model(model: nn.Module, sp_size: int, core: str, sources: str = "") -> None:
    """Refuses a model that has a part which attention over shards would not compute exactly.

    Args:
        model: a transformers model, or a module that holds one.
        sp_size: ranks that exchange tokens for heads.
        core: transformers' name of the core attention.
        sources: the sizes and where they came from, for the message; `sp_size` alone when empty.

    Raises:
        UnsupportedModelError: with every finding and its remedy.
    """
    inner = transformers_model(model)
    config = inner.config.get_text_config() if hasattr(inner.config, "get_text_config") else inner.config
    checks: tuple[Callable[[Any, Any, int, str], Iterator[str]], ...] = (
        _routing,
        _loss,
        _positions,
        _layers,
        _masks,
        _numbers,
        _heads,
    )
    findings = [finding for check in checks for finding in check(inner, config, sp_size, core)]
    if findings:
        listed = "\n".join(f"- {finding}" for finding in findings)
        raise UnsupportedModelError(
            f"{type(inner).__name__} can't be trained exactly with {sources or f'sp_size={sp_size}'}:\n{listed}"
        )


def _routing(model: Any, config: Any, sp_size: int, core: str) -> Iterator[str]:
    if not model._can_set_attn_implementation():
        yield (
            "its layers do not call attention through transformers' AttentionInterface, so it can't be replaced. "
            "Use a model that does."
        )
    if getattr(config, "is_encoder_decoder", False):
        yield "it is an encoder-decoder; cross-attention over shards is not computed. Use a decoder-only model."
    parameters = inspect.signature(type(model).forward).parameters
    # transformers takes a model with labels and without a loss of its own for a causal language model.
    loss_type = getattr(model, "loss_type", None) or "ForCausalLM"
    if "labels" in parameters and loss_type != "ForCausalLM":
        yield (
            f"its loss is {loss_type}; only causal language modelling is aggregated over shards. "
            f"Use sp_size=1 and cp_size=1."
        )
    if "position_ids" not in parameters:
        yield "its forward takes no position_ids, so a shard would start at position 0. Use a model that takes them."
    if "labels" in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        yield "its forward takes no further keyword arguments, so shift_labels can't reach its loss."


def _loss(model: Any, config: Any, sp_size: int, core: str) -> Iterator[str]:
    forward = _syntax(type(model).forward)
    if forward is None:
        return
    cut = [node for node in ast.walk(forward) if isinstance(node, ast.Subscript) and _is_name(node.value, "labels")]
    if cut:
        yield (
            f"its forward cuts the labels by itself ({ast.unparse(cut[0])}), as if it had the whole sequence. "
            f"Compute the loss from its logits, outside of the model, or use sp_size=1 and cp_size=1."
        )
    for call in _calls(forward, "self.loss_function"):
        if not {None, "shift_labels"} & {keyword.arg for keyword in call.keywords}:
            yield (
                "its forward does not pass keyword arguments on to its loss, so shift_labels can't reach it and a "
                "shard's labels would be shifted twice. Compute the loss outside of the model, or use sp_size=1 and "
                "cp_size=1."
            )


def _positions(model: Any, config: Any, sp_size: int, core: str) -> Iterator[str]:
    for name, module in model.named_modules():
        # The name under which transformers keeps fairseq's `make_positions`.
        if callable(getattr(module, "create_position_ids_from_input_ids", None)):
            yield (
                f"{name} counts positions from its padding token on (the first is {_padding_index(module) + 1}, by "
                f"the tokens that are no padding), while a sharded batch's positions start at 0: it would look up "
                f"other position embeddings than on one process. Use a model whose positions start at 0."
            )
            return


def _padding_index(module: Any) -> int:
    return int(getattr(module, "padding_idx", None) or 0)


def _masks(model: Any, config: Any, sp_size: int, core: str) -> Iterator[str]:
    seen: set[tuple[type, str]] = set()
    for name, module in model.named_modules():
        made = _own_mask(module)
        if made is not None and (type(module), made) not in seen:
            seen.add((type(module), made))
            yield (
                f"{name} ({type(module).__name__}) attends with a mask that it makes from its own tokens ({made}), "
                f"of which a shard has only a part. Use a model without it, or sp_size=1 and cp_size=1."
            )


def _own_mask(module: nn.Module) -> str | None:
    """Returns what a module passes to transformers' attention as its mask, where that isn't the mask it was given."""
    forward = _syntax(type(module).forward)
    if forward is None:
        return None
    given = {arg.arg for arg in (*forward.args.posonlyargs, *forward.args.args, *forward.args.kwonlyargs)}
    assigned = list(_assignments(forward, module))
    for interface in {name for name, value in assigned if "ALL_ATTENTION_FUNCTIONS" in ast.unparse(value)}:
        for call in _calls(forward, interface):
            mask = next((word.value for word in call.keywords if word.arg == "attention_mask"), None)
            mask = mask if mask is not None else (call.args[4] if len(call.args) > 4 else None)
            if mask is None or (isinstance(mask, ast.Constant) and mask.value is None):
                continue
            for value in [mask, *(value for name, value in assigned if _is_name(mask, name))]:
                if not (isinstance(value, ast.Name) and value.id in given):
                    return " ".join(ast.unparse(value).split())[:80]
    return None


def _assignments(tree: ast.AST, module: nn.Module) -> Iterator[tuple[str, ast.expr]]:
    """Yields what names are assigned, except under `if self.part is not None` where this module has no such part."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and _is_absent(node.test, module):
            yield from (found for other in node.orelse for found in _assignments(ast.Module([other], []), module))
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and value is not None:
            yield from ((target.id, value) for target in targets if isinstance(target, ast.Name))
        yield from _assignments(node, module)


def _is_absent(test: ast.expr, module: nn.Module) -> bool:
    text = ast.unparse(test)
    part = text.removeprefix("self.").removesuffix(" is not None")
    return text == f"self.{part} is not None" and part.isidentifier() and getattr(module, part, None) is None


@cache
def _syntax(function: Callable[..., Any]) -> ast.FunctionDef | None:
    """Returns the syntax of a class's forward, undecorated; None where its source can't be had."""
    forward = inspect.unwrap(function)
    if forward.__module__.startswith("torch."):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    found = tree.body[0]
    return found if isinstance(found, ast.FunctionDef) else None


def _calls(tree: ast.AST, function: str) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == function]


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _layers(model: Any, config: Any, sp_size: int, core: str) -> Iterator[str]:
    types = getattr(config, "layer_types", None)
    if types:
        for kind in sorted(set(types) - _EXACT_LAYERS):
            count = sum(1 for layer in types if layer == kind)
            yield (
                f"{count} of its {len(types)} layers are {kind}; only full attention and sliding windows are computed "
                f"on shards. Use sp_size=1 and cp_size=1."
            )
    for name, module in model.named_modules():
        if isinstance(getattr(module, "sinks", None), nn.Parameter):
            yield (
                f"{name} has learned attention sinks, which are not dealt with the heads. Use sp_size=1 and cp_size=1."
            )
            break
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", None) == "alibi":
        yield "its positions are ALiBi biases, which are not dealt with the heads. Use sp_size=1 and cp_size=1."


def _numbers(model: Any, config: Any, sp_size: int, core: str) -> Iterator[str]:
    for rope_type in sorted(_rope_types(config) & set(_WHOLE_SEQUENCE_ROPE)):
        yield (
            f"its rotary positions are scaled by the longest position of the whole sequence (rope_type={rope_type}), "
            f"which a shard does not know. Use a fixed scaling such as yarn or linear."
        )
    softcap = next(filter(None, _each(config, "attn_logit_softcapping")), None)
    if softcap is not None and core == "sdpa":
        yield (
            f"its scores are capped (attn_logit_softcapping={softcap}), which sdpa can't compute. "
            f"Use sp_attn_implementation='flash_attention_2' or 'eager'."
        )
    if getattr(config, "output_router_logits", False):
        yield (
            "its router loss is a statistic of the whole sequence (output_router_logits=True), which a shard does not "
            "know. Set output_router_logits=False."
        )


def _each(config: Any, name: str) -> list[Any]:
    """Returns a config's value; of one whose layers differ in it, which refuses to tell, every layer's."""
    try:
        return [getattr(config, name, None)]
    except RuntimeError:
        return [getattr(layer, name, None) for layer in config.per_layer_config]


def _rope_types(config: Any) -> set[str]:
    """Returns every rope type that a config names, whether it has one set of parameters or one for each layer type."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(entry.get("rope_type", entry.get("type"))) for entry in [parameters, *nested]}


def _heads(model: Any, config: Any, sp_size: int, core: str) -> Iterator[str]:
    # The tensors have the last word in the forward; what the config says is only used to refuse early.
    num_heads = min(filter(lambda value: isinstance(value, int), _each(config, "num_attention_heads")), default=sp_size)
    if sp_size > num_heads:
        yield (
            f"sp_size={sp_size} is more than num_attention_heads={num_heads}: a rank would have no head. "
            f"Use sp_size={num_heads} at most, and cp_size for the rest."
        )
