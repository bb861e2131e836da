"""YunChang on a CPU: its package as it is, around a `flash_attn` that torch's CPU kernel stands in
for.

YunChang needs `flash_attn`, which needs a GPU. Its messages, buffers and merging are its own; the
block kernel is the one that everybody else here has.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.contenders import Attend, Case

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _kernel_forward(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, **_: Any
) -> tuple[Tensor, Tensor, None, None]:
    """flash_attn's forward, `[B, s, N, D]`."""
    out, lse = _FORWARD(*(t.transpose(1, 2) for t in (q, k, v)), 0.0, causal, scale=softmax_scale)
    return out.transpose(1, 2), lse, None, None


def _kernel_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> None:
    """flash_attn's backward, `[B, s, N, D]`, which writes into the three buffers that it is
    given.
    """
    *buffers, _, scale, causal = rest[:6]
    tensors = [tensor.transpose(1, 2) for tensor in (grad, q, k, v, out)]
    for buffer, part in zip(buffers, _BACKWARD(*tensors, lse, 0.0, causal, scale=scale)):
        buffer.copy_(part.transpose(1, 2))


def _import_yunchang() -> Any:
    """Imports YunChang with the stand-in in place; nobody else gets to see it."""
    package, interface = (
        types.ModuleType("flash_attn"),
        types.ModuleType("flash_attn.flash_attn_interface"),
    )
    functions = {"_flash_attn_forward": _kernel_forward, "_flash_attn_backward": _kernel_backward}
    unused = dict.fromkeys(
        ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward", "flash_attn_func")
    )
    vars(interface).update(functions | unused)
    vars(package).update(__version__="2.8.3", flash_attn_func=None, flash_attn_interface=interface)
    stand_ins = {"flash_attn": package, "flash_attn.flash_attn_interface": interface}
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("yunchang")
    finally:
        for name in stand_ins:
            del sys.modules[name]


def build_yunchang(_case: Case, kind: str, ring_size: int) -> Attend:
    """YunChang's `LongContextAttention` with a ring of `ring_size` and Ulysses over the rest of the
    world.
    """
    yunchang = _import_yunchang()
    world, rank = dist.get_world_size(), dist.get_rank()
    yunchang.set_seq_parallel_pg(world // ring_size, ring_size, rank, world)
    attention = yunchang.LongContextAttention(ring_impl_type=kind)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # It takes [B, S/P, N, D], which the projections' output is once more after a transpose.
        output: Tensor = attention(*(t.transpose(1, 2) for t in (query, key, value)), causal=True)
        return output

    return attend
