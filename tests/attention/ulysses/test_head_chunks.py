"""Ulysses in head chunks: exact for every head count, the same bytes, less memory, and the
arithmetic of the chunks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from benchmarks.counters import Counts, OperationCounter
from tests.attention.ring.test_ring import local_order
from tests.attention.ulysses.test_ulysses import reference
from tests.helpers.ranks import run_ranks
from ulysses_accel.attention import SequenceAttention, ulysses_attention, usp_attention
from ulysses_accel.attention.call import AttentionCall
from ulysses_accel.attention.heads import HeadSplit
from ulysses_accel.attention.ulysses.head_chunks import HeadChunks, min_head_chunks
from ulysses_accel.errors import ShapeError
from ulysses_accel.sequence.description import SequenceDescription

# Sums of at most 64 products of unit normals in another order: a few hundred ulps of float64.
TOLERANCE = 1e-12
HEADS = [(8, 8), (8, 4), (8, 2), (8, 1), (6, 2), (6, 3), (7, 7), (5, 1)]
LIMIT = 2**31


def fewest(split: HeadSplit) -> int:
    return min(split.counts(rank)[0] for rank in range(split.size))


def worst_error(heads: tuple[int, int], number: int, value_size: int, packed: bool) -> float:
    size, rank = dist.get_world_size(), dist.get_rank()
    length = 3 * size
    torch.manual_seed(0)
    shapes = ((heads[0], 4), (heads[1], 4), (heads[1], value_size), (heads[0], value_size))
    *inputs, weight = (torch.randn(2, n, length, d, dtype=torch.float64) for n, d in shapes)
    ids = torch.randint(0, 3, (2, length)).sort(dim=1).values if packed else None
    whole = [tensor.clone().requires_grad_() for tensor in inputs]
    expected = reference(*whole, ids, is_causal=True)
    (expected * weight).sum().backward()
    own = slice(rank * 3, rank * 3 + 3)
    local = [tensor[:, :, own].clone().requires_grad_() for tensor in inputs]
    out = ulysses_attention(*local, dist.group.WORLD, document_ids=ids, head_chunks=number)
    (out * weight[:, :, own]).sum().backward()
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(local, whole))]
    return max(float((a - b[:, :, own]).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_number_of_chunks_matches_one_process(size: int) -> None:
    cases = [
        (heads, number, value_size, packed)
        for heads in HEADS
        for number in range(2, fewest(HeadSplit(size, *heads)) + 1)
        for value_size, packed in ((4, False), (6, True))
    ]
    worst = run_ranks(lambda: [worst_error(*case) for case in cases], size)
    failed = [
        (case, errors) for case, *errors in zip(cases, *worst) if not max(errors) <= TOLERANCE
    ]
    assert not failed
    assert cases


def test_chunks_around_a_ring_with_sinks() -> None:
    def body() -> float:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "sp"))
        groups = mesh["sp"].get_group(), mesh["cp"].get_group()
        torch.manual_seed(0)
        inputs = [torch.randn(1, n, 32, 4, dtype=torch.float64) for n in (8, 2, 2)]
        sinks = torch.randn(8, dtype=torch.float64)
        own = local_order(32, 2, mesh["cp"].get_local_rank(), "zigzag").chunk(2)[
            mesh["sp"].get_local_rank()
        ]
        found = []
        for number in (1, 4):
            leaves = [tensor[:, :, own].clone().requires_grad_() for tensor in inputs] + [
                sinks.clone().requires_grad_()
            ]
            out = usp_attention(*leaves[:3], *groups, window=7, sinks=leaves[3], head_chunks=number)
            found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        return max(
            float((a - b).abs().max() / a.abs().max().clamp(min=1e-3)) for a, b in zip(*found)
        )

    assert max(run_ranks(body, 4)) <= TOLERANCE


def test_a_second_backward_and_a_checkpoint_give_the_same_gradients() -> None:
    def body() -> list[float]:
        torch.manual_seed(0)
        leaves = [
            torch.randn(1, n, 6, 4, dtype=torch.float64, requires_grad=True) for n in (8, 4, 4)
        ]

        def run(*tensors: Tensor) -> Tensor:
            return ulysses_attention(*tensors, dist.group.WORLD, head_chunks=3)

        out = run(*leaves)
        first = torch.autograd.grad(out.square().sum(), leaves, retain_graph=True)
        again = torch.autograd.grad(out.square().sum(), leaves)
        replayed = torch.autograd.grad(
            checkpoint(run, *leaves, use_reentrant=False).square().sum(), leaves
        )
        return [
            float((a - b).abs().max()) for other in (again, replayed) for a, b in zip(first, other)
        ]

    for differences in run_ranks(body, 2):
        assert differences == [0.0] * 6


def test_compiled_code_runs_the_chunks_outside_of_its_graphs() -> None:
    def body() -> float:
        leaves = [
            torch.randn(1, n, 6, 4, dtype=torch.float64, requires_grad=True) for n in (8, 4, 4)
        ]

        def run(*tensors: Tensor) -> Tensor:
            return ulysses_attention(*tensors, dist.group.WORLD, head_chunks=2) * 2

        runs = (run, torch.compile(run, backend="eager"))
        found = [torch.autograd.grad(attend(*leaves).square().sum(), leaves) for attend in runs]
        return max(float((a - b).abs().max()) for a, b in zip(*found))

    assert run_ranks(body, 2) == [0.0, 0.0]


TOKENS, SIZE = 64, 16


def measured(
    heads: tuple[int, int], number: int, run: Callable[..., Tensor], repeats: int
) -> list[list[int]]:
    """Returns (collectives, bytes sent, peak bytes) of forward and of backward, peaks in the best
    of the repeats.
    """
    leaves = [
        torch.randn(1, TOKENS, n, SIZE, requires_grad=True) for n in (heads[0], heads[1], heads[1])
    ]
    attention = SequenceAttention(dist.group.WORLD, head_chunks=number)
    length = TOKENS * dist.get_world_size()
    description = SequenceDescription(length, dist.get_world_size(), (((0, length),),))

    def attend(*tensors: Tensor) -> Tensor:
        return attention(
            *(tensor.transpose(1, 2) for tensor in tensors), description, AttentionCall()
        )

    gradient, counts = torch.randn(1, TOKENS, heads[0], SIZE), []
    # gloo's worker threads may hold a message a moment after its exchange, at random: the smallest
    # peak is without.
    for _ in range(repeats):
        with OperationCounter() as counter:
            out = run(attend, *leaves)
            forward = counter.take()
            gradients = torch.autograd.grad(out, leaves, gradient)
            backward = counter.take()
            del out, gradients
        counts.append((forward, backward))
    return [_figures([pair[way] for pair in counts]) for way in (0, 1)]


def _figures(counts: list[Counts]) -> list[int]:
    return [counts[0].collectives, counts[0].bytes_sent, min(count.peak_bytes for count in counts)]


def plain(attend: Callable[..., Tensor], *leaves: Tensor) -> Tensor:
    return attend(*leaves)


def checkpointed(attend: Callable[..., Tensor], *leaves: Tensor) -> Tensor:
    result: Tensor = checkpoint(attend, *leaves, use_reentrant=False)
    return result


@pytest.mark.parametrize("heads", [(16, 16), (16, 4), (16, 1)])
def test_the_same_bytes_in_more_messages(heads: tuple[int, int]) -> None:
    numbers = [1, 2, 4, 8]
    ranks = run_ranks(lambda: [measured(heads, number, plain, 1) for number in numbers], 2)
    unit = TOKENS * SIZE * 4
    expected = (2 * heads[0] + 2 * max(heads[1], 2)) // 2 * unit
    for found in ranks:
        for number, ways in zip(numbers, found):
            assert [way[:2] for way in ways] == [[2 * number, expected]] * 2


@pytest.mark.parametrize("heads", [(16, 16), (16, 4)])
def test_the_working_set_shrinks(heads: tuple[int, int]) -> None:
    """Peaks in u, one rank's query.

    A checkpointed forward saves nothing: beside the output (1 u), a chunk and the one on its way
        are alive, 13/n u of
    16 / 16 heads: its query, key and value (3) twice and once packed (9), its output, packed, and
    arrived before (4). The backward pass starts with what autograd saved and ends with the
    gradients of all; only the rest shrinks.
    """
    ranks = run_ranks(lambda: [measured(heads, number, checkpointed, 8) for number in (1, 4, 8)], 2)
    unit = TOKENS * SIZE * heads[0] * 4
    for once, four, eight in ranks:
        forward, backward = (
            [way[index][2] / unit for way in (once, four, eight)] for index in (0, 1)
        )
        assert forward[2] <= forward[1] <= forward[0]
        assert backward[2] < backward[0]
        if heads == (16, 16):
            assert forward[0] >= 6.0
            assert forward[1] <= 1 + 13 / 4 + 0.05
            assert forward[2] <= 1 + 13 / 8 + 0.05
            assert backward[2] <= 0.8 * backward[0]


def test_chunks_that_the_heads_do_not_permit_are_refused_on_every_rank() -> None:
    def body() -> str:
        tensors = [torch.randn(1, n, 4, 4) for n in (7, 7, 7)]
        with pytest.raises(ShapeError) as caught:
            ulysses_attention(*tensors, dist.group.WORLD, head_chunks=4)
        return str(caught.value)

    (message,) = set(run_ranks(body, 2))
    assert message == (
        "sp_head_chunks=4 can't split the 3 query heads of a rank (num_attention_heads=7 on "
        "sp_size=2). "
        "Use one of: 1, 2, 3."
    )
    with pytest.raises(ShapeError, match="sp_head_chunks=0"):
        HeadChunks(HeadSplit(2, 8, 8), 0)


def test_every_head_travels_once_in_whole_groups() -> None:
    for num_heads, num_kv, size in itertools.product(range(1, 17), range(1, 17), range(1, 9)):
        if num_heads % num_kv or size > num_heads:
            continue
        split = HeadSplit(size, num_heads, num_kv)
        for number in range(1, fewest(split) + 1):
            chunks = HeadChunks(split, number)
            queries = sorted(head for heads in chunks.all_queries() for head in range(*heads))
            assert queries == list(range(num_heads))
            sent = sorted(
                head
                for chunk in range(number)
                for heads in chunks.keys_in(chunk)
                for head in range(*heads)
            )
            assert sent == list(range(num_kv))
            for rank in range(size):
                assert_groups(chunks, rank, num_heads // num_kv)


def assert_groups(chunks: HeadChunks, rank: int, group: int) -> None:
    """Each chunk's query heads read the key heads that came with it, or the one that came last."""
    at_hand: set[int] = set()
    for chunk in range(chunks.number):
        fresh = set(range(*chunks.keys(chunk, rank)))
        at_hand = fresh or at_hand
        assert {head // group for head in range(*chunks.queries(chunk, rank))} == at_hand


@given(
    st.integers(1, 64), st.integers(1, 2**24), st.integers(1, 128), st.sampled_from((64, 128, 256))
)
def test_core_calls_stay_below_the_limit(batch: int, length: int, heads: int, size: int) -> None:
    number = min_head_chunks(batch, length, heads, size)
    assert 1 <= number <= heads
    head = batch * length * size
    if head < LIMIT:
        assert -(-heads // number) * head < LIMIT
        # And no smaller number does.
        assert number == 1 or -(-heads // (number - 1)) * head >= LIMIT
    else:
        assert number == heads


def test_published_sizes_of_core_calls() -> None:
    assert min_head_chunks(1, 2**20, 15, 128) == 1
    assert min_head_chunks(1, 2**20, 16, 128) == 2
    assert min_head_chunks(1, 2**23, 4, 128) == 4
