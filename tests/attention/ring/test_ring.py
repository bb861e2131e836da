"""Ring attention against one process in float64: layouts, exchanges, windows, documents, head
counts, bytes.
"""

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

from benchmarks.counters import OperationCounter
from tests.helpers.dense_attention import dense_attention
from tests.helpers.ranks import run_ranks
from ulysses_accel.attention.ring.attention import attend_in_ring, ring_attention
from ulysses_accel.attention.ring.plan import RingPlan
from ulysses_accel.errors import ConfigError, ShapeError
from ulysses_accel.sequence.layout import LAYOUTS, ring_order, runs

# Sums of at most 64 products of unit normals, merged in another order: a few hundred ulps of
# float64.
TOLERANCE = 1e-12
HEADS = [(8, 8), (8, 4), (8, 2), (8, 1), (6, 2), (5, 1)]
Case = tuple[str, str, int, tuple[int, int], int, bool, int | None, bool, int | None]


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ids: Tensor | None,
    is_causal: bool,
    window: int | None,
) -> Tensor:
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    mask = torch.ones(query.shape[0], length, length, dtype=torch.bool)
    if is_causal:
        mask = mask.tril()
    if window is not None:
        mask = mask.triu(1 - window) if is_causal else mask.triu(-window).tril(window)
    padding = torch.zeros(query.shape[0], length, dtype=torch.bool)
    if ids is not None:
        padding = ids < 0
        mask = mask & (ids[:, :, None] == ids[:, None, :])
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None])
    return out.masked_fill(padding[:, None, :, None], 0.0)


def local_order(length: int, size: int, rank: int, layout: str) -> Tensor:
    return torch.tensor(
        [
            run.start + i * run.step
            for run in runs(length, size, rank, layout)
            for i in range(run.count)
        ]
    )


def worst_error(case: Case) -> float:
    layout, exchange, batch, (num_heads, num_kv), value_dim, is_causal, window, packed, stride = (
        case
    )
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
                window = draw.choice([None, 1, 3, 7, 20])
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
    failed = [
        (case, errors) for case, *errors in zip(cases, *worst) if not max(errors) <= TOLERANCE
    ]
    assert not failed


def sent_tokens(
    layout: str, exchange: str, window: int | None, **options: Any
) -> tuple[float, float]:
    """Tokens whose key and value (or their gradients) this rank sends, forward and backward."""
    local = [torch.randn(1, 1, 8, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def record(function: Callable[[], Tensor | None]) -> tuple[Any, float]:
        with torch.profiler.profile(record_shapes=True) as profile:
            result = function()
        sent = [
            math.prod(e.input_shapes[0])
            for e in profile.events()
            if e.name in ("gloo:send", "gloo:all_to_all")
        ]
        return result, sum(sent) / (2 * 4)

    out, forward = record(
        lambda: ring_attention(
            *local, dist.group.WORLD, layout=layout, exchange=exchange, window=window, **options
        )
    )
    _, backward = record(lambda: out.sum().backward())
    return forward, backward


@pytest.mark.parametrize(
    ("layout", "exchange", "window", "forward", "backward"),
    [
        # 4 ranks with 8 tokens: a full rotation sends 3 times all 32 tokens, and gradients take as
        # many hops.
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


def test_sends_what_both_sides_of_a_window_and_prefixes_need() -> None:
    two_sided = run_ranks(lambda: sent_tokens("contiguous", "all_gather", 3, is_causal=False), 4)
    # Three tokens from either side of each of the three cuts; gradients take the same way back.
    assert sum(rank[0] for rank in two_sided) == 18
    assert sum(rank[1] for rank in two_sided) == 36
    prefix = torch.tensor([5])
    halo = run_ranks(lambda: sent_tokens("contiguous", "all_gather", 3, prefix_lengths=prefix), 4)
    # The window's two tokens at each of three cuts, and five tokens of the prefix to three ranks.
    assert sum(rank[0] for rank in halo) == 6 + 15
    rotated = run_ranks(lambda: sent_tokens("zigzag", "p2p", None, prefix_lengths=prefix), 4)
    # A prefix is seen by ranks that zigzag would drop it for: all travels.
    assert sum(rank[0] for rank in rotated) == 96


def test_lengths_sinks_and_soft_cap_by_argument() -> None:
    """The arguments of the function mean what the dense reference computes with a mask of their
    own.
    """

    def body() -> float:
        size, rank = dist.get_world_size(), dist.get_rank()
        own = local_order(8 * size, size, rank, "zigzag")
        torch.manual_seed(0)
        whole = [
            torch.randn(2, n, 8 * size, 4, dtype=torch.float64).requires_grad_() for n in (4, 2, 2)
        ]
        sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
        lengths, places = torch.tensor([8 * size, 8 * size - 5]), torch.arange(8 * size)
        real = places < lengths[:, None]
        mask = ((places[:, None] >= places) | (places < 3)) & real[:, None, :] & real[:, :, None]
        expected = dense_attention(*whole, mask, 3.0, sinks)
        expected.square().sum().backward()
        local = [tensor.detach()[:, :, own].clone().requires_grad_() for tensor in whole]
        own_sinks = sinks.detach().clone().requires_grad_()
        prefix = torch.full((2,), 3)
        out = ring_attention(
            *local,
            dist.group.WORLD,
            key_lengths=lengths,
            prefix_lengths=prefix,
            sinks=own_sinks,
            softcap=3.0,
            block_kernel="chunked",
        )
        out.square().sum().backward()
        dist.all_reduce(own_sinks.grad)
        pairs = [(out, expected[:, :, own]), (own_sinks.grad, sinks.grad)]
        pairs += [(a.grad, b.grad[:, :, own]) for a, b in zip(local, whole)]
        return max(float((a - b).detach().abs().max()) for a, b in pairs)

    for size in (1, 3):
        assert max(run_ranks(body, size)) <= TOLERANCE


def test_dropout_is_replayed_and_differs_between_ranks() -> None:
    """Values are unit vectors, so that the output is the weights; keys are equal, so that all
    weights are.
    """

    def body() -> list[Tensor]:
        from torch.utils.checkpoint import checkpoint

        size = dist.get_world_size()
        torch.manual_seed(0)
        q, k = torch.zeros(2, 1, 2, 8, 8 * size, dtype=torch.float64).unbind(0)
        own = local_order(8 * size, size, dist.get_rank(), "zigzag")
        v = (
            torch.eye(8 * size, dtype=torch.float64)[own]
            .expand(1, 2, -1, -1)
            .clone()
            .requires_grad_()
        )
        run = lambda v: ring_attention(q, k, v, dist.group.WORLD, is_causal=False, dropout=0.5)  # noqa: E731
        outs, grads = [], []
        for again in (run, lambda v: checkpoint(run, v, use_reentrant=False)):
            torch.manual_seed(1)
            outs.append(again(v))
            grads.append(torch.autograd.grad(outs[-1].sum(), v)[0])
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(grads[0], grads[1])
        # What a token's value adds to the loss is the sum of its weights over all ranks' queries.
        total = outs[0].detach().sum(dim=2)
        dist.all_reduce(total)
        assert torch.allclose(grads[0][..., 0], total[:, :, own], rtol=1e-12)
        return [outs[0].detach() * 8 * size]

    weights = [rank[0] for rank in run_ranks(body, 2)]
    # Kept weights are doubled, and half of them are kept: 512 draws, 6 standard deviations.
    assert all(set(rank.round(decimals=9).unique().tolist()) == {0.0, 2.0} for rank in weights)
    assert all(abs(float(rank.mean()) - 1) < 6 / 256**0.5 for rank in weights)
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0][:, 0], weights[0][:, 1])


def test_dropout_gradients_match_finite_differences() -> None:
    def body() -> bool:
        torch.manual_seed(dist.get_rank())
        q, k, v = (
            torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)
        )

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            torch.manual_seed(0)
            return ring_attention(q, k, v, dist.group.WORLD, dropout=0.3, window=3, softcap=2.0)

        return torch.autograd.gradcheck(run, (q, k, v))

    assert run_ranks(body, 1) == [True]


def test_low_precision_error_does_not_grow_with_the_ring() -> None:
    """bfloat16 against float64 of the same inputs; blocks merge in float32, so one rounding at the
    end dominates.
    """

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
        pairs = [
            (out, expected[:, :, own]),
            *((a.grad, b.grad[:, :, own]) for a, b in zip(local, whole)),
        ]
        return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]

    worst = {size: [max(errors) for errors in zip(*run_ranks(error, size))] for size in (1, 2, 4)}
    # bfloat16 has 8 bits: 2^-8 is one rounding. Forward stays there; gradients add the rounding of
    # each block's part.
    assert all(errors[0] <= 2**-8 for errors in worst.values())
    assert all(max(errors) <= 2**-6 for errors in worst.values())
    assert max(worst[4]) <= 1.5 * max(worst[1])


def copied_heads(
    num_heads: int, num_key_heads: int, group: dist.ProcessGroup | None
) -> tuple[float, float]:
    """Bytes written besides the kernels', forward and backward, in heads of a rank's 8 tokens of
    size 64.
    """
    size = group.size() if group is not None else 1
    shapes = [(1, 8, n, 64) for n in (num_heads, num_key_heads, num_key_heads, num_heads)]
    *inputs, grad = (torch.randn(shape, dtype=torch.float64).transpose(1, 2) for shape in shapes)
    local = [tensor.requires_grad_() for tensor in inputs]
    rank = group.rank() if group is not None else 0
    plan = RingPlan(8 * size, size, rank, "zigzag", (((0, 8 * size),),), True)
    with OperationCounter() as counter:
        out = attend_in_ring(*local, group, plan)
        forward = counter.take()
        torch.autograd.grad(out, local, grad)
        backward = counter.take()
    unit = 8 * 64 * 8
    return forward.bytes_copied / unit, backward.bytes_copied / unit


def test_one_dense_document_costs_one_kernel_call() -> None:
    assert run_ranks(lambda: copied_heads(8, 2, None), 1) == [(0, 0)]


@pytest.mark.parametrize("num_key_heads", [8, 2])
def test_a_ring_copies_little(num_key_heads: int) -> None:
    """Keys and values are packed once; each further hop merges one output, and adds to one gradient
    of each kind.
    """
    copied = run_ranks(lambda: copied_heads(8, num_key_heads, dist.group.WORLD), 4)
    # The log-sum-exp is 1 / 64 of the output, and three numbers of it are written for a merge.
    assert max(rank[0] for rank in copied) <= 2 * num_key_heads + 3 * 8 * (1 + 3 / 64)
    # The busiest rank adds 16 + 16 + 8 heads on the way and 16 of what came home, with the fewest
    # key/value heads 4 times less, and to its queries' at most three times all 8.
    assert max(rank[1] for rank in copied) <= 7 * num_key_heads + 3 * 8


def test_illegal_arguments_are_refused() -> None:
    def body() -> None:
        q = torch.randn(1, 4, 8, 4)
        with pytest.raises(ConfigError, match="exchange='carrier pigeon'"):
            ring_attention(q, q, q, dist.group.WORLD, exchange="carrier pigeon")
        with pytest.raises(ShapeError, match="3 key/value heads do not divide 4"):
            ring_attention(q, q[:, :3], q[:, :3], dist.group.WORLD)
        with pytest.raises(ShapeError, match=r"each batch (again|anew)"):
            ring_attention(q, q, q, dist.group.WORLD, document_ids=torch.zeros(1, 7))

    run_ranks(body, 1)


def test_plan_sizes_agree_between_sender_and_reader() -> None:
    rows = (((0, 5), (5, 24)),)
    plans = [RingPlan(24, 3, rank, "zigzag", rows, True, 6) for rank in range(3)]
    for reader in plans:
        for source in plans:
            assert reader.incoming[source.rank] == source.outgoing[reader.rank]
    assert torch.equal(
        ring_order(24, 3, "zigzag"), torch.cat([local_order(24, 3, r, "zigzag") for r in range(3)])
    )
