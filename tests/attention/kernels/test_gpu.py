"""Block kernels on a CUDA device, one rank: each against the plain one, and whole calls against
float64 on the CPU.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.dense_attention import cross_mask, dense_attention, self_mask
from ulysses_accel.attention.call import AttentionCall
from ulysses_accel.attention.kernels.base import Block
from ulysses_accel.attention.kernels.choice import is_installed, kernel_for
from ulysses_accel.attention.kernels.chunked import ChunkedKernel
from ulysses_accel.attention.ring.attention import attend_in_ring
from ulysses_accel.attention.ring.plan import RingPlan
from ulysses_accel.sequence.description import SequenceDescription

# bfloat16 keeps 8 bits; inputs, scores' probabilities, outputs and gradients are each rounded once
# or twice.
HALF_TOLERANCE = 2e-2
# Matrix products may run in TF32, which keeps 10 bits.
SINGLE_TOLERANCE = 2e-3
PACKAGES = {
    "flash_attn_2": "flash_attn.flash_attn_interface",
    "flash_attn_3": "flash_attn_interface",
}
INSTALLED = [name for name, package in PACKAGES.items() if is_installed(package)]
KERNELS = [
    ("aten_flash", torch.bfloat16),
    ("aten_cudnn", torch.bfloat16),
    ("aten_efficient", torch.bfloat16),
]
KERNELS += [
    ("aten_efficient", torch.float32),
    ("chunked", torch.float32),
    ("chunked", torch.bfloat16),
]
KERNELS += [(name, torch.bfloat16) for name in INSTALLED]


def far_apart(pairs: Any, dtype: torch.dtype) -> list[float]:
    """Relative errors above the dtype's tolerance."""
    tolerance = {
        torch.bfloat16: HALF_TOLERANCE,
        torch.float32: SINGLE_TOLERANCE,
        torch.float64: 1e-12,
    }[dtype]
    both = [(a.detach().cpu().double(), b.detach().cpu().double()) for a, b in pairs]
    errors = [float((a - b).norm() / b.norm()) for a, b in both]
    return [error for error in errors if not error <= tolerance]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kernel", "heads", "lengths", "size"),
    list(itertools.product(KERNELS, [(8, 8), (8, 2)], [(300, 300), (200, 333)], [64, 128])),
)
def test_each_kernel_computes_what_the_plain_one_does(
    kernel: tuple[str, torch.dtype], heads: tuple[int, int], lengths: tuple[int, int], size: int
) -> None:
    name, dtype = kernel
    torch.manual_seed(0)
    counts = (
        (heads[0], lengths[0]),
        (heads[1], lengths[1]),
        (heads[1], lengths[1]),
        (heads[0], lengths[0]),
    )
    q, k, v, grad = (torch.randn(2, *count, size, device="cuda").to(dtype) for count in counts)
    block, plain = Block(lengths[0] == lengths[1], size**-0.5), ChunkedKernel()
    # The log-sum-exp and output of a softmax over more keys than the block has, as in a ring.
    more = [torch.cat([tensor, torch.randn_like(tensor)], dim=2).double() for tensor in (k, v)]
    whole, whole_lse = plain.forward(q.double(), *more, Block(False, block.scale))
    whole, whole_lse = whole.to(dtype), whole_lse.float()
    found = kernel_for(q, name=name)
    wide = [tensor.double() for tensor in (grad, q, k, v, whole, whole_lse)]
    pairs = [
        *zip(found.forward(q, k, v, block), plain.forward(*wide[1:4], block)),
        *zip(found.backward(grad, q, k, v, whole, whole_lse, block), plain.backward(*wide, block)),
    ]
    assert not far_apart(pairs, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["chunked", *INSTALLED])
def test_soft_caps(name: str) -> None:
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(1, 4, 256, 64, device="cuda").bfloat16() for _ in range(4))
    block, plain, kernel = (
        Block(True, 0.125),
        ChunkedKernel(softcap=1.0),
        kernel_for(q, softcap=1.0, name=name),
    )
    out, lse = plain.forward(q, k, v, block)
    pairs = [
        *zip(kernel.forward(q, k, v, block), (out, lse)),
        *zip(
            kernel.backward(grad, q, k, v, out.bfloat16(), lse, block),
            plain.backward(grad, q, k, v, out, lse, block),
        ),
    ]
    assert not far_apart(pairs, torch.bfloat16)


CASES: list[dict[str, Any]] = [
    {},
    {"window": 64},
    {"window": 64, "is_causal": False},
    {"documents": (((0, 100), (100, 333), (333, 500)),), "holes": (((120, 130),),)},
    {"prefixes": ((77,),)},
    {"has_sinks": True, "window": 33},
    {"softcap": 2.0},
    {"size": 40},
    {"size": 320},
    {"crosses": True},
]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "dtype"),
    list(itertools.product(CASES, [torch.bfloat16, torch.float32, torch.float64])),
)
def test_calls_match_float64(case: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    size, crosses, is_causal = (
        case.get("size", 64),
        case.get("crosses", False),
        case.get("is_causal", True),
    )
    rows = case.get("documents", (((0, 512),),))
    description = SequenceDescription(
        512, 1, rows, holes=case.get("holes", ()), prefixes=case.get("prefixes", ())
    )
    keys = SequenceDescription(300, 1, (((10, 290),),)) if crosses else None
    key_length = 300 if crosses else 512
    inputs = [
        torch.randn(1, n, length, size).to(dtype)
        for n, length in ((8, 512), (2, key_length), (2, key_length))
    ]
    sinks = torch.randn(8).to(dtype) if case.get("has_sinks") else None
    mask = (
        self_mask(description, is_causal, case.get("window"))
        if keys is None
        else cross_mask(description, keys)
    )
    whole = [
        tensor.double().requires_grad_()
        for tensor in [*inputs, *([] if sinks is None else [sinks])]
    ]
    expected = dense_attention(*whole[:3], mask, case.get("softcap"), *whole[3:])
    expected.square().sum().backward()
    local: list[Tensor] = [tensor.detach().to(dtype).cuda().requires_grad_() for tensor in whole]
    plan = RingPlan.of(description, 0, is_causal and not crosses, case.get("window"), keys)
    call = AttentionCall(softcap=case.get("softcap"))
    call = call if sinks is None else replace(call, sinks=local[3])
    out = attend_in_ring(*local[:3], None, plan, call=call)
    out.square().sum().backward()
    assert not far_apart(
        [(out, expected), *((a.grad, b.grad) for a, b in zip(local, whole))], dtype
    )


@pytest.mark.gpu
def test_dropout_is_the_same_in_both_passes() -> None:
    q, k, v, grad = (
        torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.float64) for _ in range(4)
    )
    kernel, block = kernel_for(q, dropout=0.3), Block(True, 0.125, seed=5)
    unit = torch.eye(64, device="cuda", dtype=torch.float64).expand(1, 2, -1, -1)
    weights, lse = kernel.forward(q, k, unit, block)
    out, _ = kernel.forward(q, k, v, block)
    _, _, grad_value = kernel.backward(grad, q, k, v, out, lse, block)
    assert not far_apart(
        [(out, weights @ v), (grad_value, weights.transpose(2, 3) @ grad)], torch.float64
    )
