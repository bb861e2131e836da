"""Models with attention code that does not use transformers' AttentionInterface: recognized by
their structure, adapted by instance.

Baichuan-like: query, key and value of one `W_pack`, rotary positions (7B) or ALiBi (13B). ChatGLM2-
and 3-like: tokens first, a `core_attention` after one `query_key_value`. Their attention instances
get a forward that calls the model's installed attention on a sharded batch, and their own forward
on any other. Shapes: B = rows, s = tokens of one rank, H / K = query /
key-value heads, D = head size.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ulysses_accel import _private_api
from ulysses_accel.attention import InstalledAttention, active_description
from ulysses_accel.attention.alibi import alibi_slopes
from ulysses_accel.attention.huggingface.masks import DescribedMask
from ulysses_accel.errors import UnsupportedModelError
from ulysses_accel.installation import Installation, stock_method
from ulysses_accel.introspection.findings import Finding
from ulysses_accel.introspection.source import parameters
from ulysses_accel.sequence.description import SequenceDescription

Heads = tuple[Tensor, Tensor, Tensor]

_MASK_METHODS = (_private_api.DECODER_MASK_METHOD, "get_alibi_mask")
# Models keep their biases in half precision.
_SLOPE_TOLERANCE = 1e-2


@dataclass
class CustomAttention:
    """The attention modules of a model that are to be adapted.

    Args:
        fused: those with a `W_pack`, by their names.
        cores: those called `core_attention`, by their names, with the module that each is in.
        has_alibi: whether positions enter by ALiBi alone.
    """

    fused: dict[str, nn.Module] = field(default_factory=dict)
    cores: dict[str, tuple[nn.Module, nn.Module]] = field(default_factory=dict)
    has_alibi: bool = False

    def __bool__(self) -> bool:
        return bool(self.fused or self.cores)

    def covers(self, finding: Finding, model: nn.Module) -> bool:
        """Returns whether adapting the modules removes the reason of a finding."""
        if finding.kind == "attention":
            return finding.where in (*self.fused, *self.cores, type(model).__name__)
        # The loss is computed from the logits, and distances are the same in every shard of a row.
        return finding.kind == "loss" or (finding.kind == "positions" and self.has_alibi)


def find_custom_attention(model: nn.Module) -> CustomAttention:
    """Returns the attention modules of a model that can be adapted; none for models that use
    transformers' AttentionInterface.

    Raises:
        UnsupportedModelError: a module looks like one of them, but its positions are not known.
    """
    custom = CustomAttention()
    for name, module in model.named_modules():
        if all(hasattr(module, part) for part in ("W_pack", "o_proj", "num_heads", "head_dim")):
            custom.fused[name] = module
        elif all(
            isinstance(getattr(module, part, None), nn.Module)
            for part in ("query_key_value", "core_attention")
        ):
            custom.cores[f"{name}.core_attention"] = (module, module.core_attention)
    rotary = [hasattr(module, "rotary_emb") for module in custom.fused.values()]
    custom.has_alibi = bool(rotary) and not any(rotary)
    if custom.has_alibi:
        _check_alibi(model, custom)
    elif rotary and not all(rotary):
        raise UnsupportedModelError(
            f"{type(model).__name__} has layers with and layers without rotary positions "
            f"({', '.join(custom.fused)}). Use a model whose layers are alike."
        )
    return custom


def _check_alibi(model: nn.Module, custom: CustomAttention) -> None:
    """Refuses biases that are not ALiBi's, read from a mask that the model makes."""
    makers = [module for module in model.modules() if hasattr(module, "get_alibi_mask")]
    number = int(next(iter(custom.fused.values())).num_heads)  # type: ignore[arg-type]
    slopes = _mask_slopes(makers[0]) if makers else None
    expected = alibi_slopes(number)
    if (
        slopes is None
        or slopes.shape != expected.shape
        or not torch.allclose(slopes, expected, rtol=_SLOPE_TOLERANCE)
    ):
        raise UnsupportedModelError(
            f"{type(model).__name__} has attention layers without rotary positions "
            f"({next(iter(custom.fused))}), and its biases by distance are not "
            f"ALiBi's for {number} heads. Use sp_size=1."
        )


def _mask_slopes(maker: nn.Module) -> Tensor:
    """Returns what a model's mask adds from one key to the next, `[H]`."""
    device = next(maker.parameters()).device
    training, maker.training = maker.training, True
    try:
        # In evaluation these models cache their mask.
        with torch.no_grad():
            mask: Tensor = maker.get_alibi_mask(torch.zeros(1, 4, 1, device=device), 4)  # type: ignore[operator]
    finally:
        maker.training = training
    return (mask[:, -1, -1] - mask[:, -1, -2]).double().cpu()


def adapt(
    model: nn.Module,
    custom: CustomAttention,
    installed: InstalledAttention,
    changes: Installation,
) -> None:
    """Overrides the forward of attention modules, and the methods that make their masks.

    Args:
        model: a transformers model.
        custom: its modules.
        installed: the model's attention, which they call from now on.
        changes: restores the modules.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = ALL_ATTENTION_FUNCTIONS[installed.implementation]
    # Built before anything is set: a module that can't be adapted raises.
    overrides: list[tuple[nn.Module, str, Any]] = []
    for module in custom.fused.values():
        overrides.append((module, "forward", _Fused(module, model, attend, custom.has_alibi)))
    for outer, core in custom.cores.values():
        overrides.append((core, "forward", _Core(core, model, attend, outer)))
    for module in model.modules():
        for name in filter(partial(hasattr, module), _MASK_METHODS):
            overrides.append((module, name, _MaskMethod(stock_method(module, name))))
    for target, name, function in overrides:
        changes.set(target, name, function)
    changes.hooks(
        holder.register_forward_pre_hook(_pass_mask, with_kwargs=True)
        for holder in _holders(model, custom)
    )


def _holders(model: nn.Module, custom: CustomAttention) -> Iterator[nn.Module]:
    """Yields the modules that pass a mask to their layers, and make none for a batch without
    padding.
    """
    inside = {core for _, core in custom.cores.values()}
    for module in model.modules():
        layers = [child for child in module.children() if isinstance(child, nn.ModuleList)]
        if "attention_mask" in parameters(module) and any(
            inside & set(child.modules()) for child in layers
        ):
            yield module


@dataclass(frozen=True)
class _Mask(DescribedMask):
    """The mask that layers of such models get, so that a checkpoint's recompute has the batch's
    description.
    """

    @property
    def shape(self) -> tuple[int]:
        """No mask's shape, so that models that cache a mask of the right shape make a new one."""
        return (0,)


def _pass_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    description = active_description()
    if description is None:
        return None
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    bound.arguments["attention_mask"] = _Mask(description)
    return bound.args[1:], bound.kwargs


class _NotCopied:
    """Refers to one module, which a deep copy of the module must not do."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise UnsupportedModelError(
            "a model that dispatch_modules changed can't be deep-copied. Copy it before, or call "
            "close() on what dispatch_modules returned."
        )


@dataclass(frozen=True)
class _MaskMethod(_NotCopied):
    """Overrides a model's method that makes a mask: `_Mask` for a sharded batch, the model's own
    for any other.
    """

    stock: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        description = active_description()
        return self.stock(*args, **kwargs) if description is None else _Mask(description)


class _Adapted(_NotCopied):
    """Overrides the forward of an attention module: ours on a sharded batch, its own on another.

    Args:
        module: whose forward it is.
        model: that it belongs to, whose attention was installed.
        attend: the installed attention function.
    """

    def __init__(self, module: nn.Module, model: nn.Module, attend: Callable[..., Any]) -> None:
        # It is an attribute of the module: a strong reference back would be a cycle.
        self._module, self._model, self.attend = weakref.ref(module), weakref.ref(model), attend
        self.stock = stock_method(module, "forward")
        self.has_attended = False

    @property
    def module(self) -> nn.Module:
        module = self._module()
        assert module is not None
        return module

    def description(self, mask: Any) -> SequenceDescription | None:
        """Returns the description of the batch that a module attends in, None for an ordinary one.

        Args:
            mask: the module's argument.

        Raises:
            UnsupportedModelError: this is a checkpoint's recompute, which does not know its batch.
        """
        description = mask.description if isinstance(mask, DescribedMask) else active_description()
        if description is None and self.has_attended and _private_api.is_in_backward():
            raise UnsupportedModelError(
                f"{type(self.module).__name__} is recomputed in the backward pass, where its batch "
                "is not known. Switch activation checkpointing off."
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
        out: Tensor = self.attend(
            self._model(), *heads, mask, dropout=dropout, alibi_slopes=slopes
        )[0]
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
                "position_ids or does not use apply_rotary_pos_emb. Use sp_size=1."
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Takes the arguments of the module's own forward."""
        arguments = self.signature.bind(self.module, *args, **kwargs).arguments
        description = self.description(arguments.get("attention_mask"))
        if description is None:
            return self.stock(*args, **kwargs)
        module: Any = self.module
        hidden: Tensor = arguments["hidden_states"]
        # [B, s, 3 * H * D] -> 3 times [B, H, s, D]
        packed = module.W_pack(hidden).unflatten(-1, (3, module.num_heads, module.head_dim))
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        if self.rotate is not None:
            longest = description.longest_position or 0
            cos, sin = module.rotary_emb(value, seq_len=longest + 1)
            query, key = self.rotate(query, key, cos, sin, arguments["position_ids"])
        slopes = None if self.slopes is None else self.slopes.to(hidden.device)
        return (
            module.o_proj(self.attention((query, key, value), description, slopes=slopes)),
            None,
            None,
        )


class _Core(_Adapted):
    """Attention between heads that another module projects, tokens first, keys repeated to all
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
                f"{description.shard_length} tokens were expected first. Use transformers' own "
                "model (GLM, GLM-4)."
            )
        # The module repeats key/value heads: only one of equal ones is sent.
        step = 1 if self.num_key_heads is None else key.shape[2] // self.num_key_heads
        # [s, B, H, D] -> [B, H, s, D]
        heads = tuple(
            t.permute(1, 2, 0, 3) for t in (query, key[:, :, ::step], value[:, :, ::step])
        )
        dropout = getattr(self.module, "attention_dropout", None)
        chance = dropout.p if isinstance(dropout, nn.Dropout) and self.module.training else 0.0
        return self.attention((heads[0], heads[1], heads[2]), description, chance).transpose(0, 1)
