"""Block kernels: the plain one against torch's for CPU and against autograd; large calls are cut;
which is chosen.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.dense_attention import dense_attention
from ulysses_accel.attention.call import AttentionCall
from ulysses_accel.attention.core import bounded, sdpa
from ulysses_accel.attention.kernels.base import Block, BlockKernel, BoundedKernel, CPUKernel
from ulysses_accel.attention.kernels.choice import kernel_for
from ulysses_accel.attention.kernels.chunked import ChunkedKernel
from ulysses_accel.attention.kernels.cuda import AtenCudnn, AtenEfficient, AtenFlash
from ulysses_accel.attention.kernels.limits import halves, num_elements
from ulysses_accel.errors import ConfigError, UnsupportedModelError

# Sums of at most 16 products of unit normals in another order: some ulps of float64.
TOLERANCE = 1e-13


def draw(
    heads: tuple[int, int], lengths: tuple[int, int], batch: int = 2
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = (
        (heads[0], lengths[0]),
        (heads[1], lengths[1]),
        (heads[1], lengths[1]),
        (heads[0], lengths[0]),
    )
    q, k, v, grad = (torch.randn(batch, *shape, 4, dtype=torch.float64) for shape in shapes)
    return q, k, v, grad


@pytest.mark.parametrize(
    ("heads", "is_causal", "max_scores"),
    list(itertools.product([(4, 4), (6, 2), (3, 1)], [False, True], [1, 100, 2**24])),
)
def test_chunks_compute_what_torch_does(
    heads: tuple[int, int], is_causal: bool, max_scores: int
) -> None:
    q, k, v, grad = draw(heads, (7, 7 if is_causal else 5))
    block = Block(is_causal, 0.7)
    kernel, other = ChunkedKernel(max_scores=max_scores), CPUKernel()
    out, lse = kernel.forward(q, k, v, block)
    pairs = [(out, other.forward(q, k, v, block)[0]), (lse, other.forward(q, k, v, block)[1])]
    pairs += zip(
        kernel.backward(grad, q, k, v, out, lse, block),
        other.backward(grad, q, k, v, out, lse, block),
    )
    assert max(float((a - b).abs().max()) for a, b in pairs) <= TOLERANCE


@pytest.mark.parametrize("max_scores", [1, 2**24])
def test_soft_cap_matches_autograd(max_scores: int) -> None:
    q, k, v, grad = draw((6, 2), (5, 9))
    whole = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    expected = dense_attention(*whole, torch.ones(2, 5, 9, dtype=torch.bool), softcap=1.5)
    (expected * grad).sum().backward()
    kernel, block = ChunkedKernel(softcap=1.5, max_scores=max_scores), Block(False, 0.5)
    out, lse = kernel.forward(q, k, v, block)
    grads = kernel.backward(grad, q, k, v, out, lse, block)
    assert float((out - expected).detach().abs().max()) <= TOLERANCE
    assert max(float((a - b.grad).abs().max()) for a, b in zip(grads, whole)) <= TOLERANCE


def kept_weights(kernel: ChunkedKernel, q: Tensor, k: Tensor, block: Block) -> Tensor:
    """The weights with their dropout, `[B, H, q, k]`: the output for values that are unit
    vectors.
    """
    unit = torch.eye(k.shape[2], dtype=k.dtype).expand(*k.shape[:2], -1, -1)
    return kernel.forward(q, k, unit, block)[0]


@pytest.mark.parametrize("max_scores", [40, 2**24])
def test_dropout_masks_are_the_same_in_both_passes(max_scores: int) -> None:
    q, k, v, grad = draw((4, 2), (6, 8))
    kernel, block = ChunkedKernel(dropout=0.4, max_scores=max_scores), Block(False, 0.5, seed=7)
    plain = kept_weights(ChunkedKernel(), q, k, block)
    mask = kept_weights(kernel, q, k, block) / plain
    # Weights are dropped or made larger by 1 / (1 - 0.4), and both happen.
    assert torch.allclose(mask[mask > 0], torch.full((), 1 / 0.6, dtype=torch.float64))
    assert 0 < int((mask > 0).sum()) < mask.numel()
    whole = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    scores = whole[0] @ whole[1].repeat_interleave(2, 1).transpose(2, 3) * 0.5
    expected = (scores.softmax(dim=3) * mask) @ whole[2].repeat_interleave(2, 1)
    (expected * grad).sum().backward()
    out, lse = kernel.forward(q, k, v, block)
    assert float((lse - scores.logsumexp(dim=3)).detach().abs().max()) <= TOLERANCE
    grads = kernel.backward(grad, q, k, v, out, lse, block)
    # The mask is known from a quotient, which rounds it.
    assert max(float((a - b.grad).abs().max()) for a, b in zip(grads, whole)) <= 100 * TOLERANCE
    other = kept_weights(kernel, q, k, Block(False, 0.5, seed=8)) / plain
    assert not torch.equal(mask > 0, other > 0)


def test_dropout_keeps_the_mean() -> None:
    q, k, v, _ = draw((2, 2), (4, 16), batch=1)
    outs = [
        ChunkedKernel(dropout=0.3).forward(q, k, v, Block(False, 0.5, seed))[0]
        for seed in range(2000)
    ]
    expected = ChunkedKernel().forward(q, k, v, Block(False, 0.5))[0]
    stacked = torch.stack(outs)
    # The mean of 2000 draws lies within 6 of its standard deviations: one in 10^9 would not.
    assert bool(
        ((stacked.mean(dim=0) - expected).abs() <= 6 * stacked.std(dim=0) / 2000**0.5).all()
    )


@pytest.mark.parametrize(
    ("heads", "batch", "limit"),
    list(itertools.product([(6, 2), (5, 1), (4, 4)], [1, 3], [1, 60, 10**6])),
)
def test_large_calls_are_cut(heads: tuple[int, int], batch: int, limit: int) -> None:
    q, k, v, grad = draw(heads, (5, 7), batch)
    block = Block(False, 0.5)

    class Recording(CPUKernel):
        largest = 0

        def forward(
            self, query: Tensor, key: Tensor, value: Tensor, block: Block
        ) -> tuple[Tensor, Tensor]:
            Recording.largest = max(Recording.largest, num_elements(query, key))
            return super().forward(query, key, value, block)

    whole, cut = CPUKernel(), BoundedKernel(Recording(), limit)
    out, lse = whole.forward(q, k, v, block)
    pairs = [*zip(cut.forward(q, k, v, block), (out, lse))]
    pairs += zip(
        cut.backward(grad, q, k, v, out, lse, block), whole.backward(grad, q, k, v, out, lse, block)
    )
    core = bounded(sdpa, q, k, v, AttentionCall(False, 0.5), limit)
    assert max(float((a - b).abs().max()) for a, b in [*pairs, (core, out)]) <= TOLERANCE
    # One head of one row is the least; it has 7 keys of 4 numbers.
    assert Recording.largest <= max(limit, 7 * 4)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_halves_are_the_whole(batch: int, num_key_heads: int, group: int) -> None:
    query, key = (
        torch.zeros(batch, num_key_heads * group, 3, 2),
        torch.zeros(batch, num_key_heads, 4, 2),
    )
    parts = halves(query, key)
    assert bool(parts) == (query[:, :, 0, 0].numel() > 1)
    for rows, heads, keys in parts:
        query[rows, heads] += 1
        read = {head // group for head in range(num_key_heads * group)[heads]}
        assert read == set(range(num_key_heads)[keys])
        assert num_elements(query[rows, heads], key[rows, keys]) < num_elements(query, key)
    assert not parts or torch.equal(query, torch.ones_like(query))


def test_the_kernel_that_can_is_chosen() -> None:
    query = torch.zeros(1, 2, 4, 8)
    kinds = [kernel_for(query), kernel_for(query, softcap=2.0), kernel_for(query, dropout=0.1)]
    named = kernel_for(query, name="chunked")
    found = [kernel.kernel for kernel in [*kinds, named]]  # type: ignore[attr-defined]
    assert isinstance(found[0], CPUKernel)
    assert found[1:] == [ChunkedKernel(softcap=2.0), ChunkedKernel(dropout=0.1), ChunkedKernel()]


def test_kernels_that_can_not_are_refused() -> None:
    query = torch.zeros(1, 2, 4, 8)
    with pytest.raises(
        ConfigError, match=r"block_kernel='aten_flush' is not known. Did you mean 'aten_flash'"
    ):
        kernel_for(query, name="aten_flush")
    with pytest.raises(UnsupportedModelError, match="'aten_flash' runs on cuda, not on cpu"):
        kernel_for(query, name="aten_flash")
    with pytest.raises(
        UnsupportedModelError, match=r"'cpu_flash' does not compute softcap=2.0, dropout=0.0"
    ):
        kernel_for(query, softcap=2.0, name="cpu_flash")


@pytest.mark.parametrize("kernel", [AtenFlash(), AtenEfficient(), AtenCudnn()])
def test_cuda_kernels_fit_the_operators_of_this_torch(kernel: BlockKernel) -> None:
    """Without a GPU the operators still check their arguments and tell the shapes of what they
    would return.
    """
    q, k = (
        torch.empty(2, *shape, 64, device="meta", dtype=torch.bfloat16)
        for shape in ((8, 200), (2, 333))
    )
    out, lse = kernel.forward(q, k, k, Block(False, 0.1))
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:3], torch.float32)
    grads = kernel.backward(q, q, k, k, out, lse, Block(False, 0.1))
    assert [grad.shape for grad in grads] == [q.shape, k.shape, k.shape]
