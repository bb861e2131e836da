"""One call of YunChang's attention: what its arguments mean here, and which of them are refused.

Shapes: B = rows, s = this rank's tokens, H / K = query / key-value heads, D / Dv = head sizes.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ulysses_accel.attention import usp_attention
from ulysses_accel.errors import ConfigError, UnsupportedModelError, closest
from ulysses_accel.sequence.layout import Layout

LAYOUT_OF_IMPL: dict[str, Layout] = {
    "basic": "contiguous",
    "zigzag": "zigzag",
    "strip": "striped",
    "basic_pytorch": "contiguous",
}


class AttnType(Enum):
    """YunChang's names of attention kernels; exact ones all give the same numbers here, the others
    are refused.
    """

    AITER = "aiter"
    FA = "fa"
    FA3 = "fa3"
    FLASHINFER = "flashinfer"
    TORCH = "torch"
    TORCH_MATH = "torch_math"
    TORCH_FLASH = "torch_flash"
    TORCH_EFFICIENT = "torch_efficient"
    TORCH_CUDNN = "torch_cudnn"
    NPU = "npu"
    SAGE_AUTO = "sage_auto"
    SAGE_FP16 = "sage_fp16"
    SAGE_FP16_TRITON = "sage_fp16_triton"
    SAGE_FP8 = "sage_fp8"
    SAGE_FP8_SM90 = "sage_fp8_sm90"
    SPARSE_SAGE = "sparse_sage"

    @classmethod
    def from_string(cls, s: str) -> AttnType:
        """Returns the kernel of that value, `fa`, `torch_flash`, ...

        Raises:
            ConfigError: there is none.
        """
        for member in cls:
            if member.value == s:
                return member
        raise ConfigError(
            f"attn_type={s!r} is not known.{closest(s, [member.value for member in cls])}"
        )

    @property
    def is_exact(self) -> bool:
        """Whether the kernel computes attention itself, not a quantized or sparse approximation."""
        return "sage" not in self.value


def layout_of(ring_impl_type: str) -> Layout:
    """Returns the layout that a ring implementation works on.

    Raises:
        ConfigError: there is no implementation of that name.
    """
    if ring_impl_type not in LAYOUT_OF_IMPL:
        raise ConfigError(
            f"ring_impl_type={ring_impl_type!r} is not "
            f"known.{closest(ring_impl_type, LAYOUT_OF_IMPL)}"
        )
    return LAYOUT_OF_IMPL[ring_impl_type]


def check_kernel(attn_type: AttnType, attn_processor: Any = None) -> None:
    """Raises UnsupportedModelError for a kernel that is not exact, and for a processor in place of
    one.
    """
    if not attn_type.is_exact:
        raise UnsupportedModelError(
            f"attn_type={attn_type} approximates attention, which is not computed here. Use "
            "AttnType.FA."
        )
    if attn_processor is not None:
        raise UnsupportedModelError(
            f"attn_processor={type(attn_processor).__name__} is not run: blocks are computed by "
            "torch's kernels. Use attn_processor=None."
        )


def check_dims(scatter_idx: int, gather_idx: int, heads_dim: int) -> None:
    """Raises ConfigError unless heads are scattered and tokens gathered."""
    if (scatter_idx, gather_idx) != (heads_dim, 1):
        raise ConfigError(
            f"scatter_idx={scatter_idx}, gather_idx={gather_idx} are not computed: heads are dim "
            f"{heads_dim}, tokens dim 1. Use scatter_idx={heads_dim}, gather_idx=1."
        )


_REMEDIES = {
    "alibi_slopes": "Use alibi_slopes=None.",
    "return_attn_probs": "Use return_attn_probs=False: the full scores are never stored.",
    "deterministic": "Call torch.use_deterministic_algorithms(True), which torch's kernels follow.",
}


def _mask(causal: bool, window_size: tuple[int, int]) -> tuple[bool, int | None]:
    """Returns whether attention is causal, and its window as this package counts it; None for no
    window.

    flash attention counts the keys to the left and to the right of the query's position, -1 for
    all, and none to the right where it is causal.
    """
    left, right = window_size[0], 0 if causal else window_size[1]
    if min(window_size) >= -1 and right == 0:
        return True, None if left == -1 else left + 1
    if min(window_size) >= -1 and left == right:
        return False, None if left == -1 else left
    raise UnsupportedModelError(
        f"window_size={tuple(window_size)} with causal={causal} is not computed. Use (w, w), which "
        "lets a token attend to w tokens on either side, (w, 0), to w tokens before itself, or -1 "
        "instead of w for all."
    )


def _refuse(arguments: dict[str, Any], where: str) -> None:
    """Raises for the first argument that has a value."""
    for name, value in arguments.items():
        # A tensor of several elements has no truth value.
        if isinstance(value, Tensor) or value:
            shown = "a tensor" if isinstance(value, Tensor) else value
            raise UnsupportedModelError(
                f"{name}={shown} is not computed {where}. {_REMEDIES[name]}"
            )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ulysses_group: ProcessGroup | None,
    ring_group: ProcessGroup | None,
    layout: Layout,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """Runs unified attention, `[B, s, H, D]`, `[B, s, K, D]`, `[B, s, K, Dv]` -> `[B, s, H, Dv]`.

    Raises:
        UnsupportedModelError: an argument requests what is not computed.
    """
    is_causal, window = _mask(causal, window_size)
    _refuse(
        {"alibi_slopes": alibi_slopes, "return_attn_probs": return_attn_probs},
        "on a sharded sequence",
    )
    if query.device.type != "cpu" and not torch.are_deterministic_algorithms_enabled():
        _refuse({"deterministic": deterministic}, "by torch's kernels unless torch is set to")
    out = usp_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        ulysses_group,
        ring_group,
        is_causal=is_causal,
        window=window,
        scale=softmax_scale,
        dropout=dropout_p,
        softcap=softcap or None,
        layout=layout,
        # With a window only its halo is sent.
        exchange="p2p" if window is None else "all_gather",
    )
    return out.transpose(1, 2)
