"""YunChang's interface (long-context-attention 0.6) on this package's ring, Ulysses and unified
attention.

Names, signatures and token layouts are YunChang's, tensors are its `[B, s, H, D]`. What can't be
computed exactly is refused by the argument's name. Data parallelism needs nothing more: groups
and layouts are those of the ranks that share a sequence, whether ranks are counted in the world or
among these. Shapes: B = rows, S = tokens of the full sequence, H / K = query / key-value heads, U =
Ulysses ranks, R = ring ranks, P = U × R, s = S / P tokens, D / Dv = head sizes. Source: USP (arXiv
2405.07719), https://github.com/feifeibear/long-context-attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ulysses_accel.compat.yunchang.call import (
    LAYOUT_OF_IMPL,
    AttnType,
    attend,
    check_dims,
    check_kernel,
    layout_of,
)
from ulysses_accel.compat.yunchang.groups import (
    EXTRACT_FUNC_DICT,
    PROCESS_GROUP,
    basic_extract_local,
    chosen_groups,
    set_seq_parallel_pg,
    stripe_extract_local,
    zigzag_extract_local,
)
from ulysses_accel.errors import ShapeError
from ulysses_accel.sequence.layout import Layout

__all__ = [
    "AttnType",
    "EXTRACT_FUNC_DICT",
    "LongContextAttention",
    "LongContextAttentionQKVPacked",
    "PROCESS_GROUP",
    "RING_IMPL_DICT",
    "RING_IMPL_QKVPACKED_DICT",
    "UlyssesAttention",
    "basic_extract_local",
    "set_seq_parallel_pg",
    "stripe_extract_local",
    "zigzag_extract_local",
]


class LongContextAttention(nn.Module):
    """Unified attention on the groups that `set_seq_parallel_pg` chose, a drop-in for flash
    attention's function.

    Args:
        scatter_idx: the heads' dim, 2.
        gather_idx: the tokens' dim, 1.
        ring_impl_type: `basic`, `zigzag` or `strip`; tokens are distributed by the function of that
            name in `EXTRACT_FUNC_DICT`.
        use_pack_qkv: accepted and not needed: query, key and value are always one message.
        use_sync: accepted and not needed: the exchange is ordered with the compute.
        attn_type: the kernel; any exact one.
        attn_processor: refused.

    Raises:
        MeshError: there are no groups yet.
        ConfigError: dims or a type that are not known.
        UnsupportedModelError: a kernel that approximates.
    """

    def __init__(
        self,
        scatter_idx: int = 2,
        gather_idx: int = 1,
        ring_impl_type: str = "basic",
        use_pack_qkv: bool = False,
        use_sync: bool = False,
        attn_type: AttnType = AttnType.FA,
        attn_processor: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_dims(scatter_idx, gather_idx, heads_dim=2)
        check_kernel(attn_type, attn_processor)
        self.layout = layout_of(ring_impl_type)
        self.ulysses_pg, self.ring_pg = chosen_groups()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Tensor:
        """Computes exact attention over the full sequence.

        Args:
            query: `[B, s, H, D]`, this rank's tokens; U is at most H.
            key: `[B, s, K, D]`; K divides H.
            value: `[B, s, K, Dv]`.
            dropout_p: probability of dropping an attention weight, with a different mask on each
                rank.
            softmax_scale: factor on the scores; 1 / sqrt(D) when None.
            causal: whether a token attends only to itself and earlier tokens.
            window_size: tokens that one attends to before and after itself, (w, 0) or (w, w); -1
                for all; with `causal` none after.
            softcap: bound of the scores through tanh, 0 for none.
            alibi_slopes: refused.
            deterministic: on a GPU torch's setting must be on.
            return_attn_probs: refused.

        Returns:
            `[B, s, H, Dv]`, this rank's tokens.

        Raises:
            UnsupportedModelError: an argument requests what is not computed.
            ShapeError: heads or tokens that can't be partitioned, or shapes that don't fit each
                other.
        """
        return attend(
            query,
            key,
            value,
            self.ulysses_pg,
            self.ring_pg,
            self.layout,
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            return_attn_probs,
        )


class LongContextAttentionQKVPacked(nn.Module):
    """`LongContextAttention` on query, key and value in one tensor; arguments as there, with the
    heads' dim 3.
    """

    def __init__(
        self,
        scatter_idx: int = 3,
        gather_idx: int = 1,
        ring_impl_type: str = "basic",
        use_sync: bool = False,
        attn_type: AttnType = AttnType.FA,
    ) -> None:
        super().__init__()
        check_dims(scatter_idx, gather_idx, heads_dim=3)
        check_kernel(attn_type)
        self.layout = layout_of(ring_impl_type)
        self.ulysses_pg, self.ring_pg = chosen_groups()

    def forward(
        self,
        qkv: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Tensor:
        """Computes exact attention, `[B, s, 3, H, D]` -> `[B, s, H, D]`; arguments as
        `LongContextAttention`'s.
        """
        return attend(
            *_unpack(qkv),
            self.ulysses_pg,
            self.ring_pg,
            self.layout,
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            return_attn_probs,
        )


class UlyssesAttention(nn.Module):
    """Ulysses attention over one group, without a ring.

    Args:
        sequence_process_group: the ranks that share a sequence, in the order of its tokens; all
            ranks when None.
        scatter_idx: the heads' dim, 2.
        gather_idx: the tokens' dim, 1.
        use_sync: accepted and not needed.
        attn_type: the kernel; any exact one.
    """

    def __init__(
        self,
        sequence_process_group: ProcessGroup | None = None,
        scatter_idx: int = 2,
        gather_idx: int = 1,
        use_sync: bool = False,
        attn_type: AttnType = AttnType.FA,
    ) -> None:
        super().__init__()
        check_dims(scatter_idx, gather_idx, heads_dim=2)
        check_kernel(attn_type)
        self.spg = (
            sequence_process_group if sequence_process_group is not None else dist.group.WORLD
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Tensor:
        """Computes exact attention; arguments, result and errors are those of
        `LongContextAttention.forward`.
        """
        return attend(
            query,
            key,
            value,
            self.spg,
            None,
            "contiguous",
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            return_attn_probs,
        )


def _unpack(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ShapeError(
            f"qkv has shape {tuple(qkv.shape)}, not [B, s, 3, H, D]. With fewer key/value heads "
            "use the function or module that takes query, key and value separately."
        )
    query, key, value = qkv.unbind(2)
    return query, key, value


def _ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: ProcessGroup | None = None,
    attn_type: AttnType = AttnType.FA,
    attn_processor: nn.Module | None = None,
    *,
    layout: Layout,
) -> Tensor:
    """Ring attention `[B, s, H, D]` -> `[B, s, H, Dv]` over `group`, all ranks when None."""
    check_kernel(attn_type, attn_processor)
    return attend(
        q,
        k,
        v,
        None,
        group if group is not None else dist.group.WORLD,
        layout,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def _ring_packed(qkv: Tensor, *args: Any, layout: Layout, **kwargs: Any) -> Tensor:
    """Ring attention `[B, s, 3, H, D]` -> `[B, s, H, D]`; further arguments as `_ring`'s."""
    return _ring(*_unpack(qkv), *args, layout=layout, **kwargs)


RING_IMPL_DICT: Mapping[str, Callable[..., Tensor]] = {
    name: partial(_ring, layout=layout) for name, layout in LAYOUT_OF_IMPL.items()
}
RING_IMPL_QKVPACKED_DICT: Mapping[str, Callable[..., Tensor]] = {
    name: partial(_ring_packed, layout=LAYOUT_OF_IMPL[name])
    for name in ("basic", "zigzag", "strip")
}
