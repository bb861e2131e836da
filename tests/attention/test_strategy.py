"""Unified attention (Ulysses within a ring) against one process in float64, over real 2-D
meshes.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.attention.ring.test_ring import HEADS, TOLERANCE, local_order, reference
from tests.attention.ulysses.test_ulysses import count_collectives
from tests.helpers.dense_attention import dense_attention
from tests.helpers.ranks import run_ranks
from ulysses_accel.attention import SequenceAttention, ulysses_attention, usp_attention
from ulysses_accel.attention.call import AttentionCall
from ulysses_accel.errors import ConfigError, ShapeError
from ulysses_accel.sequence.description import SequenceDescription
from ulysses_accel.sequence.layout import LAYOUTS, Layout

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
    own = local_order(length, ring, mesh["cp"].get_local_rank(), layout).chunk(ulysses)[
        mesh["sp"].get_local_rank()
    ]
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
    failed = [
        (case, errors) for case, *errors in zip(cases, *worst) if not max(errors) <= TOLERANCE
    ]
    assert not failed


def test_a_batch_of_another_layout_is_refused() -> None:
    def body() -> None:
        q = torch.randn(1, 4, 8, 4)
        attention = SequenceAttention(None, dist.group.WORLD)
        with pytest.raises(
            ShapeError, match="laid out for a ring of 1 ranks, this model's ring has 2"
        ):
            attention(q, q, q, SequenceDescription(16, 2, (((0, 16),),)), AttentionCall())

    run_ranks(body, 2)


def test_cross_attention_by_argument() -> None:
    """Keys of another length, sharded or whole on every rank: three collectives each way or none,
    exact.
    """

    def body(whole: bool) -> list[float]:
        rank, size = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(0)
        shapes = ((6, 4 * size), (3, 6 * size), (3, 6 * size))
        inputs = [
            torch.randn(2, *shape, 4, dtype=torch.float64, requires_grad=True) for shape in shapes
        ]
        sinks = torch.randn(6, dtype=torch.float64, requires_grad=True)
        mask = (torch.arange(6 * size) < torch.tensor([[6 * size], [5]]))[:, None].expand(
            -1, 4 * size, -1
        )
        expected = dense_attention(*inputs, mask, None, sinks)
        expected.square().sum().backward()
        rows = (((0, 6 * size),), ((0, 5),))
        keys = SequenceDescription(6 * size, 1 if whole else size, rows)
        parts = [(4, rank), (6 * size, 0) if whole else (6, rank)]
        own = [slice(n * place, n * (place + 1)) for n, place in (*parts, parts[1])]
        local = [
            tensor.detach()[:, :, tokens].clone().requires_grad_()
            for tensor, tokens in zip(inputs, own)
        ]
        own_sinks = sinks.detach().clone().requires_grad_()

        def call():
            return ulysses_attention(
                *local, dist.group.WORLD, sinks=own_sinks, key_description=keys
            )

        out, forward = count_collectives(call)
        _, backward = count_collectives(lambda: out.square().sum().backward())  # type: ignore[arg-type, return-value]
        assert (forward, backward) == ((0, 0) if whole else (3, 3))
        grads = [tensor.grad for tensor in (*local, own_sinks)]
        for shared in grads[1:] if whole else grads[3:]:
            dist.all_reduce(shared)
        wanted = [
            inputs[0].grad[:, :, own[0]],
            *(t.grad[:, :, own[1]] for t in inputs[1:]),
            sinks.grad,
        ]
        pairs = [(out, expected[:, :, own[0]]), *zip(grads, wanted)]
        return [float((a - b).detach().abs().max()) for a, b in pairs]

    for size in (2, 3):
        for whole in (False, True):
            assert max(max(errors) for errors in run_ranks(body, size, whole)) <= TOLERANCE


def test_cross_attention_that_does_not_fit_is_refused() -> None:
    def body() -> None:
        q, k = torch.randn(1, 4, 8, 4), torch.randn(1, 4, 6, 4)
        sharded, longer = (SequenceDescription(n, 2, (((0, n),),)) for n in (12, 16))

        def run(keys, **options):
            return ulysses_attention(q, k, k, dist.group.WORLD, key_description=keys, **options)

        assert run(sharded).shape == (1, 4, 8, 4)
        with pytest.raises(
            ShapeError, match="8 queries and 6 keys on a rank, of sequences described as 16 tokens"
        ):
            run(longer)
        with pytest.raises(ConfigError, match="window=3 with cross-attention is not computed"):
            run(sharded, window=3)
        with pytest.raises(ShapeError, match="2 rows, the one that reads it 1"):
            run(SequenceDescription(12, 2, (((0, 12),),) * 2))
        with pytest.raises(ShapeError, match="must agree in rows"):
            ulysses_attention(q, k, k, dist.group.WORLD)

    run_ranks(body, 2)


def test_blocks_drop_other_weights_on_each_ulysses_rank() -> None:
    """Ranks were seeded alike and have the same scores; their heads must not have the same mask."""

    def body() -> torch.Tensor:
        torch.manual_seed(0)
        q = torch.zeros(1, 2, 8, 16)
        v = torch.eye(16).chunk(2)[dist.get_rank()].expand(1, 2, -1, -1)
        return ulysses_attention(
            q, q, v, dist.group.WORLD, is_causal=False, window=15, softcap=2.0, dropout=0.5
        )

    first, _ = run_ranks(body, 2)
    assert 0 < int((first > 0).sum()) < first.numel()
    assert not torch.equal(first[:, 0], first[:, 1])
