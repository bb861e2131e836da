"""Which style each module of a decoder gets on the tensor parallel axis, from the model's
structure.

A part that no rule covers is refused by its name: the output of a replicated parameter would be
added to that of sharded ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.distributed.tensor.parallel.style import ParallelStyle

from ulysses_accel.errors import UnsupportedModelError
from ulysses_accel.introspection.structure import attending, text_config
from ulysses_accel.tensor_parallel import styles

# The linear layers of attention and MLP, by the names that transformers' decoders give them; one
# technique each.
LINEARS: dict[str, styles.StyleMaker] = {
    **dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1", "c_fc"), styles.column
    ),
    **dict.fromkeys(("o_proj", "dense", "down_proj", "fc2", "c_proj"), styles.row),
    **dict.fromkeys(("qkv_proj", "gate_up_proj"), styles.fused),
}


@dataclass(frozen=True)
class Unit:
    """Modules that are sharded together, so that no more than one full layer is on the device at a
    time.

    Args:
        module: holds them.
        plan: name inside of `module`, "" for itself, to style.
    """

    module: nn.Module
    plan: dict[str, ParallelStyle]


@dataclass
class Plan:
    """A model's units in order, and the modules that count heads themselves.

    Args:
        decoder: the module that embeds tokens and runs the layers.
        units: all modules with parameters.
        counting: attention modules that split a fused projection by their own head counts.
    """

    decoder: nn.Module
    units: list[Unit] = field(default_factory=list)
    counting: list[nn.Module] = field(default_factory=list)


def make_plan(model: Any, tp_size: int, source: str) -> Plan:
    """Returns the plan of a transformers model.

    Args:
        model: a dense decoder, with or without a head.
        tp_size: ranks T.
        source: where `tp_size` came from, for the message.

    Raises:
        UnsupportedModelError: a part has no style, or T does not divide the heads.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise _refusal(model, "it has no decoder with a list of layers", tp_size, source)
    _check_heads(model, tp_size, source)
    plan = Plan(decoder)
    embedding = model.get_input_embeddings()
    last_norm = next((module for name, module in _children(decoder) if "norm" in name), None)
    if embedding is None or last_norm is None:
        raise _refusal(model, "its decoder has no embedding or no last norm", tp_size, source)
    plan.units.append(Unit(embedding, {"": styles.embedding()}))
    for layer in decoder.layers:
        plan.units.append(Unit(layer, _layer_plan(layer, plan, tp_size)))
    plan.units.append(Unit(last_norm, {"": styles.GatherOutput()}))
    plan.units += [Unit(head, {"": style}) for head, style in _heads(model, decoder)]
    _check_complete(model, plan, tp_size, source)
    return plan


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return (
        (name, child)
        for name, child in module.named_children()
        if any(True for _ in child.parameters())
    )


def _heads(model: Any, decoder: nn.Module) -> Iterator[tuple[nn.Module, ParallelStyle]]:
    """Yields what comes after the decoder: the vocabulary's matrix, and small heads that every rank
    computes.
    """
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for _, child in _children(model):
        if decoder is not model and decoder not in child.modules() and isinstance(child, nn.Linear):
            yield child, styles.vocabulary() if child is output else styles.Replicated()


def _layer_plan(layer: nn.Module, plan: Plan, tp_size: int) -> dict[str, ParallelStyle]:
    """Returns the styles of one layer; modules that no rule covers are left out."""
    plans: dict[str, ParallelStyle] = {}
    attention = {name: module for name, module in attending(layer) if "." not in name}
    for name, child in _children(layer):
        linears = {
            inner: part for inner, part in child.named_children() if isinstance(part, nn.Linear)
        }
        if not linears:
            if not list(child.children()):
                plans[name] = styles.norm()
            continue
        parts = _attention_parts(child) if name in attention else _mlp_parts(child)
        for inner, part in _children(child):
            style = LINEARS.get(inner) if inner in linears else None
            if style is not None and _divides(part, parts.get(inner, ()), tp_size):
                plans[f"{name}.{inner}"] = style(parts.get(inner, ()))
            elif name in attention and _is_head_norm(part, child):
                plans[f"{name}.{inner}"] = styles.head_norm()
        plans[name] = styles.GatherTokens()
        if name in attention and "qkv_proj" in linears:
            plan.counting.append(child)
    return plans


def _attention_parts(attention: Any) -> dict[str, tuple[int, ...]]:
    config, head = attention.config, attention.head_dim
    keys = config.num_key_value_heads * head
    return {"qkv_proj": (config.num_attention_heads * head, keys, keys)}


def _mlp_parts(mlp: Any) -> dict[str, tuple[int, ...]]:
    fused = getattr(mlp, "gate_up_proj", None)
    return {} if fused is None else {"gate_up_proj": (fused.out_features // 2,) * 2}


def _divides(linear: Any, parts: tuple[int, ...], tp_size: int) -> bool:
    return all(size % tp_size == 0 for size in (*parts, linear.out_features, linear.in_features))


def _is_head_norm(module: nn.Module, attention: Any) -> bool:
    return all(weight.shape == (attention.head_dim,) for weight in module.parameters())


def _check_heads(model: Any, tp_size: int, source: str) -> None:
    config = text_config(model)
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    if heads % tp_size == 0 and keys % tp_size == 0:
        return
    legal = [size for size in range(1, keys + 1) if heads % size == 0 and keys % size == 0]
    raise UnsupportedModelError(
        f"tp_size={tp_size} (from {source}) does not divide num_attention_heads={heads} and "
        f"num_key_value_heads={keys} of {type(model).__name__}. Use tp_size "
        f"{' or '.join(map(str, legal))}, and sp_size or cp_size for the rest."
    )


def _check_complete(model: nn.Module, plan: Plan, tp_size: int, source: str) -> None:
    """Refuses a model with a parameter that no style covers."""
    covered: set[int] = set()
    for unit in plan.units:
        for name, style in unit.plan.items():
            if not isinstance(style, styles.GatherTokens):
                covered.update(map(id, unit.module.get_submodule(name).parameters()))
    left = [name for name, parameter in model.named_parameters() if id(parameter) not in covered]
    if left:
        raise _refusal(
            model, f"no rule says how to shard {left[0]}", tp_size, source, len(left) - 1
        )


def _refusal(
    model: nn.Module, fact: str, tp_size: int, source: str, others: int = 0
) -> UnsupportedModelError:
    more = f" (and {others} more parameters)" if others else ""
    return UnsupportedModelError(
        f"{type(model).__name__} can't be trained with tp_size={tp_size} (from {source}): "
        f"{fact}{more}. Tensor parallelism shards dense decoders of linear layers and norms "
        "(Llama, Qwen, Mistral, Gemma, Phi) whose features tp_size divides; not experts, adapters "
        "or towers. Use tp_size=1, and sp_size or cp_size instead."
    )
