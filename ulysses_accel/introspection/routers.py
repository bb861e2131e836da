"""Finds out how a mixture-of-experts model computes its router loss, which is a statistic of the
whole sequence.

transformers' load balancing loss is, over the rows of all layers' routers together, E * sum_e(f_e *
p_e): f_e is how often a row chose expert e, p_e its mean probability. Whether a model's own
function is that one is found by calling it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ulysses_accel import _private_api
from ulysses_accel.introspection.findings import Finding
from ulysses_accel.introspection.source import calls_of, text_of
from ulysses_accel.introspection.structure import ModelReading, is_model, once_per_reading

FLAG = "output_router_logits"
_FUNCTION = "load_balancing_loss_func"
_LOGITS = "router_logits"
_REMEDY = f"Set {FLAG}=False."


@dataclass(frozen=True)
class RouterLossUse:
    """Where a model keeps what its router loss is computed with, each as a path of attribute names.

    Args:
        num_experts: how many experts E a router chooses from.
        top_k: how many a token is sent to.
        coefficient: what the loss is multiplied by before it is added.
    """

    num_experts: tuple[str, ...]
    top_k: tuple[str, ...]
    coefficient: tuple[str, ...]


@once_per_reading
def read_router_loss(reading: ModelReading) -> RouterLossUse | Finding | None:
    """Returns how a transformers model computes its router loss; None where it has none, a finding
    where it is another.
    """
    model, forward = reading.model, reading.forward
    calls = [] if forward is None else calls_of(forward, _FUNCTION)
    if forward is None or not calls:
        return None
    function = _private_api.global_of(type(model).forward, _FUNCTION)
    call = calls[0]
    paths = [
        _path(argument)
        for argument in (*call.args[1:3], _coefficient(forward))
        if argument is not None
    ]
    known = [path for path in paths if path is not None]
    is_stock = len(calls) == 1 and len(call.args) == 4 and not call.keywords and len(known) == 3
    if not is_stock or function is None or not computes_load_balance(function):
        return _refusal(
            f"its router loss ({text_of(call)}) is not transformers' load balancing loss of all "
            "layers"
        )
    if not list(recorded_routers(model)):
        return _refusal(
            "it does not say which of its modules are routers (_can_record_outputs has no "
            f"{_LOGITS})"
        )
    return RouterLossUse(*known)


def _refusal(fact: str) -> Finding:
    return Finding(
        "statistics",
        "forward",
        f"{fact}, and a shard does not know the whole sequence ({FLAG}=True).",
        _REMEDY,
    )


def _coefficient(forward: ast.FunctionDef) -> ast.expr | None:
    """Returns what the router loss is multiplied by where it is added to the loss."""
    for node in ast.walk(forward):
        added = (
            node.value if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add) else None
        )
        if (
            isinstance(added, ast.BinOp)
            and isinstance(added.op, ast.Mult)
            and "aux_loss" in ast.unparse(added.right)
        ):
            return added.left
    return None


def _path(node: ast.expr) -> tuple[str, ...] | None:
    """Returns the names after `self` in an expression such as `self.config.num_experts`, None for
    any other.
    """
    names = ast.unparse(node).split(".")
    return (
        tuple(names[1:])
        if names[0] == "self" and all(name.isidentifier() for name in names)
        else None
    )


def computes_load_balance(function: Any) -> bool:
    """Returns whether a function is the load balancing loss that `load_balance` computes, with and
    without a mask.
    """
    generator = torch.Generator().manual_seed(0)
    layers = tuple(torch.randn(6, 5, generator=generator) for _ in range(2))
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    for attention_mask in (None, mask):
        try:
            theirs = function(layers, 5, 2, attention_mask)
        except (TypeError, ValueError, RuntimeError):
            return False
        weights = None if attention_mask is None else attention_mask.reshape(-1)
        counted = torch.stack([router_statistics(logits, 2, weights) for logits in layers]).sum(0)
        if not torch.allclose(
            torch.as_tensor(theirs, dtype=torch.float64), load_balance(counted), rtol=1e-4
        ):
            return False
    return True


def router_statistics(logits: Tensor, top_k: int, mask: Tensor | None) -> Tensor:
    """Returns what one router's rows add to the loss: choices of each expert, probability of each,
    and rows.

    Args:
        logits: `[T, E]`.
        top_k: experts that a token is sent to.
        mask: `[T]`, nonzero for tokens that count; None where all do.

    Returns:
        `[2E + 1]` in float64, which counts exactly; sums over rows are taken in float32 at least.
    """
    probabilities = router_probabilities(logits)
    num_experts = logits.shape[-1]
    chosen = probabilities.topk(top_k, dim=-1).indices
    if mask is None:
        choices = torch.ones_like(chosen, dtype=torch.float64)
        rows = torch.full((1,), float(logits.shape[0]), dtype=torch.float64, device=logits.device)
    else:
        weights = mask.to(logits.device, probabilities.dtype)
        probabilities = probabilities * weights[:, None]
        choices = weights.double()[:, None].expand_as(chosen)
        rows = weights.double().sum().view(1)
    counts = torch.zeros(num_experts, dtype=torch.float64, device=logits.device)
    counts = counts.scatter_add(0, chosen.reshape(-1), choices.reshape(-1))
    # [T, E] -> [2E + 1]
    return torch.cat([counts, probabilities.sum(0).double(), rows])


def router_probabilities(logits: Tensor) -> Tensor:
    """Returns the probabilities of `[T, E]` logits, in float32 at least, as routers choose by
    them.
    """
    return torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def load_balance(statistics: Tensor) -> Tensor:
    """Returns the load balancing loss of summed `router_statistics` `[2E + 1]`."""
    counts, probabilities, rows = _split(statistics)
    return counts.numel() * (counts / rows * probabilities / rows).sum()


def load_balance_gradient(statistics: Tensor) -> Tensor:
    """Returns the loss's derivative by each expert's summed probability, `[E]`; choices have
    none.
    """
    counts, _, rows = _split(statistics)
    gradient: Tensor = counts.numel() * counts / rows / rows
    return gradient


def _split(statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    num_experts = statistics.numel() // 2
    return (
        statistics[:num_experts],
        statistics[num_experts : 2 * num_experts],
        statistics[-1].clamp(min=1.0),
    )


def recorded_routers(model: Any) -> Iterator[tuple[nn.Module, int]]:
    """Yields the modules whose outputs transformers records as router logits, with the logits'
    place in their output.

    Args:
        model: a transformers model; a model inside of it says by itself what is recorded of its
            modules.
    """
    yield from _recorded(model, "", _recorders(model))


def _recorders(model: Any) -> list[Any]:
    recorders = _private_api.recorded_outputs(model).get(_LOGITS, [])
    return list(recorders) if isinstance(recorders, list | tuple) else [recorders]


def _recorded(
    module: nn.Module, name: str, recorders: list[Any]
) -> Iterator[tuple[nn.Module, int]]:
    for child_name, child in module.named_children():
        inner = _recorders(child) if is_model(child) else recorders
        yield from _recorded(child, f"{name}.{child_name}", inner)
    for recorder in recorders:
        target: Any = getattr(recorder, "target_class", recorder)
        layer = getattr(recorder, "layer_name", None)
        is_there = layer is None or f".{layer.strip('.')}." in f"{name}."
        if isinstance(target, type) and isinstance(module, target) and is_there:
            # A bare class records the second entry of its output, as transformers does.
            yield module, getattr(recorder, "index", 1)
