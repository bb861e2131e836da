"""Installs an attention strategy into one transformers model, reversibly, through transformers' own
registries.

Our functions get names of their own in `AttentionInterface` and `AttentionMaskInterface`; nothing
there is overwritten. A model is pointed at them by private copies of its configs, so models that
shared a config with it stay untouched. Our mask function returns the batch's description in place
of a mask (`DescribedMask`): it is passed along with each layer's arguments, so that a checkpoint's
recompute sees the batch it belongs to. A forward without a description takes the ordinary path.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from ulysses_accel import _private_api
from ulysses_accel.attention.huggingface.call import Roles, attend, ordinary
from ulysses_accel.attention.huggingface.masks import DescribedMask, read_pattern
from ulysses_accel.attention.strategy import SequenceAttention
from ulysses_accel.errors import UnsupportedModelError
from ulysses_accel.installation import Installation
from ulysses_accel.introspection.structure import encoder_of, transformers_model
from ulysses_accel.sequence.description import SequenceDescription
from ulysses_accel.sequence.running import DescribedBatch, run_batch, running_description

PREFIX = "ulysses_accel_"


@dataclass
class InstalledAttention:
    """One model's installation, which holds no module of it strongly.

    Args:
        attention: the strategy that its layers call.
        implementation: our name in transformers' registries.
        roles: what its modules attend for.
        num_calls: attention calls on sharded batches so far.
        relies_on_context: the layers that are not given the mask by their model, and read the
            running batch's description.
        changes: everything that was changed on the model.
    """

    attention: SequenceAttention
    implementation: str
    roles: Roles = field(default_factory=Roles)
    num_calls: int = 0
    relies_on_context: WeakSet[nn.Module] = field(default_factory=WeakSet)
    changes: Installation = field(default_factory=Installation)

    def close(self) -> None:
        """Gives the model its configs back; forwards with a description are refused from then
        on.
        """
        self.changes.close()


# A table, because attention functions are called with the module alone. Its values must not refer
# to modules: an entry whose value holds its key is never removed.
_INSTALLED: WeakKeyDictionary[nn.Module, InstalledAttention] = WeakKeyDictionary()
_NUM_USERS: dict[str, int] = {}


def active_description() -> SequenceDescription | None:
    """Returns the description of the sharded forward that is running, None outside of one."""
    return running_description()


@contextmanager
def describe_forward(description: SequenceDescription | None) -> Iterator[None]:
    """Makes `description` the one of every attention call inside; None means an ordinary, unsharded
    batch.
    """
    with run_batch(DescribedBatch(description)):
        yield


def install(model: nn.Module, attention: SequenceAttention) -> InstalledAttention:
    """Installs an attention strategy into a model; forwards outside of `describe_forward` stay what
    they were.

    Args:
        model: a transformers model, or a module that holds one.
        attention: which ranks share its sequences, and how.

    Returns:
        The installation; its `close()` restores the model.
    """
    implementation = _acquire(attention.core)
    inner = transformers_model(model)
    encoder = encoder_of(inner)
    in_encoder = WeakSet(encoder.modules()) if encoder is not None else None
    roles = Roles(in_encoder, masks_decide=not _private_api.supports_sdpa(inner))
    installed = InstalledAttention(attention, implementation, roles)
    # A finalizer runs once: on close, or when the model is deleted.
    release = weakref.finalize(model, _release, implementation)
    release.atexit = False
    installed.changes.callback(release)
    copies: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if _private_api.has_attention_setting(config):
            private = _private_copy(config, implementation, copies)
            installed.changes.set(module, "config", private)
            installed.changes.callback(_forget, weakref.ref(module))
            _INSTALLED[module] = installed
    return installed


def _forget(module: weakref.ref[nn.Module]) -> None:
    live = module()
    if live is not None:
        _INSTALLED.pop(live, None)


def _private_copy(config: Any, implementation: str, copies: dict[int, Any]) -> Any:
    """Returns this model's copy of a config and of its sub-configs, with our attention; one copy
    for each original.
    """
    if id(config) not in copies:
        private = copies[id(config)] = copy.copy(config)
        for name in getattr(config, "sub_configs", {}):
            if getattr(config, name, None) is not None:
                setattr(private, name, _private_copy(getattr(config, name), implementation, copies))
        _private_api.set_attention(private, implementation)
    return copies[id(config)]


def _acquire(core: str) -> str:
    """Registers our attention around `core` with transformers, once for all models that use it;
    returns its name.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # transformers' models ask whether "flash" is in the name, and then prepare arguments that a
    # sharded batch does not have.
    implementation = PREFIX + core.replace("flash_attention_", "fa").replace("flash", "fa").replace(
        "/", "_"
    )
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
        _private_api.unregister_attention(ALL_ATTENTION_FUNCTIONS, implementation)
        _private_api.unregister_attention(ALL_MASK_ATTENTION_FUNCTIONS, implementation)


def _mask_function(core: str) -> Callable[..., Any]:
    def mask(*args: Any, **kwargs: Any) -> Any:
        description = running_description()
        if description is None:
            from transformers.masking_utils import (
                ALL_MASK_ATTENTION_FUNCTIONS,
                flash_attention_mask,
            )

            return ALL_MASK_ATTENTION_FUNCTIONS.get(core, flash_attention_mask)(*args, **kwargs)
        return DescribedMask(
            description, read_pattern(kwargs["mask_function"]), _encoder_keys(description, kwargs)
        )

    return mask


def _encoder_keys(
    description: SequenceDescription, request: dict[str, Any]
) -> SequenceDescription | None:
    """Returns the encoder's sequence that a decoder's mask is requested for, if every rank has it
    in full.
    """
    mask, config = request.get("attention_mask"), request.get("config")
    crosses = getattr(config, "is_encoder_decoder", False) or getattr(
        config, "add_cross_attention", False
    )
    if description.encoder is not None or not crosses or not isinstance(mask, Tensor):
        return None
    return SequenceDescription.from_document_ids(mask.to(torch.long) - 1, 1)


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
        mask = _mask_for(module, attention_mask)
        extra = dict(kwargs, dropout=dropout, scaling=scaling, is_causal=is_causal)
        if mask is None:
            return ordinary(core, module, query, key, value, attention_mask, extra)
        installed = _installation_of(module)
        installed.num_calls += 1
        out = attend(installed.attention, module, (query, key, value), mask, extra, installed.roles)
        # Models view it as [B, S/P, H * D]; without an exchange of heads it is a transposed view.
        return out.contiguous(), None

    return attention


def _installation_of(module: nn.Module) -> InstalledAttention:
    installed = _INSTALLED.get(module)
    if installed is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} was given a sharded batch, but belongs to a model that was "
            "not prepared (a copy made after prepare?). Pass the model that computes to "
            "accelerator.prepare."
        )
    return installed


def _mask_for(module: nn.Module, attention_mask: Any) -> DescribedMask | None:
    """Returns what is known of the batch that this call belongs to, or None for an ordinary
    batch.
    """
    if isinstance(attention_mask, SequenceDescription):
        return DescribedMask(attention_mask)
    if isinstance(attention_mask, DescribedMask):
        return attention_mask
    description, installed = running_description(), _INSTALLED.get(module)
    if description is not None and attention_mask is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends with a mask that its model made by itself, which is "
            "not computed on a sharded sequence. Use a model without it, or sp_size=1."
        )
    if description is not None and installed is not None:
        installed.relies_on_context.add(module)
    # The task id is -1 outside of a backward pass; inside one this is a checkpoint's recompute.
    elif (
        installed is not None
        and module in installed.relies_on_context
        and _private_api.is_in_backward()
    ):
        raise UnsupportedModelError(
            f"{type(module).__name__} is recomputed in the backward pass, but its model does not "
            "pass the attention mask down to it, so the batch's documents are not known. Switch "
            "activation checkpointing off."
        )
    return DescribedMask(description) if description is not None else None
