"""One attention call of a transformers module: on a sharded batch by its role in the model, else as
transformers does.

Roles: self-attention of the described sequence; self-attention of an encoder, over its own
sequence; cross-attention, from the described sequence to the encoder's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ulysses_accel import _private_api
from ulysses_accel.attention.call import AttentionCall
from ulysses_accel.attention.core import eager
from ulysses_accel.attention.huggingface.masks import DescribedMask, MaskPattern
from ulysses_accel.attention.saved_results import is_keeping
from ulysses_accel.attention.strategy import SequenceAttention
from ulysses_accel.errors import BatchError, UnsupportedModelError
from ulysses_accel.sequence.description import SequenceDescription

Heads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Roles:
    """What the modules of a model attend for.

    Args:
        encoder: the modules of an encoder-decoder's encoder; None for models of one sequence.
        masks_decide: whether layers may say something else of causality than the masks that they
            are always given, as in models that transformers only runs with masks.
    """

    encoder: WeakSet[nn.Module] | None = None
    masks_decide: bool = False


# Arguments by which models change their scores in ways that are not computed here.
_REFUSED = ("position_bias", "cache", "head_mask", "sinks", "indices", "block_indices")


def attend(
    attention: SequenceAttention,
    module: nn.Module,
    heads: Heads,
    mask: DescribedMask,
    extra: dict[str, Any],
    roles: Roles,
) -> Tensor:
    """Computes an attention call on a sharded batch.

    Args:
        attention: the model's strategy.
        module: that calls.
        heads: query `[B, H, S / P, D]`, key `[B, K, S / P, D]` and value `[B, K, S / P, Dv]`.
        mask: what is known of the batch.
        extra: what the module gives beside them.
        roles: of the model's modules.

    Returns:
        `[B, S / P, H, Dv]`.

    Raises:
        UnsupportedModelError: the module asks for what is not computed.
        BatchError: its tokens are not those of the described sequence.
    """
    _refuse_extras(module, extra)
    pattern = _pattern_of(module, mask.pattern, extra, roles)
    sinks = extra.get("s_aux")
    call = AttentionCall(
        is_causal=pattern.is_causal,
        scale=extra["scaling"],
        dropout=extra["dropout"],
        softcap=extra.get("softcap"),
        sinks=sinks.flatten() if sinks is not None else None,
        alibi_slopes=extra.get("alibi_slopes"),
    )
    description = mask.description
    query, key, value = heads
    if roles.encoder is not None and module in roles.encoder:
        attention, description = _encoder_side(attention, description.encoder, query)
    elif roles.encoder is not None and not pattern.is_causal:
        _check_tokens(module, query, description)
        if mask.keys is not None:
            description = replace(description, encoder=mask.keys, cache={})
        return attention(query, key, value, description, call, pattern.window, crosses=True)
    _check_tokens(module, query, description)
    _check_tokens(module, key, description)
    if pattern.chunk is not None:
        description = description.chunked(pattern.chunk)
    return attention(query, key, value, description, call, pattern.window)


def _encoder_side(
    attention: SequenceAttention, encoder: SequenceDescription | None, query: Tensor
) -> tuple[SequenceAttention, SequenceDescription]:
    """Returns how an encoder attends, and over what: by itself where every rank has all of its
    sequence.
    """
    if encoder is not None and encoder.num_shards > 1:
        return attention, encoder
    return replace(attention, ulysses_group=None, ring_group=None), encoder or _whole(query)


def _check_tokens(module: nn.Module, heads: Tensor, description: SequenceDescription) -> None:
    if (heads.shape[0], heads.shape[2]) != (description.batch_size, description.shard_length):
        raise BatchError(
            f"{type(module).__name__} attends over {heads.shape[0]} rows with {heads.shape[2]} "
            "tokens on this rank, "
            f"where the batch has {description.batch_size} rows with {description.shard_length}. "
            "Its layers must see each token once; use a model that does, or sp_size=1 and "
            "cp_size=1."
        )


def _pattern_of(
    module: nn.Module, given: MaskPattern | None, extra: dict[str, Any], roles: Roles
) -> MaskPattern:
    """Returns which tokens see each other; models say it by the mask, and most of them to the
    attention too.
    """
    usual = bool(getattr(module, "is_causal", True))
    told = usual if extra["is_causal"] is None else bool(extra["is_causal"])
    pattern = given or MaskPattern(told)
    # Some layers leave causality to the mask where they are given one.
    if pattern.is_causal not in (told, usual) and not roles.masks_decide:
        raise UnsupportedModelError(
            f"{type(module).__name__} calls attention with is_causal={told}, but was given a mask "
            "for "
            f"{'causal' if pattern.is_causal else 'bidirectional'} attention. Which of them holds "
            "is not clear."
        )
    window = extra.get("sliding_window")
    # Flash attention's window counts the token itself, on both sides too.
    known = {
        pattern.window,
        pattern.chunk,
        None if pattern.window is None else pattern.window + (not pattern.is_causal),
    }
    if window is not None and window not in known:
        raise UnsupportedModelError(
            f"{type(module).__name__} calls attention with sliding_window={window}, but was given "
            "a mask for "
            f"{'full attention' if pattern.window is None else f'a window of {pattern.window}'}. "
            "Which of them holds "
            f"is not clear."
        )
    return pattern


def _refuse_extras(module: nn.Module, extra: dict[str, Any]) -> None:
    """Refuses arguments that change the attention in a way which is not computed here."""
    for name in _REFUSED:
        if extra.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} calls attention with {name}, which is not computed on a "
                "sharded sequence. "
                f"Use a model or configuration without it, or sp_size=1 and cp_size=1."
            )


class _CoreView:
    """A module as its core attention must see it: with the core's name in its config."""

    def __init__(self, module: nn.Module, core: str) -> None:
        self._module = module
        self.config = copy.copy(module.config)
        _private_api.set_attention(self.config, core)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def ordinary(
    core: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    extra: dict[str, Any],
) -> tuple[Tensor, None]:
    """Runs the core on a batch that is not sharded, as transformers would have run it; shapes as in
    `attend`.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    has_alibi = extra.get("alibi_slopes") is not None
    if has_alibi and (mask is not None or query.shape[2] != key.shape[2]):
        raise UnsupportedModelError(
            f"{type(module).__name__} calls attention with alibi_slopes on a batch that is whole "
            "on this rank, with a "
            "mask or a cache, which is not computed. Leave them out, or add the biases to the "
            "mask."
        )
    if (has_alibi or is_keeping()) and mask is None and query.shape[2] == key.shape[2]:
        return _ordinary_kept(core, module, query, key, value, extra), None
    unknown_to_sdpa = extra.get("softcap") is not None or extra.get("s_aux") is not None
    if core == "eager" or (core == "sdpa" and unknown_to_sdpa):
        return _ordinary_eager(core, module, query, key, value, mask, extra)
    view = module if core == "sdpa" else _CoreView(module, core)
    result: tuple[Tensor, None] = ALL_ATTENTION_FUNCTIONS[core](
        view, query, key, value, mask, **extra
    )
    return result


def _ordinary_kept(
    core: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any]
) -> Tensor:
    """Runs attention without a mask such that a checkpointed layer can keep it; `[B, S, H, Dv]`."""
    told = (
        extra["is_causal"]
        if extra["is_causal"] is not None
        else bool(getattr(module, "is_causal", True))
    )
    sinks = extra.get("s_aux")
    flat_sinks = sinks.flatten() if sinks is not None else None
    slopes = extra.get("alibi_slopes")
    call = AttentionCall(
        told, extra["scaling"], extra["dropout"], extra.get("softcap"), flat_sinks, slopes
    )
    return SequenceAttention(None, core=core)(query, key, value, _whole(query), call).contiguous()


def _whole(query: Tensor) -> SequenceDescription:
    """Returns the description of a sequence without padding that is whole on this rank."""
    return SequenceDescription(query.shape[2], 1, (((0, query.shape[2]),),) * query.shape[0])


def _ordinary_eager(
    core: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    extra: dict[str, Any],
) -> tuple[Tensor, None]:
    """Runs attention with an additive mask; transformers keeps its eager functions out of the
    registry.
    """
    told = (
        extra["is_causal"]
        if extra["is_causal"] is not None
        else bool(getattr(module, "is_causal", True))
    )
    if mask is None and core != "eager" and told and query.shape[2] > 1:
        mask = torch.ones(
            query.shape[2], key.shape[2], dtype=torch.bool, device=query.device
        ).tril()
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(
            ~mask, torch.finfo(query.dtype).min
        )
    sinks = extra.get("s_aux")
    if sinks is not None:
        # A sink is a key of no value whose score is given: it stands in the mask.
        mask = query.new_zeros(1) if mask is None else mask
        scores = sinks.view(1, -1, 1, 1).to(query.dtype).expand(*query.shape[:3], 1)
        mask = torch.cat(
            [mask[..., : key.shape[2]].expand(*query.shape[:3], key.shape[2]), scores], dim=-1
        )
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
    call = AttentionCall(False, extra["scaling"], extra["dropout"], extra.get("softcap"))
    return eager(query, key, value, call, mask).transpose(1, 2).contiguous(), None
