"""Installs an attention strategy into one transformers model, reversibly, through transformers' own registries.

Our functions get names of their own in `AttentionInterface` and `AttentionMaskInterface`; nothing there is overwritten.
A model is pointed at them by private copies of its configs, so models that shared a config with it stay untouched.
Our mask function returns the batch's `SequenceDescription` in place of a mask: it travels with each layer's arguments,
so that a checkpoint's recompute sees the batch it belongs to. A forward without a description takes the ordinary path.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ulysses_accel.attention.kernels import AttentionCall, eager
from ulysses_accel.attention.usp import SequenceAttention
from ulysses_accel.errors import UnsupportedModelError
from ulysses_accel.sequence import SequenceDescription

PREFIX = "ulysses_accel_"


@dataclass
class InstalledAttention:
    """One model's installation, and what it takes to undo it.

    Args:
        attention: the strategy that its layers call.
        implementation: our name in transformers' registries.
        num_calls: attention calls on sharded batches so far.
        relies_on_context: some layer is not given the mask by its model, and reads the running forward's description.
        originals: each module whose config was replaced, with the config it had.
    """

    attention: SequenceAttention
    implementation: str
    num_calls: int = 0
    relies_on_context: bool = False
    originals: list[tuple[nn.Module, Any]] = field(default_factory=list)

    def uninstall(self) -> None:
        """Gives the model its own configs back; forwards with a description are refused from then on."""
        for module, config in self.originals:
            module.config = config
            _INSTALLED.pop(module, None)
        self.originals.clear()
        _release(self.implementation)


@dataclass(frozen=True)
class Windowed:
    """What layers get in place of a mask.

    Args:
        description: of the batch.
        window: tokens that a token sees, itself included; None for all.
    """

    description: SequenceDescription
    window: int | None

    def __getitem__(self, key: Any) -> Windowed:
        """Returns itself for slices that keep all of a mask, as models take that may keep the last tokens only."""
        if all(part in (slice(None), slice(0, None)) for part in (key if isinstance(key, tuple) else (key,))):
            return self
        raise UnsupportedModelError(
            f"the model takes a part [{key}] of its mask, which is not computed on a sharded sequence. "
            f"Leave logits_to_keep out, or use sp_size=1 and cp_size=1."
        )


_INSTALLED: WeakKeyDictionary[nn.Module, InstalledAttention] = WeakKeyDictionary()
_ACTIVE: ContextVar[SequenceDescription | None] = ContextVar("ulysses_accel_description", default=None)
_NUM_USERS: dict[str, int] = {}


@contextmanager
def describe_forward(description: SequenceDescription | None) -> Iterator[None]:
    """Makes `description` the one of every attention call inside; None means an ordinary, unsharded batch."""
    token = _ACTIVE.set(description)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def install(model: nn.Module, attention: SequenceAttention) -> InstalledAttention:
    """Installs an attention strategy into a model; forwards outside of `describe_forward` stay what they were.

    Args:
        model: a transformers model, or a module that holds one.
        attention: which ranks share its sequences, and how.

    Returns:
        The installation; its `uninstall()` restores the model.
    """
    implementation = _acquire(attention.core)
    installed = InstalledAttention(attention, implementation)
    copies: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            installed.originals.append((module, config))
            module.config = _private_copy(config, implementation, copies)
            _INSTALLED[module] = installed
    return installed


def _private_copy(config: Any, implementation: str, copies: dict[int, Any]) -> Any:
    """Returns this model's copy of a config and of its sub-configs, with our attention; one copy for each original."""
    if id(config) not in copies:
        private = copies[id(config)] = copy.copy(config)
        for name in getattr(config, "sub_configs", {}):
            if getattr(config, name, None) is not None:
                setattr(private, name, _private_copy(getattr(config, name), implementation, copies))
        private._attn_implementation_internal = implementation
    return copies[id(config)]


def _acquire(core: str) -> str:
    """Registers our attention around `core` with transformers, once for all models that use it; returns its name."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # Models ask whether "flash" is in the name and then prepare arguments that a sharded batch has not.
    implementation = PREFIX + core.replace("flash_attention_", "fa").replace("flash", "fa").replace("/", "_")
    if _NUM_USERS.get(implementation, 0) == 0:
        ALL_ATTENTION_FUNCTIONS.register(implementation, _attention_function(core))
        ALL_MASK_ATTENTION_FUNCTIONS.register(implementation, _mask_function(core))
    _NUM_USERS[implementation] = _NUM_USERS.get(implementation, 0) + 1
    return implementation


def _release(implementation: str) -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    _NUM_USERS[implementation] -= 1
    if _NUM_USERS[implementation] == 0:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(implementation, None)
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(implementation, None)


def _mask_function(core: str) -> Callable[..., Any]:
    def mask(*args: Any, **kwargs: Any) -> Any:
        description = _ACTIVE.get()
        if description is None:
            from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask

            return ALL_MASK_ATTENTION_FUNCTIONS.get(core, flash_attention_mask)(*args, **kwargs)
        if kwargs.get("use_vmap"):
            raise UnsupportedModelError(
                "the model lays a mask function of its own over its attention, which is not computed on a sharded "
                "sequence. Use a model without it, or sp_size=1."
            )
        return Windowed(description, kwargs.get("local_size"))

    return mask


def _attention_function(core: str) -> Callable[..., tuple[Tensor, None]]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        description = _description_for(module, attention_mask)
        if description is None:
            extra = dict(kwargs, dropout=dropout, scaling=scaling, is_causal=is_causal)
            return _ordinary(core, module, query, key, value, attention_mask, extra)
        _refuse_extras(module, kwargs)
        installed = _installation_of(module)
        installed.num_calls += 1
        causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
        call = AttentionCall(is_causal=causal, scale=scaling, dropout=dropout, softcap=kwargs.get("softcap"))
        out = installed.attention(query, key, value, description, call, _window(module, attention_mask, kwargs))
        # Models view it as [B, S / P, H * D]; without an exchange of heads it is a transposed view.
        return out.contiguous(), None

    return attention


def _installation_of(module: nn.Module) -> InstalledAttention:
    installed = _INSTALLED.get(module)
    if installed is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} was given a sharded batch, but belongs to a model that was not prepared "
            f"(a copy made after prepare?). Pass the model that computes to accelerator.prepare."
        )
    return installed


def _description_for(module: nn.Module, attention_mask: Any) -> SequenceDescription | None:
    """Returns the description of the batch that this call belongs to, or None for an ordinary batch."""
    if isinstance(attention_mask, SequenceDescription):
        return attention_mask
    if isinstance(attention_mask, Windowed):
        return attention_mask.description
    description, installed = _ACTIVE.get(), _INSTALLED.get(module)
    if description is not None and attention_mask is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends with a mask that its model made by itself, which is not computed on a "
            f"sharded sequence. Use a model without it, or sp_size=1."
        )
    if description is not None and installed is not None:
        installed.relies_on_context = True
    # The task id is -1 outside of a backward pass; inside one this is a checkpoint's recompute.
    elif installed is not None and installed.relies_on_context and torch._C._current_graph_task_id() != -1:
        raise UnsupportedModelError(
            f"{type(module).__name__} is recomputed in the backward pass, but its model does not pass the attention "
            f"mask down to it, so the batch's documents are not known. Switch activation checkpointing off."
        )
    return description


def _window(module: nn.Module, attention_mask: Any, kwargs: dict[str, Any]) -> int | None:
    """Returns how many tokens a layer sees; models say it by the mask, and most of them to the attention too."""
    window = attention_mask.window if isinstance(attention_mask, Windowed) else None
    told = kwargs.get("sliding_window")
    if told is not None and told != window:
        raise UnsupportedModelError(
            f"{type(module).__name__} calls attention with sliding_window={told}, but was given a mask for "
            f"{'full attention' if window is None else f'a window of {window}'}. Which of them holds is not clear."
        )
    return window


def _refuse_extras(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuses arguments that change the attention in a way which is not computed here."""
    for name in ("s_aux", "position_bias", "cache", "head_mask"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} calls attention with {name}, which Ulysses attention does not compute. "
                f"Use a model or configuration without it, or sp_size=1."
            )


class _CoreView:
    """A module as its core attention must see it: with the core's name in its config."""

    def __init__(self, module: nn.Module, core: str) -> None:
        self._module = module
        self.config = copy.copy(module.config)
        self.config._attn_implementation_internal = core  # type: ignore[union-attr]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _ordinary(
    core: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, extra: dict[str, Any]
) -> tuple[Tensor, None]:
    """Runs the core on a batch that is not sharded, as transformers would have run it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if core == "eager":
        return _ordinary_eager(module, query, key, value, mask, extra)
    view = module if core == "sdpa" else _CoreView(module, core)
    result: tuple[Tensor, None] = ALL_ATTENTION_FUNCTIONS[core](view, query, key, value, mask, **extra)
    return result


def _ordinary_eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, extra: dict[str, Any]
) -> tuple[Tensor, None]:
    """Runs attention with an additive mask; transformers keeps its eager functions out of the registry."""
    call = AttentionCall(False, extra["scaling"], extra["dropout"], extra.get("softcap"))
    return eager(query, key, value, call, mask).transpose(1, 2).contiguous(), None
