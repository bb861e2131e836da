"""Ulysses attention against one process in float64: outputs and gradients, all head counts,
documents, sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.ranks import run_ranks
from ulysses_accel.attention import ulysses_attention
from ulysses_accel.attention.heads import HeadSplit
from ulysses_accel.attention.ulysses.exchange import head_to_seq, seq_to_head
from ulysses_accel.errors import ShapeError
from ulysses_accel.sequence.description import SequenceDescription

# Sums of at most 64 products of unit normals in another order: a few hundred ulps of float64.
TOLERANCE = 1e-12
HEADS = [(8, 8), (8, 4), (8, 2), (8, 1), (4, 4), (6, 2), (6, 3), (5, 1), (7, 7)]


def reference(
    query: Tensor, key: Tensor, value: Tensor, ids: Tensor | None, is_causal: bool
) -> Tensor:
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    mask = torch.ones(query.shape[0], length, length, dtype=torch.bool)
    if is_causal:
        mask = mask.tril()
    if ids is not None:
        mask = mask & (ids[:, :, None] == ids[:, None, :])
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None])


def worst_error(
    batch: int, heads: tuple[int, int], value_size: int, is_causal: bool, packed: bool, core: str
) -> float:
    size, rank = dist.get_world_size(), dist.get_rank()
    length, head_size = 6 * size, 4
    torch.manual_seed(0)
    num_heads, num_kv = heads
    shapes = (
        (num_heads, head_size),
        (num_kv, head_size),
        (num_kv, value_size),
        (num_heads, value_size),
    )
    *inputs, weight = (torch.randn(batch, n, length, d, dtype=torch.float64) for n, d in shapes)
    ids = torch.randint(0, 4, (batch, length)).sort(dim=1).values if packed else None

    whole = [tensor.clone().requires_grad_() for tensor in inputs]
    expected = reference(*whole, ids, is_causal)
    (expected * weight).sum().backward()

    own = slice(rank * 6, rank * 6 + 6)
    local = [tensor[:, :, own].clone().requires_grad_() for tensor in inputs]
    out = ulysses_attention(
        *local, dist.group.WORLD, is_causal=is_causal, document_ids=ids, core=core
    )
    (out * weight[:, :, own]).sum().backward()
    errors = [(out - expected[:, :, own]).abs().max()]
    errors += [(a.grad - b.grad[:, :, own]).abs().max() for a, b in zip(local, whole)]
    return float(max(errors))


def count_collectives(function: Callable[[], Tensor]) -> tuple[Tensor, int]:
    with torch.profiler.profile() as profile:
        result = function()
    return result, sum(
        event.count for event in profile.key_averages() if event.key.startswith("c10d::")
    )


@pytest.mark.parametrize("size", [2, 4])
def test_matches_one_process(size: int) -> None:
    cases = list(
        itertools.product([1, 2], HEADS, [4, 6], [True, False], [True, False], ["sdpa", "eager"])
    )
    worst = run_ranks(lambda: [worst_error(*case) for case in cases], size, timeout=300)
    failed = [
        (case, error)
        for case, *errors in zip(cases, *worst)
        for error in errors
        if not error <= TOLERANCE
    ]
    assert not failed


def test_exchanges_are_adjoint_and_inverse() -> None:
    def body() -> list[float]:
        torch.manual_seed(dist.get_rank())
        tensors = [
            torch.randn(2, n, 6, d, dtype=torch.float64, requires_grad=True)
            for n, d in ((4, 3), (2, 3), (2, 5))
        ]
        whole = seq_to_head(*tensors, dist.group.WORLD)
        weights = [torch.randn_like(tensor) for tensor in whole]
        left = sum((a * b).sum() for a, b in zip(whole, weights))
        left.backward()
        right = sum((tensor * tensor.grad).sum() for tensor in tensors)
        sums = torch.stack([left.detach(), right.detach()])
        dist.all_reduce(sums)
        back = head_to_seq(whole[0].detach(), dist.group.WORLD).transpose(1, 2)
        return [float((sums[0] - sums[1]).abs()), float((back - tensors[0]).abs().max())]

    for adjoint_gap, round_trip_gap in run_ranks(body, 2):
        assert adjoint_gap <= TOLERANCE * 100
        assert round_trip_gap == 0.0


def test_two_collectives_each_way() -> None:
    """The layer's budget: one collective for query, key and value together and one for the output,
    both ways.
    """

    def body() -> list[int]:
        tensors = [torch.randn(1, 4, 6, 4, requires_grad=True) for _ in range(3)]
        out, forward = count_collectives(lambda: ulysses_attention(*tensors, dist.group.WORLD))
        _, backward = count_collectives(lambda: out.sum().backward())
        return [forward, backward]

    assert run_ranks(body, 2) == [[2, 2], [2, 2]]


def test_dropout_differs_between_ranks_and_is_replayed() -> None:
    def body() -> list[Tensor]:
        from torch.utils.checkpoint import checkpoint

        torch.manual_seed(0)
        tensors = [torch.ones(1, 2, 8, 4, requires_grad=True) for _ in range(3)]
        grads, outs = [], []
        for use_checkpoint in (False, True):
            torch.manual_seed(0)

            def run(q, k, v):
                return ulysses_attention(q, k, v, dist.group.WORLD, dropout=0.5, is_causal=False)

            out = (
                checkpoint(run, *tensors, use_reentrant=False) if use_checkpoint else run(*tensors)
            )
            grads.append(torch.autograd.grad(out.square().sum(), tensors[2])[0])
            outs.append(out.detach())
        assert torch.equal(grads[0], grads[1])
        return [outs[0][0, 0], outs[0][0, 1]]

    (first_head, second_head), _ = run_ranks(body, 2)
    assert not torch.equal(first_head, second_head)


def test_more_ranks_than_heads_are_refused() -> None:
    with pytest.raises(
        ShapeError, match=r"sp_size=6 is more than num_attention_heads=4.* Use sp_size=4 at most"
    ):
        HeadSplit(6, 4, 2)
    with pytest.raises(
        ShapeError, match="num_key_value_heads=3 does not divide num_attention_heads=8"
    ):
        HeadSplit(2, 8, 3)


def test_heads_are_dealt_once_in_whole_groups() -> None:
    for num_heads, num_kv in itertools.product(range(1, 25), range(1, 25)):
        if num_heads % num_kv:
            continue
        for size in range(1, num_heads + 1):
            split = HeadSplit(size, num_heads, num_kv)
            queries = [head for rank in range(size) for head in range(*split.queries(rank))]
            assert queries == list(range(num_heads))
            for rank in range(size):
                group = num_heads // num_kv
                needed = {head // group for head in range(*split.queries(rank))}
                assert needed == set(range(*split.keys(rank)))
                assert len(needed) == 1 or split.counts(rank)[0] == group * len(needed)


def test_description_must_be_of_this_batch() -> None:
    def body() -> str:
        q = torch.randn(1, 2, 4, 4)
        with pytest.raises(ShapeError, match=r"each batch (again|anew)") as caught:
            ulysses_attention(
                q, q, q, dist.group.WORLD, document_ids=SequenceDescription(6, 2, (((0, 6),),))
            )
        return str(caught.value)

    assert len(set(run_ranks(body, 2))) == 1


def test_document_ids_describe_holes_and_padding() -> None:
    ids = torch.tensor([[-1, 3, 3, -1, 5, 5, 7, -1]])
    assert SequenceDescription.from_document_ids(ids, 2).rows == (((1, 3), (4, 6), (6, 7)),)
