"""Block kernels on a CUDA device, one rank: documents, windows and grouped heads against float64 on the CPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.attention.test_ring import reference
from ulysses_accel.attention.plan import RingPlan
from ulysses_accel.attention.ring import attend_in_ring

# bfloat16 keeps 8 bits; inputs, scores' probabilities, outputs and gradients are each rounded once or twice.
TOLERANCE = 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize(("window", "packed", "heads"), itertools.product([None, 64], [False, True], [(8, 8), (8, 2)]))
def test_tiles_match_float64(window: int | None, packed: bool, heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    shapes = [(1, heads[0], 512, 64), (1, heads[1], 512, 64), (1, heads[1], 512, 64)]
    inputs = [torch.randn(shape).bfloat16() for shape in shapes]
    rows = (((0, 100), (100, 333), (333, 512)),) if packed else (((0, 512),),)
    ids = torch.zeros(1, 512)
    for index, (start, stop) in enumerate(rows[0]):
        ids[0, start:stop] = index
    whole = [tensor.double().requires_grad_() for tensor in inputs]
    expected = reference(*whole, ids, True, window)
    expected.square().sum().backward()
    local = [tensor.cuda().requires_grad_() for tensor in inputs]
    plan = RingPlan(512, 1, 0, "contiguous", rows, True, window)
    out = attend_in_ring(*local, None, plan, scale=None, exchange="p2p")
    out.square().sum().backward()
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(local, whole))]
    assert all((a.cpu().double() - b).norm() <= TOLERANCE * b.norm() for a, b in pairs)
