"""Ring attention against other projects' code: their token orders, their outputs and their
gradients.

ring-attention-pytorch (Phil Wang), YunChang and torch's own context parallelism were written by
others from the same papers, so agreement here is not our arithmetic agreeing with itself. Values in
float32: at most 64 products of unit normals in another order, some ten float32 roundings of 6e-8
relative to the largest value.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ring_attention_pytorch.ring_flash_attention import ring_flash_attn_
from torch import Tensor
from torch.distributed.tensor.experimental._context_parallel._load_balancer import (
    _HeadTailLoadBalancer,
)
from yunchang import EXTRACT_FUNC_DICT, set_seq_parallel_pg

from benchmarks.ring.torch_ring import torch_ring
from tests.attention.ring.test_ring import local_order
from tests.helpers.ranks import run_ranks
from ulysses_accel.attention.ring.attention import ring_attention
from ulysses_accel.sequence.layout import Layout, ring_order

SINGLE_TOLERANCE = 1e-6
LENGTH, BATCH, HEAD_DIM = 64, 2, 16
HEADS = ((4, 4), (4, 2))
YUNCHANG_LAYOUTS: dict[str, Layout] = {
    "basic": "contiguous",
    "zigzag": "zigzag",
    "strip": "striped",
}


@pytest.mark.parametrize(("size", "part"), list(itertools.product((1, 2, 3, 4, 8), (1, 2, 5))))
def test_zigzag_is_torchs_head_tail_order(size: int, part: int) -> None:
    length = 2 * size * part
    theirs = _HeadTailLoadBalancer(length, size, "cpu")._generate_indices().flatten()
    ours = ring_order(length, size, "zigzag")
    assert torch.equal(torch.arange(length) if ours is None else ours, theirs)
    back = _HeadTailLoadBalancer(length, size, "cpu")._generate_indices(restore=True).flatten()
    assert torch.equal(theirs[back], torch.arange(length))


def yunchang_differences() -> list[str]:
    """Layouts and splits whose tokens on this rank are not those that YunChang's own package
    extracts.
    """
    rank, world_size, found = dist.get_rank(), dist.get_world_size(), []
    value = torch.arange(LENGTH).expand(1, LENGTH)
    for (kind, layout), ring in itertools.product(YUNCHANG_LAYOUTS.items(), (1, 2, 4)):
        ulysses = world_size // ring
        set_seq_parallel_pg(ulysses, ring, rank, world_size)
        theirs = EXTRACT_FUNC_DICT[kind](value, rank, world_size, rd=ring, ud=ulysses).flatten()
        ours = local_order(LENGTH, ring, rank // ulysses, layout).chunk(ulysses)[rank % ulysses]
        if not torch.equal(ours, theirs):
            found.append(f"{kind} {ring} × {ulysses}: {ours.tolist()} != {theirs.tolist()}")
    return found


def test_layouts_are_those_of_yunchangs_package() -> None:
    assert run_ranks(yunchang_differences, 4) == [[]] * 4


Values = list[Tensor]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def draw(heads: tuple[int, int]) -> Values:
    """Returns whole query, key, value `[B, N, S, D]` and the output's gradient."""
    torch.manual_seed(0)
    counts = (heads[0], heads[1], heads[1], heads[0])
    return [torch.randn(BATCH, count, LENGTH, HEAD_DIM) for count in counts]


def values_of(attention: Attention, whole: Values, positions: Tensor) -> Values:
    """Returns output and gradients of query, key and value for the tokens at `positions`."""
    local = [tensor[:, :, positions].clone().requires_grad_() for tensor in whole[:3]]
    out = attention(*local)
    (out * whole[3][:, :, positions]).sum().backward()
    return [out.detach(), *(tensor.grad for tensor in local if tensor.grad is not None)]


def ours(layout: Layout, is_causal: bool, exchange: Any = "p2p") -> Attention:
    return lambda q, k, v: ring_attention(
        q, k, v, dist.group.WORLD, layout=layout, is_causal=is_causal, exchange=exchange
    )


def their_ring(
    layout: Layout, is_causal: bool, bucket: int = LENGTH, in_ring: bool = True
) -> Attention:
    """Returns ring-attention-pytorch's blockwise attention `[B, N, s, D]`, on all ranks or on
    one.
    """

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # It pairs query head h with key head h mod K, transformers with h // (H / K): the query
        # heads change places.
        groups = query.shape[1] // key.shape[1]
        query = query.unflatten(1, (-1, groups)).transpose(1, 2).flatten(1, 2)
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        out = ring_flash_attn_(
            q, k, v, None, is_causal, bucket, in_ring, layout == "striped", None, None, False, 50.0
        )
        heads: Tensor = out.transpose(1, 2).unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)
        return heads

    return attention


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def errors_beside_ring_attention_pytorch() -> dict[str, float]:
    """Our relative differences from it on this rank.

    Its ring on CPU hands wrong gradients of keys and values home (it takes the two buffers of a
    pass for those of key and value), so these come from the same blocks, `LENGTH / R` tokens each,
    on one process.
    """
    size, rank = dist.get_world_size(), dist.get_rank()
    found = {}
    layouts: tuple[tuple[Layout, bool], ...] = (
        ("contiguous", False),
        ("contiguous", True),
        ("striped", True),
    )
    for (layout, is_causal), heads in itertools.product(layouts, HEADS):
        whole, own = draw(heads), local_order(LENGTH, size, rank, layout)
        mine = values_of(ours(layout, is_causal), whole, own)
        ring = values_of(their_ring(layout, is_causal), whole, own)
        blocks = values_of(
            their_ring("contiguous", is_causal, LENGTH // size, in_ring=False),
            whole,
            torch.arange(LENGTH),
        )
        theirs = [ring[0], ring[1], blocks[2][:, :, own], blocks[3][:, :, own]]
        for name, actual, expected in zip(
            ("output", "query", "key", "value"), mine, theirs, strict=True
        ):
            found[f"{layout} causal={is_causal} {heads} {name}"] = relative(actual, expected)
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_values_are_those_of_ring_attention_pytorch(size: int) -> None:
    for errors in run_ranks(errors_beside_ring_attention_pytorch, size):
        assert len(errors) == 3 * len(HEADS) * 4
        assert not {name: error for name, error in errors.items() if not error <= SINGLE_TOLERANCE}


def errors_beside_torch() -> dict[str, float]:
    """Our relative differences from torch's context parallelism on this rank."""
    size, rank = dist.get_world_size(), dist.get_rank()
    layouts: tuple[Layout, ...] = ("zigzag", "contiguous")
    found = {}
    for exchange, layout, heads in itertools.product(("p2p", "all_gather"), layouts, HEADS):
        chosen = {"zigzag": layout == "zigzag", "gathers": exchange == "all_gather"}
        whole, own = draw(heads), local_order(LENGTH, size, rank, layout)
        mine = values_of(ours(layout, True, exchange), whole, own)
        theirs = values_of(partial(torch_ring, group=dist.group.WORLD, **chosen), whole, own)
        for name, actual, expected in zip(
            ("output", "query", "key", "value"), mine, theirs, strict=True
        ):
            found[f"{layout} {exchange} {heads} {name}"] = relative(actual, expected)
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_values_are_those_of_torchs_context_parallelism(size: int) -> None:
    for errors in run_ranks(errors_beside_torch, size):
        assert len(errors) == 2 * 2 * len(HEADS) * 4
        assert not {name: error for name, error in errors.items() if not error <= SINGLE_TOLERANCE}
