"""Block kernels for CUDA: torch's flash, memory-efficient and cuDNN attention, and the flash-attn
packages'.

All take the log-sum-exp of the whole softmax in the backward pass. Shapes are those of
`BlockKernel`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ulysses_accel import _private_api
from ulysses_accel.attention.kernels.base import Block

# The memory-efficient backward reads the log-sum-exp in whole aligned rows of this many queries.
_LSE_ALIGNMENT = 32


def _repeated(query: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Returns keys or values `[B, K, k, D]` repeated to all heads, `[B, H, k, D]`."""
    return [
        tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in tensors
    ]


def _summed(grads: Any, num_key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients with those of repeated keys and values summed over each group, `[B, K,
    k, D]`.
    """
    key, value = (grad.unflatten(1, (num_key_heads, -1)).sum(dim=2) for grad in grads[1:3])
    return grads[0], key, value


class AtenFlash:
    """torch's flash attention; half precision."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, block: Block
    ) -> tuple[Tensor, Tensor]:
        result = _private_api.attention_operator("flash")(
            query, *_repeated(query, key, value), 0.0, block.is_causal, False, scale=block.scale
        )
        return result[0], result[1][..., : query.shape[2]]

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        block: Block,
    ) -> tuple[Tensor, Tensor, Tensor]:
        seed = torch.zeros(2, dtype=torch.uint64, device=query.device)
        grads = _private_api.attention_operator("flash_backward")(
            grad,
            query,
            *_repeated(query, key, value),
            out,
            lse.contiguous(),
            None,
            None,
            query.shape[2],
            key.shape[2],
            0.0,
            block.is_causal,
            seed,
            seed,
            scale=block.scale,
        )
        return _summed(grads, key.shape[1])


class AtenEfficient:
    """torch's memory-efficient attention; half precision and float32, any head size."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, block: Block
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _private_api.attention_operator("efficient")(
            query,
            *_repeated(query, key, value),
            None,
            True,
            0.0,
            block.is_causal,
            scale=block.scale,
        )
        return out, lse[..., : query.shape[2]]

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        block: Block,
    ) -> tuple[Tensor, Tensor, Tensor]:
        seed = torch.zeros((), dtype=torch.int64, device=query.device)
        lse = F.pad(lse, (0, -lse.shape[2] % _LSE_ALIGNMENT), value=torch.inf)
        grads = _private_api.attention_operator("efficient_backward")(
            grad,
            query,
            *_repeated(query, key, value),
            None,
            out,
            lse.contiguous(),
            seed,
            seed,
            0.0,
            [True, True, True, False],
            block.is_causal,
            scale=block.scale,
        )
        return _summed(grads, key.shape[1])


class AtenCudnn:
    """cuDNN's attention through torch; half precision. Its log-sum-exp has a last dim of one."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, block: Block
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _private_api.attention_operator("cudnn")(
            query,
            *_repeated(query, key, value),
            None,
            True,
            0.0,
            block.is_causal,
            False,
            scale=block.scale,
        )
        return out, lse.reshape(query.shape[:3])

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        block: Block,
    ) -> tuple[Tensor, Tensor, Tensor]:
        seed = torch.zeros((), dtype=torch.int64, device=query.device)
        grads = _private_api.attention_operator("cudnn_backward")(
            grad,
            query,
            *_repeated(query, key, value),
            out,
            lse.unsqueeze(-1).contiguous(),
            seed,
            seed,
            None,
            None,
            None,
            query.shape[2],
            key.shape[2],
            0.0,
            block.is_causal,
            scale=block.scale,
        )
        return _summed(grads, key.shape[1])


@dataclass(frozen=True)
class FlashAttn2:
    """The flash-attn package from 2.7 on; half precision, soft caps, heads grouped by the kernel.

    Args:
        softcap: bound of the scores through tanh; None for no bound.
    """

    softcap: float | None = None

    def _options(self, block: Block) -> dict[str, Any]:
        return {
            "dropout_p": 0.0,
            "softmax_scale": block.scale,
            "causal": block.is_causal,
            "window_size_left": -1,
            "window_size_right": -1,
            "softcap": self.softcap or 0.0,
            "alibi_slopes": None,
        }

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, block: Block
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        out, lse, *_ = _private_api.flash_attn_2("forward")(
            q=q, k=k, v=v, return_softmax=False, **self._options(block)
        )
        return out.transpose(1, 2), lse

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        block: Block,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _package_backward(
            _private_api.flash_attn_2("backward"),
            (grad, query, key, value, out, lse),
            {"deterministic": False, **self._options(block)},
        )


@dataclass(frozen=True)
class FlashAttn3:
    """The flash-attn 3 package for Hopper; half precision, soft caps, heads grouped by the kernel.

    Args:
        softcap: bound of the scores through tanh; None for no bound.
    """

    softcap: float | None = None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, block: Block
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        out, lse, *_ = _private_api.flash_attn_3("forward")(
            q=q,
            k=k,
            v=v,
            softmax_scale=block.scale,
            causal=block.is_causal,
            softcap=self.softcap or 0.0,
        )
        return out.transpose(1, 2), lse

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        block: Block,
    ) -> tuple[Tensor, Tensor, Tensor]:
        function = _private_api.flash_attn_3("backward")
        # Releases of flash-attn 3 differ in this one name.
        names = _private_api.parameter_names(function)
        causal = "is_causal" if "is_causal" in names else "causal"
        options = {
            "softmax_scale": block.scale,
            causal: block.is_causal,
            "softcap": self.softcap or 0.0,
        }
        return _package_backward(function, (grad, query, key, value, out, lse), options)


def _package_backward(
    function: Callable[..., Any], tensors: tuple[Tensor, ...], options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs a package's backward, which takes `[B, S, H, D]` and fills the gradients that it is
    given.
    """
    grad, query, key, value, out = (tensor.transpose(1, 2).contiguous() for tensor in tensors[:5])
    grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
    function(
        dout=grad,
        q=query,
        k=key,
        v=value,
        out=out,
        softmax_lse=tensors[5].contiguous(),
        dq=grads[0],
        dk=grads[1],
        dv=grads[2],
        **options,
    )
    dq, dk, dv = (tensor.transpose(1, 2) for tensor in grads)
    return dq, dk, dv
