"""Ring attention against one process in float64: layouts, exchanges, windows, documents, head counts, bytes."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.ranks import run_ranks
from ulysses_accel.attention.plan import RingPlan
from ulysses_accel.attention.ring import ring_attention
from ulysses_accel.attention.tiles import LAYOUTS, multiple_of, runs
from ulysses_accel.errors import ConfigError

# Sums of at most 64 products of unit normals, merged in another order: a few hundred ulps of float64.
TOLERANCE = 1e-12
HEADS = [(8, 8), (8, 4), (8, 2), (8, 1), (6, 2), (5, 1)]
Case = tuple[str, str, int, tuple[int, int], int, bool, int | None, bool, int | None]


def reference(query: Tensor, key: Tensor, value: Tensor, ids: Tensor | None, is_causal: bool, window: int | None) -> Tensor:
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    mask = torch.ones(query.shape[0], length, length, dtype=torch.bool)
    if is_causal:
        mask = mask.tril()
    if window is not None:
        mask = mask.triu(1 - window)
    padding = torch.zeros(query.shape[0], length, dtype=torch.bool)
    if ids is not None:
        padding = ids < 0
        mask = mask & (ids[:, :, None] == ids[:, None, :])
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None])
    return out.masked_fill(padding[:, None, :, None], 0.0)


def local_order(length: int, size: int, rank: int, layout: str) -> Tensor:
    return torch.tensor([run.start + i * run.step for run in runs(length, size, rank, layout) for i in range(run.count)])


def worst_error(case: Case) -> float:
    layout, exchange, batch, (num_heads, num_kv), value_dim, is_causal, window, packed, stride = case
    size, rank = dist.get_world_size(), dist.get_rank()
    length = 6 * size if layout != "zigzag" else 8 * size
    torch.manual_seed(0)
    shapes = ((num_heads, 4), (num_kv, 4), (num_kv, value_dim), (num_heads, value_dim))
    *inputs, weight = (torch.randn(batch, n, length, d, dtype=torch.float64) for n, d in shapes)
    ids = torch.randint(-1, 4, (batch, length)).sort(dim=1).values if packed else None
    whole = [tensor.clone().requires_grad_() for tensor in inputs]
    expected = reference(*whole, ids, is_causal, window)
    (expected * weight).sum().backward()
    own = local_order(length, size, rank, layout)
    local = [tensor[:, :, own].clone().requires_grad_() for tensor in inputs]
    out = ring_attention(
        *local,
        dist.group.WORLD,
        layout=layout,
        exchange=exchange,
        is_causal=is_causal,
        window=window,
        document_ids=ids,
        head_stride=stride,
    )
    (out * weight[:, :, own]).sum().backward()
    errors = [(out - expected[:, :, own]).abs().max()]
    errors += [(a.grad - b.grad[:, :, own]).abs().max() for a, b in zip(local, whole)]
    return float(max(errors))


def draw_cases(number: int) -> list[Case]:
    draw = random.Random(0)
    cases: list[Case] = []
    for layout in LAYOUTS:
        for exchange in ("p2p", "all_gather"):
            for _ in range(number):
                is_causal = draw.random() < 0.7
                window = draw.choice([None, 1, 3, 7, 20]) if is_causal else None
                stride = draw.choice([None, 1]) if exchange == "all_gather" else None
                cases.append(
                    (
                        layout,
                        exchange,
                        draw.choice([1, 2]),
                        draw.choice(HEADS),
                        draw.choice([4, 3]),
                        is_causal,
                        window,
                        draw.random() < 0.5,
                        stride,
                    )
                )
    return cases


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_matches_one_process(size: int) -> None:
    cases = draw_cases(12)
    worst = run_ranks(lambda: [worst_error(case) for case in cases], size, timeout=200)
    failed = [(case, errors) for case, *errors in zip(cases, *worst) if not max(errors) <= TOLERANCE]
    assert not failed
