"""Models whose own code attends, past transformers' AttentionInterface: found by their structure,
adapted by instance.

Baichuan-like: query, key and value of one `W_pack`, rotary positions (7B) or ALiBi (13B). ChatGLM2-
and 3-like: tokens first, a `core_attention` of its own behind one `query_key_value`. Their
attention instances get a forward that, on a sharded batch, goes through the model's installed
attention; on any other it is theirs. Shapes: B = rows, s = tokens of one rank, H / K = query /
key-value heads, D = head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ulysses_accel import _private_api
from ulysses_accel.attention import InstalledAttention, active_description
from ulysses_accel.attention.alibi import alibi_slopes
from ulysses_accel.attention.huggingface.masks import DescribedMask
from ulysses_accel.errors import UnsupportedModelError
from ulysses_accel.introspection.findings import Finding
from ulysses_accel.introspection.source import parameters
from ulysses_accel.sequence.description import SequenceDescription

Heads = tuple[Tensor, Tensor, Tensor]

_MASK_MAKERS = (_private_api.DECODER_MASK_METHOD, "get_alibi_mask")
# Models keep their biases in half precision.
_SLOPE_TOLERANCE = 1e-2


@dataclass
class OwnAttention:
    """The attention modules of a model that are to be adapted.

    Args:
        fused: those with a `W_pack`, by their names.
        cores: those called `core_attention`, by their names, with the module that each is in.
        has_alibi: whether distances tell the positions, so that the model needs no others.
    """

    fused: dict[str, nn.Module] = field(default_factory=dict)
    cores: dict[str, tuple[nn.Module, nn.Module]] = field(default_factory=dict)
    has_alibi: bool = False

    def __bool__(self) -> bool:
        return bool(self.fused or self.cores)

    def settles(self, finding: Finding, model: nn.Module) -> bool:
        """Returns whether adapting makes what `supports` would find computable."""
        if finding.kind == "attention":
            return finding.where in (*self.fused, *self.cores, type(model).__name__)
        # The loss is computed of the logits, and distances are the same in every part of a row.
        return finding.kind == "loss" or (finding.kind == "positions" and self.has_alibi)


def find_own_attention(model: nn.Module) -> OwnAttention:
    """Returns the attention modules of a model that can be adapted; nothing for models that
    transformers routes.

    Raises:
        UnsupportedModelError: a module looks like one of them, but its positions are not known.
    """
    found = OwnAttention()
    for name, module in model.named_modules():
        if all(hasattr(module, part) for part in ("W_pack", "o_proj", "num_heads", "head_dim")):
            found.fused[name] = module
        elif all(
            isinstance(getattr(module, part, None), nn.Module)
            for part in ("query_key_value", "core_attention")
        ):
            found.cores[f"{name}.core_attention"] = (module, module.core_attention)
    rotary = [hasattr(module, "rotary_emb") for module in found.fused.values()]
    found.has_alibi = bool(rotary) and not any(rotary)
    if found.has_alibi:
        _check_alibi(model, found)
    elif rotary and not all(rotary):
        raise UnsupportedModelError(
            f"{type(model).__name__} has layers with and layers without rotary positions "
            f"({', '.join(found.fused)}). "
            f"Use a model whose layers are alike."
        )
    return found


def _check_alibi(model: nn.Module, found: OwnAttention) -> None:
    """Refuses biases that are not the usual ones, by what the model itself makes."""
    makers = [module for module in model.modules() if hasattr(module, "get_alibi_mask")]
    number = int(next(iter(found.fused.values())).num_heads)  # type: ignore[arg-type]
    own = _own_slopes(makers[0]) if makers else None
    expected = alibi_slopes(number)
    if (
        own is None
        or own.shape != expected.shape
        or not torch.allclose(own, expected, rtol=_SLOPE_TOLERANCE)
    ):
        raise UnsupportedModelError(
            f"{type(model).__name__} has attention layers without rotary positions "
            f"({next(iter(found.fused))}), and "
            f"its biases by distance are not ALiBi's for {number} heads. Use sp_size=1."
        )


def _own_slopes(maker: nn.Module) -> Tensor:
    """Returns what a model's mask adds from one key to the next, `[H]`."""
    device = next(maker.parameters()).device
    training, maker.training = maker.training, True
    try:
        # Remembered masks are only made in evaluation.
        with torch.no_grad():
            mask: Tensor = maker.get_alibi_mask(torch.zeros(1, 4, 1, device=device), 4)  # type: ignore[operator]
    finally:
        maker.training = training
    return (mask[:, -1, -1] - mask[:, -1, -2]).double().cpu()


def adapt(
    model: nn.Module, found: OwnAttention, installed: InstalledAttention
) -> Callable[[], None]:
    """Gives attention modules, and what makes their masks, a forward of their own.

    Args:
        model: a transformers model.
        found: its modules.
        installed: the model's attention, which they call from now on.

    Returns:
        A function that takes it all back.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = ALL_ATTENTION_FUNCTIONS[installed.implementation]
    replaced: list[tuple[nn.Module, str, Any]] = [
        (module, "forward", _Fused(module, model, attend, found.has_alibi))
        for module in found.fused.values()
    ]
    replaced += [
        (core, "forward", _Core(core, model, attend, outer)) for outer, core in found.cores.values()
    ]
    replaced += list(_mask_makers(model))
    for owner, name, function in replaced:
        setattr(owner, name, function)
    hooks = [
        holder.register_forward_pre_hook(_give_mask, with_kwargs=True)
        for holder in _holders(model, found)
    ]

    def restore() -> None:
        for hook in hooks:
            hook.remove()
        for owner, name, _ in replaced:
            delattr(owner, name)

    return restore


def _mask_makers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Callable[..., Any]]]:
    for module in model.modules():
        for name in _MASK_MAKERS:
            if hasattr(module, name):
                yield module, name, _MakeMask(getattr(module, name))


def _holders(model: nn.Module, found: OwnAttention) -> Iterator[nn.Module]:
    """Yields the modules that hand a mask to their layers, where none is made for a batch without
    padding.
    """
    inside = {core for _, core in found.cores.values()}
    for module in model.modules():
        layers = [child for child in module.children() if isinstance(child, nn.ModuleList)]
        if "attention_mask" in parameters(module) and any(
            inside & set(child.modules()) for child in layers
        ):
            yield module


@dataclass(frozen=True)
class _Mask(DescribedMask):
    """What layers of such models are given as their mask, so that a checkpoint's recompute knows
    its batch.
    """

    @property
    def shape(self) -> tuple[int]:
        """Of no mask, so that models that keep theirs for as long as it fits make a new one."""
        return (0,)


def _give_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    description = active_description()
    if description is None:
        return None
    given = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    given.arguments["attention_mask"] = _Mask(description)
    return given.args[1:], given.kwargs


@dataclass(frozen=True)
class _MakeMask:
    """Makes the mask of a sharded batch; stands in for a model's own function, which makes the
    others.
    """

    stock: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        description = active_description()
        return self.stock(*args, **kwargs) if description is None else _Mask(description)


class _Adapted:
    """The forward of an attention module: ours on a sharded batch, its own on another.

    Args:
        module: whose forward it is.
        model: that it belongs to, whose attention was installed.
        attend: the installed attention function.
    """

    def __init__(self, module: nn.Module, model: nn.Module, attend: Callable[..., Any]) -> None:
        self.module, self.model, self.attend = module, model, attend
        self.stock = module.forward
        self.has_attended = False

    def description(self, mask: Any) -> SequenceDescription | None:
        """Returns the description of the batch that a module attends in, None for an ordinary one.

        Args:
            mask: that the module was given.

        Raises:
            UnsupportedModelError: this is a checkpoint's recompute, which does not know its batch.
        """
        description = mask.description if isinstance(mask, DescribedMask) else active_description()
        if description is None and self.has_attended and _private_api.is_in_backward():
            raise UnsupportedModelError(
                f"{type(self.module).__name__} is recomputed in the backward pass, where its batch "
                "is not known. "
                f"Switch activation checkpointing off."
            )
        self.has_attended |= description is not None
        return description

    def attention(
        self,
        heads: Heads,
        description: SequenceDescription,
        dropout: float = 0.0,
        slopes: Tensor | None = None,
    ) -> Tensor:
        """Attends, `[B, H, s, D]`, `[B, K, s, D]`, `[B, K, s, D]` -> `[B, s, H * D]`."""
        mask = DescribedMask(description)
        out: Tensor = self.attend(self.model, *heads, mask, dropout=dropout, alibi_slopes=slopes)[0]
        return out.flatten(2)


class _Fused(_Adapted):
    """Attention whose query, key and value come from one `W_pack`."""

    def __init__(
        self, module: nn.Module, model: nn.Module, attend: Callable[..., Any], has_alibi: bool
    ) -> None:
        super().__init__(module, model, attend)
        forward = inspect.unwrap(type(module).forward)
        self.signature = inspect.signature(forward)
        self.slopes = alibi_slopes(int(module.num_heads)) if has_alibi else None  # type: ignore[arg-type]
        self.rotate = None if has_alibi else _private_api.global_of(forward, "apply_rotary_pos_emb")
        if not has_alibi and (
            self.rotate is None or "position_ids" not in self.signature.parameters
        ):
            raise UnsupportedModelError(
                f"{type(module).__name__} has a W_pack and rotary positions, but takes no "
                "position_ids or does not use "
                f"apply_rotary_pos_emb. Use sp_size=1."
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Takes what the module's own forward takes."""
        given = self.signature.bind(self.module, *args, **kwargs).arguments
        description = self.description(given.get("attention_mask"))
        if description is None:
            return self.stock(*args, **kwargs)
        module: Any = self.module
        hidden: Tensor = given["hidden_states"]
        # [B, s, 3 * H * D] -> 3 times [B, H, s, D]
        packed = module.W_pack(hidden).unflatten(-1, (3, module.num_heads, module.head_dim))
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        if self.rotate is not None:
            longest = description.longest_position or 0
            cos, sin = module.rotary_emb(value, seq_len=longest + 1)
            query, key = self.rotate(query, key, cos, sin, given["position_ids"])
        slopes = None if self.slopes is None else self.slopes.to(hidden.device)
        return (
            module.o_proj(self.attention((query, key, value), description, slopes=slopes)),
            None,
            None,
        )


class _Core(_Adapted):
    """Attention between the heads that another module makes, tokens first, keys repeated to all
    query heads.
    """

    def __init__(
        self, module: nn.Module, model: nn.Module, attend: Callable[..., Any], outer: nn.Module
    ) -> None:
        super().__init__(module, model, attend)
        shared = getattr(outer, "multi_query_attention", False)
        self.num_key_heads = int(outer.num_multi_query_groups_per_partition) if shared else None  # type: ignore[arg-type]

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None
    ) -> Any:
        """`[s, B, H, D]` -> `[s, B, H * D]`."""
        description = self.description(attention_mask)
        if description is None:
            return self.stock(query, key, value, attention_mask)
        if (query.shape[0], query.shape[1]) != (description.shard_length, description.batch_size):
            raise UnsupportedModelError(
                f"{type(self.module).__name__} attends to {tuple(query.shape)}, where "
                f"{description.shard_length} "
                "tokens were expected first. Use the model that transformers itself has (GLM, "
                "GLM-4)."
            )
        # Of equal heads one is enough to send.
        step = 1 if self.num_key_heads is None else key.shape[2] // self.num_key_heads
        # [s, B, H, D] -> [B, H, s, D]
        heads = tuple(
            t.permute(1, 2, 0, 3) for t in (query, key[:, :, ::step], value[:, :, ::step])
        )
        dropout = getattr(self.module, "attention_dropout", None)
        chance = dropout.p if isinstance(dropout, nn.Dropout) and self.module.training else 0.0
        return self.attention((heads[0], heads[1], heads[2]), description, chance).transpose(0, 1)
