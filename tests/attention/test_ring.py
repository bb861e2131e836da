"""Ring attention against one process in float64: layouts, exchanges, windows, documents, head counts, bytes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.ranks import run_ranks
from ulysses_accel.attention.plan import RingPlan
from ulysses_accel.attention.ring import ring_attention
from ulysses_accel.errors import ConfigError, ShapeError
from ulysses_accel.sequence_layout import LAYOUTS, ring_order, runs

# Sums of at most 64 products of unit normals, merged in another order: a few hundred ulps of float64.
TOLERANCE = 1e-12
HEADS = [(8, 8), (8, 4), (8, 2), (8, 1), (6, 2), (5, 1)]
Case = tuple[str, str, int, tuple[int, int], int, bool, int | None, bool, int | None]


def reference(
    query: Tensor, key: Tensor, value: Tensor, ids: Tensor | None, is_causal: bool, window: int | None
) -> Tensor:
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
    return torch.tensor(
        [run.start + i * run.step for run in runs(length, size, rank, layout) for i in range(run.count)]
    )


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


def sent_tokens(layout: str, exchange: str, window: int | None) -> tuple[float, float]:
    """Tokens whose key and value (or their gradients) this rank sends, forward and backward."""
    local = [torch.randn(1, 1, 8, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def record(function: Callable[[], Tensor | None]) -> tuple[Any, float]:
        with torch.profiler.profile(record_shapes=True) as profile:
            result = function()
        sent = [math.prod(e.input_shapes[0]) for e in profile.events() if e.name in ("gloo:send", "gloo:all_to_all")]
        return result, sum(sent) / (2 * 4)

    out, forward = record(
        lambda: ring_attention(*local, dist.group.WORLD, layout=layout, exchange=exchange, window=window)
    )
    _, backward = record(lambda: out.sum().backward())
    return forward, backward


@pytest.mark.parametrize(
    ("layout", "exchange", "window", "forward", "backward"),
    [
        # 4 ranks with 8 tokens: a full rotation sends 3 times all 32 tokens, and gradients take as many hops.
        ("contiguous", "p2p", None, 96, 192),
        ("striped", "p2p", None, 96, 192),
        # Causal zigzag drops the halves that nobody needs: 0.75 of it.
        ("zigzag", "p2p", None, 72, 144),
        ("zigzag", "all_gather", None, 72, 144),
        # A window of 3 needs the two tokens before a rank's first one, which 3 ranks send.
        ("contiguous", "all_gather", 3, 6, 12),
    ],
)
def test_sends_only_what_is_needed(
    layout: str, exchange: str, window: int | None, forward: float, backward: float
) -> None:
    sent = run_ranks(lambda: sent_tokens(layout, exchange, window), 4)
    assert sum(rank[0] for rank in sent) == forward
    assert sum(rank[1] for rank in sent) == backward


def test_low_precision_error_does_not_grow_with_the_ring() -> None:
    """bfloat16 against float64 of the same inputs; blocks merge in float32, so one rounding at the end dominates."""

    def error() -> list[float]:
        size, rank = dist.get_world_size(), dist.get_rank()
        torch.manual_seed(0)
        inputs = [torch.randn(1, 4, 64, 16).bfloat16() for _ in range(3)]
        whole = [tensor.double().requires_grad_() for tensor in inputs]
        expected = reference(*whole, None, True, None)
        expected.square().sum().backward()
        own = local_order(64, size, rank, "zigzag")
        local = [tensor[:, :, own].clone().requires_grad_() for tensor in inputs]
        out = ring_attention(*local, dist.group.WORLD)
        out.square().sum().backward()
        pairs = [(out, expected[:, :, own]), *((a.grad, b.grad[:, :, own]) for a, b in zip(local, whole))]
        return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]

    worst = {size: [max(errors) for errors in zip(*run_ranks(error, size))] for size in (1, 2, 4)}
    # bfloat16 has 8 bits: 2^-8 is one rounding. Forward stays there; gradients add the rounding of each block's part.
    assert all(errors[0] <= 2**-8 for errors in worst.values())
    assert all(max(errors) <= 2**-6 for errors in worst.values())
    assert max(worst[4]) <= 1.5 * max(worst[1])


def test_illegal_arguments_are_refused() -> None:
    def body() -> None:
        q = torch.randn(1, 4, 8, 4)
        with pytest.raises(ConfigError, match="exchange='carrier pigeon'"):
            ring_attention(q, q, q, dist.group.WORLD, exchange="carrier pigeon")
        with pytest.raises(ShapeError, match="3 key/value heads do not divide 4"):
            ring_attention(q, q[:, :3], q[:, :3], dist.group.WORLD)
        with pytest.raises(ShapeError, match="Describe the whole sequence"):
            ring_attention(q, q, q, dist.group.WORLD, document_ids=torch.zeros(1, 7))

    run_ranks(body, 1)


def test_plan_sizes_agree_between_sender_and_reader() -> None:
    rows = (((0, 5), (5, 24)),)
    plans = [RingPlan(24, 3, rank, "zigzag", rows, True, 6) for rank in range(3)]
    for reader in plans:
        for source in plans:
            assert reader.incoming[source.rank] == source.outgoing[reader.rank]
    assert torch.equal(ring_order(24, 3, "zigzag"), torch.cat([local_order(24, 3, r, "zigzag") for r in range(3)]))
