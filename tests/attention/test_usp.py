"""Unified attention (Ulysses within a ring) against one process in float64, over real 2-D meshes."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.attention.test_ring import HEADS, TOLERANCE, local_order, reference
from tests.ranks import run_ranks
from ulysses_accel.attention import SequenceAttention, usp_attention
from ulysses_accel.attention.kernels import AttentionCall
from ulysses_accel.errors import ShapeError, UnsupportedModelError
from ulysses_accel.sequence import SequenceDescription
from ulysses_accel.sequence_layout import LAYOUTS, Layout

Case = tuple[Layout, str, tuple[int, int], bool, int | None, bool]


def worst_error(mesh: dist.DeviceMesh, case: Case) -> float:
    layout, exchange, (num_heads, num_kv), is_causal, window, packed = case
    ring, ulysses = mesh["cp"].size(), mesh["sp"].size()
    length = 16 * ring * ulysses
    torch.manual_seed(0)
    shapes = ((num_heads, 4), (num_kv, 4), (num_kv, 4), (num_heads, 4))
    *inputs, weight = (torch.randn(2, n, length, d, dtype=torch.float64) for n, d in shapes)
    ids = torch.randint(-1, 4, (2, length)).sort(dim=1).values if packed else None
    whole = [tensor.clone().requires_grad_() for tensor in inputs]
    expected = reference(*whole, ids, is_causal, window)
    (expected * weight).sum().backward()
    own = local_order(length, ring, mesh["cp"].get_local_rank(), layout).chunk(ulysses)[mesh["sp"].get_local_rank()]
    local = [tensor[:, :, own].clone().requires_grad_() for tensor in inputs]
    out = usp_attention(
        *local,
        mesh["sp"].get_group(),
        mesh["cp"].get_group(),
        is_causal=is_causal,
        window=window,
        document_ids=ids,
        layout=layout,
        exchange=exchange,
    )
    (out * weight[:, :, own]).sum().backward()
    errors = [(out - expected[:, :, own]).abs().max()]
    errors += [(a.grad - b.grad[:, :, own]).abs().max() for a, b in zip(local, whole)]
    return float(max(errors))


@pytest.mark.parametrize("shape", [(2, 2), (1, 4), (4, 1), (2, 1), (2, 4)])
def test_matches_one_process(shape: tuple[int, int]) -> None:
    draw = random.Random(1)
    cases: list[Case] = []
    for layout, exchange in itertools.product(LAYOUTS, ("p2p", "all_gather")):
        is_causal = draw.random() < 0.7
        window = draw.choice([None, 5]) if is_causal else None
        cases.append((layout, exchange, draw.choice(HEADS), is_causal, window, draw.random() < 0.5))

    def body() -> list[float]:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("cp", "sp"))
        return [worst_error(mesh, case) for case in cases]

    worst = run_ranks(body, shape[0] * shape[1], timeout=200)
    failed = [(case, errors) for case, *errors in zip(cases, *worst) if not max(errors) <= TOLERANCE]
    assert not failed


def test_what_a_ring_does_not_compute_is_refused() -> None:
    def body() -> None:
        q = torch.randn(1, 4, 8, 4)
        for extra in ({"dropout": 0.1}, {"softcap": 5.0}):
            with pytest.raises(UnsupportedModelError, match="Set them to 0 and None"):
                usp_attention(q, q, q, None, dist.group.WORLD, window=None, **extra)
        attention = SequenceAttention(None, dist.group.WORLD)
        with pytest.raises(ShapeError, match="laid out for a ring of 1 ranks, this model's ring has 2"):
            attention(q, q, q, SequenceDescription(16, 2, (((0, 16),),)), AttentionCall())

    run_ranks(body, 2)
