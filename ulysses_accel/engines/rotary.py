"""Rotary angles that follow from the longest position: the whole batch's, not this shard's.

transformers takes the greatest of the positions that a rotary module is given (dynamic and long RoPE). A hook appends
the batch's longest position to them as one more token, and another cuts its angles off again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ulysses_accel.errors import UnsupportedModelError


def hook_rotary(modules: list[nn.Module], longest: Callable[[nn.Module], int | None]) -> list[Any]:
    """Tells rotary modules the longest position of the batch that is running.

    Args:
        modules: whose angles follow from it.
        longest: returns it for a module's sequence; None outside of a sharded forward.

    Returns:
        What takes the hooks off.
    """
    handles: list[Any] = []
    for module in modules:
        hook = _LongestLast(longest, inspect.signature(type(module).forward))
        handles.append(module.register_forward_pre_hook(hook.before, with_kwargs=True))
        handles.append(module.register_forward_hook(hook.after))
    return handles


@dataclass(frozen=True)
class _LongestLast:
    longest: Callable[[nn.Module], int | None]
    signature: inspect.Signature

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        longest = self.longest(module)
        if longest is None:
            return None
        bound = self.signature.bind(module, *args, **kwargs)
        positions: Tensor = bound.arguments["position_ids"]
        # Padding that was added behind the batch counts on, and must not make it longer.
        last = positions.new_full((*positions.shape[:-1], 1), longest)
        bound.arguments["position_ids"] = torch.cat([positions.clamp(max=longest), last], dim=-1)
        return bound.args[1:], bound.kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.longest(module) is None:
            return None
        if isinstance(output, Tensor):
            return _without_last(module, output)
        return tuple(_without_last(module, angles) for angles in output)


def _without_last(module: nn.Module, angles: Any) -> Tensor:
    """Returns angles `[..., S / P + 1, D]` without the last token's."""
    if not isinstance(angles, Tensor) or angles.ndim < 2:
        raise UnsupportedModelError(
            f"{type(module).__name__} returns {type(angles).__name__} for its positions, where angles of each token "
            f"were expected. Use a fixed scaling such as yarn or linear."
        )
    return angles.narrow(-2, 0, angles.shape[-2] - 1)
