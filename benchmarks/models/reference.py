"""What one process computes for a batch: loss, gradients and linear layers' work, in float64
throughout.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks.models.batches import LABEL_LENGTH, ODD_LABEL_LENGTH, Batch, Form, num_counted


@dataclass
class Reference:
    """One process's result.

    Args:
        loss: of the batch.
        grads: by parameter name; parameters without a gradient are left out.
        linear_rows: for each linear layer the rows that went through it.
    """

    loss: float
    grads: dict[str, Tensor]
    linear_rows: dict[str, int]


class InDouble(TorchFunctionMode):
    """Computes in float64 what a model asks to be computed in float32."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Calls the function with float64 in place of float32."""
        function: Any = Tensor.double if func is Tensor.float else func
        wide = {
            key: torch.float64 if value is torch.float32 else value
            for key, value in (kwargs or {}).items()
        }
        return function(
            *(torch.float64 if value is torch.float32 else value for value in args), **wide
        )


class State:
    """What a forward leaves behind in a model: buffers, and the length that dynamic rotary
    positions have reached.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [
            (module, name, buffer, buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._lengths = [
            (module, name, value)
            for module in model.modules()
            for name, value in vars(module).items()
            if name.endswith("max_seq_len_cached")
        ]

    def restore(self) -> None:
        """Puts all of it back, so that every batch finds the model as it was built."""
        for module, name, buffer, value in self._buffers:
            module._buffers[name] = buffer.copy_(value)
        for module, name, length in self._lengths:
            setattr(module, name, length)


def reference(model: nn.Module, form: Form, batches: Sequence[Batch]) -> Reference:
    """Runs batches, whose losses are weighted by their tokens, and returns loss and gradients.

    Raises:
        ValueError: the loss is not finite.
    """
    model.zero_grad()
    counts = [num_counted(form, part) for part in batches]
    extra = without_cache(form, model)
    total = torch.zeros(())
    with counted_rows(model) as rows, InDouble(), stock_attention(model):
        for part, count in zip(batches, counts, strict=True):
            total = total + model(**part, **extra).loss * count / sum(counts)
        total.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if not total.isfinite():
        raise ValueError(f"one process computes a loss of {float(total.detach())}")
    return Reference(float(total.detach()), grads, rows)


def without_cache(form: Form, model: nn.Module) -> dict[str, bool]:
    """Returns the argument that keeps a model from caching keys, for those that would."""
    takes = form == "causal" or "use_cache" in inspect.signature(type(model).forward).parameters
    return {"use_cache": False} if takes else {}


@contextmanager
def stock_attention(model: nn.Module) -> Iterator[None]:
    """Makes models that cap their scores attend by transformers' plain functions: its sdpa leaves
    the cap out.
    """
    configs = [getattr(module, "config", None) for module in model.modules()]
    capped = any(getattr(config, "attn_logit_softcapping", None) for config in configs)
    with attention(model, "eager") if capped else attention(model, None):
        yield


@contextmanager
def attention(model: nn.Module, implementation: str | None) -> Iterator[None]:
    """Makes every part of a model use one of transformers' attention functions for a while; None
    leaves them.
    """
    configs: dict[int, Any] = {
        id(found): found for found in (vars(module).get("config") for module in model.modules())
    }
    kept = [
        (one, one._attn_implementation_internal) for one in configs.values() if _has_attention(one)
    ]
    try:
        for config, _ in kept if implementation else ():
            config._attn_implementation_internal = implementation
        yield
    finally:
        for config, before in kept:
            config._attn_implementation_internal = before


def _has_attention(config: Any) -> bool:
    return hasattr(config, "_attn_implementation_internal")


@contextmanager
def counted_rows(model: nn.Module) -> Iterator[dict[str, int]]:
    """Counts the rows that go through each linear layer."""
    from transformers.pytorch_utils import Conv1D

    rows: dict[str, int] = {}

    def watch(name: str, module: nn.Module) -> Any:
        def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            rows[name] = rows.get(name, 0) + given.numel() // given.shape[-1]

        return module.register_forward_pre_hook(count, with_kwargs=True)

    handles = [
        watch(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))
    ]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def share_of_work(rows: dict[str, int], right: Reference, form: Form) -> float:
    """Returns this rank's part of the linear layers' rows.

    An encoder whose input is no tokens runs on every rank in full: there only the layers that see
    the decoder's tokens are measured, which are those with as many rows as the batch has labels.
    """
    measured = right.linear_rows
    if form == "features":
        lengths = (2 * LABEL_LENGTH, 2 * ODD_LABEL_LENGTH)
        measured = {name: count for name, count in measured.items() if count in lengths}
    total = sum(measured.values())
    return sum(rows.get(name, 0) for name in measured) / total if total else 1.0


def compare(loss: float, own: dict[str, Tensor], right: Reference) -> dict[str, Any]:
    """Returns the relative errors of the loss and of the worst gradient.

    A gradient that is zero but for rounding (a key's bias, say) is measured by the whole gradient's
    norm.
    """
    total = float(torch.stack([grad.norm() for grad in right.grads.values()]).norm())
    errors = {}
    for name, grad in right.grads.items():
        size = float(grad.norm())
        found = own.get(name, torch.zeros(()))
        errors[name] = float((found - grad).norm()) / (size if size > 1e-10 * total else total)
    errors |= {
        name: float(grad.norm()) / total for name, grad in own.items() if name not in right.grads
    }
    errors = {name: math.inf if math.isnan(error) else error for name, error in errors.items()}
    worst = max(errors, key=lambda name: errors[name])
    loss_error = abs(loss - right.loss) / abs(right.loss) if math.isfinite(loss) else math.inf
    return {
        "error": max(loss_error, errors[worst]),
        "loss": loss_error,
        "gradient": errors[worst],
        "worst": worst,
    }
