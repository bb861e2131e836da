"""Biases by distance: every strategy against a mask with all of them, and slopes against the models
that have them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from tests.attention.test_space import own_tokens
from tests.helpers.dense_attention import self_mask, token_documents
from tests.helpers.ranks import run_ranks
from ulysses_accel.attention import (
    SequenceAttention,
    ring_attention,
    ulysses_attention,
    usp_attention,
)
from ulysses_accel.attention.alibi import Alibi, alibi_slopes
from ulysses_accel.attention.call import AttentionCall
from ulysses_accel.attention.huggingface.call import ordinary
from ulysses_accel.attention.kernels.base import Block, BoundedKernel
from ulysses_accel.attention.kernels.choice import kernel_for
from ulysses_accel.attention.kernels.chunked import ChunkedKernel
from ulysses_accel.errors import ConfigError, ShapeError, UnsupportedModelError
from ulysses_accel.sequence.description import SequenceDescription
from ulysses_accel.sequence.layout import Layout

# Sums of at most 50 products of unit normals, merged in another order: a few hundred ulps of
# float64.
TOLERANCE = 1e-12
HEADS, LENGTH = (6, 2), 24
DOCUMENTS = (((0, 5), (5, 20)), ((3, 24),))
HOLES = ((), ((10, 12), (17, 18)))


@dataclass(frozen=True)
class Case:
    """What is attended to, and by whom."""

    cp: int
    sp: int
    layout: Layout = "contiguous"
    is_packed: bool = False
    window: int | None = None
    is_causal: bool = True
    prefixes: tuple[tuple[int, ...], ...] = ()
    exchange: str = "p2p"
    head_stride: int | None = None
    head_chunks: int = 1
    softcap: float | None = None

    @property
    def description(self) -> SequenceDescription:
        """Of two rows."""
        rows, holes = (DOCUMENTS, HOLES) if self.is_packed else ((((0, LENGTH),),) * 2, ())
        size = self.cp * self.sp
        return SequenceDescription(
            LENGTH, size, rows, self.cp, self.layout, holes=holes, prefixes=self.prefixes
        )


CASES = [
    Case(1, 1),
    Case(1, 1, is_packed=True, window=4),
    Case(1, 2),
    Case(1, 2, is_packed=True, head_chunks=2),
    Case(1, 2, is_causal=False, window=5),
    Case(1, 2, prefixes=((4,), (9,))),
    Case(2, 1, "zigzag"),
    Case(2, 1, "striped", is_packed=True, exchange="all_gather", head_stride=1),
    Case(1, 4, is_packed=True),
    Case(2, 2, "zigzag", is_packed=True, window=7, softcap=2.0),
    Case(4, 1, "zigzag", is_packed=True, exchange="all_gather", window=5),
    Case(4, 1, "contiguous", is_causal=False),
    Case(4, 1, "striped", window=3),
]


def written_down(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """All scores, with their biases and their mask."""
    groups, places = query.shape[1] // key.shape[1], torch.arange(LENGTH)
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) / query.shape[3] ** 0.5
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    scores = scores + alibi_slopes(HEADS[0])[:, None, None] * (places[None, :] - places[:, None])
    mask = self_mask(case.description, case.is_causal, case.window)
    sees = mask.any(2)[:, None, :, None]
    weights = (
        scores.masked_fill(~mask[:, None], -torch.inf)
        .masked_fill(~sees, 0.0)
        .softmax(3)
        .masked_fill(~sees, 0.0)
    )
    return weights @ value.repeat_interleave(groups, 1)


def inputs() -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    tensors = [
        torch.randn(2, heads, LENGTH, 4, dtype=torch.float64)
        for heads in (HEADS[0], HEADS[1], HEADS[1])
    ]
    return tensors, torch.randn(2, HEADS[0], LENGTH, 4, dtype=torch.float64)


def expected_of(case: Case) -> list[Tensor]:
    tensors, weight = inputs()
    whole = [tensor.requires_grad_() for tensor in tensors]
    out = written_down(case, *whole)
    counted = (token_documents(case.description) >= 0)[:, None, :, None]
    (out * weight * counted).sum().backward()
    grads = [tensor.grad for tensor in whole]
    return [(out * counted).detach(), *(grad for grad in grads if grad is not None)]


def errors(cases: list[Case], expected: list[list[Tensor]]) -> list[float]:
    tensors, weight = inputs()
    found = []
    for case, answer in zip(cases, expected):
        mesh = init_device_mesh("cpu", (case.cp, case.sp), mesh_dim_names=("cp", "sp"))
        attention = SequenceAttention(
            mesh["sp"].get_group(),
            mesh["cp"].get_group(),
            "sdpa",
            case.exchange,  # type: ignore[arg-type]
            case.head_stride,
            case.head_chunks,
        )
        own = own_tokens(case.description, mesh["cp"].get_local_rank(), mesh["sp"].get_local_rank())
        local = [tensor[:, :, own].clone().requires_grad_() for tensor in tensors]
        call = AttentionCall(
            case.is_causal, softcap=case.softcap, alibi_slopes=alibi_slopes(HEADS[0])
        )
        counted = (token_documents(case.description) >= 0)[:, None, own, None]
        out = attention(*local, case.description, call, case.window).transpose(1, 2) * counted
        (out * weight[:, :, own]).sum().backward()
        got = [out, *(tensor.grad for tensor in local if tensor.grad is not None)]
        pairs = list(zip(got, (tensor[:, :, own] for tensor in answer), strict=True))
        found.append(
            max(float((a - b).abs().max() / b.abs().max().clamp(min=1.0)) for a, b in pairs)
        )
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_strategy_adds_the_biases_of_the_row(size: int) -> None:
    cases = [case for case in CASES if case.cp * case.sp == size]
    for rank in run_ranks(errors, size, cases, [expected_of(case) for case in cases]):
        wrong = {
            case: error for case, error in zip(cases, rank, strict=True) if not error <= TOLERANCE
        }
        assert not wrong


def test_the_functions_take_slopes() -> None:
    def body() -> list[Tensor]:
        mesh = init_device_mesh("cpu", (2,))
        tensors, _ = inputs()
        group, own = (
            mesh.get_group(),
            [tensor.chunk(2, 2)[mesh.get_local_rank()] for tensor in tensors],
        )
        ring = partial(ring_attention, group=group, layout="contiguous")
        usp = partial(usp_attention, ulysses_group=group, ring_group=None)
        functions = (ring, usp, partial(ulysses_attention, group=group))
        return [function(*own, alibi_slopes=alibi_slopes(HEADS[0])) for function in functions]

    ranks = run_ranks(body, 2)
    expected = expected_of(Case(1, 2))[0]
    for parts in zip(*ranks, strict=True):
        torch.testing.assert_close(torch.cat(parts, 2), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("num_heads", [1, 2, 6, 8, 12])
def test_slopes_are_those_of_the_models(num_heads: int) -> None:
    slopes = alibi_slopes(num_heads).to(torch.float32)
    mask = torch.ones(1, 5, dtype=torch.int64)
    # Bloom counts from the first token on, MPT up to the last one: only differences count.
    for biases in (
        build_alibi_tensor(mask, num_heads, torch.float32).view(num_heads, 5),
        build_mpt_alibi_tensor(num_heads, 5).view(num_heads, 5),
    ):
        torch.testing.assert_close(
            biases.diff(dim=1), slopes[:, None].expand(-1, 4), rtol=1e-6, atol=0
        )


def test_distances_are_taken_before_they_are_rounded() -> None:
    """A million tokens into the row, float32 would be off by a sixteenth in slope times place."""
    alibi = Alibi(alibi_slopes(8), torch.tensor([2**20 + 3]), torch.tensor([2**20 + 1, 2**20 + 3]))
    exact = alibi_slopes(8)[:, None, None] * torch.tensor([-2.0, 0.0], dtype=torch.float64)
    assert torch.equal(alibi.bias(slice(0, 1), torch.float32).double(), exact)


def test_only_a_kernel_that_has_biases_is_chosen() -> None:
    query = torch.randn(1, 2, 4, 8)
    kernel = kernel_for(query, alibi=True)
    assert isinstance(kernel, BoundedKernel)
    assert isinstance(kernel.kernel, ChunkedKernel)
    with pytest.raises(
        UnsupportedModelError, match="block_kernel='cpu_flash' does not compute alibi_slopes"
    ):
        kernel_for(query, name="cpu_flash", alibi=True)


def test_calls_that_are_cut_keep_each_heads_biases() -> None:
    tensors, weight = inputs()
    block = Block(True, 0.5, alibi=Alibi(alibi_slopes(HEADS[0]), *[torch.arange(LENGTH)] * 2))
    cut, plain = BoundedKernel(ChunkedKernel(), limit=200), ChunkedKernel()
    (out, lse), (found, found_lse) = plain.forward(*tensors, block), cut.forward(*tensors, block)
    pairs = [(out, found), (lse, found_lse)]
    pairs += zip(
        plain.backward(weight, *tensors, out, lse, block),
        cut.backward(weight, *tensors, out, lse, block),
    )
    for expected, part in pairs:
        torch.testing.assert_close(part, expected, rtol=0, atol=TOLERANCE)


def test_a_batch_that_is_not_sharded_has_them_too() -> None:
    tensors, _ = inputs()
    module, extra = nn.Module(), {"dropout": 0.0, "scaling": None, "is_causal": None}
    slopes = {**extra, "alibi_slopes": alibi_slopes(HEADS[0])}
    out, _weights = ordinary("sdpa", module, tensors[0], tensors[1], tensors[2], None, slopes)
    expected = written_down(Case(1, 1), *tensors).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE)
    with pytest.raises(
        UnsupportedModelError, match="Module calls attention with alibi_slopes on a batch"
    ):
        ordinary(
            "sdpa",
            module,
            tensors[0],
            tensors[1],
            tensors[2],
            torch.ones(1, 1, LENGTH, LENGTH),
            slopes,
        )


def test_slopes_that_do_not_fit_are_refused() -> None:
    attention, query = SequenceAttention(None), torch.randn(1, 2, 4, 8)
    description = SequenceDescription(
        4, 1, (((0, 4),),), encoder=SequenceDescription(4, 1, (((0, 4),),))
    )
    with pytest.raises(ShapeError, match=r"alibi_slopes has shape \(3,\) for 2 query heads"):
        attention(query, query, query, description, AttentionCall(alibi_slopes=torch.ones(3)))
    with pytest.raises(UnsupportedModelError, match="alibi_slopes requires a gradient"):
        attention(
            query,
            query,
            query,
            description,
            AttentionCall(alibi_slopes=torch.ones(2, requires_grad=True)),
        )
    call = AttentionCall(alibi_slopes=torch.ones(2))
    with pytest.raises(ConfigError, match="alibi_slopes with cross-attention"):
        attention(query, query, query, description, call, crosses=True)
