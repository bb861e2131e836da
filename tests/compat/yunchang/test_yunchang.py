"""YunChang's interface: its token layouts to the integer, one process's numbers, and none of its
bugs Y1 to Y10.
"""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.attention.ring.test_ring import reference
from tests.helpers.dense_attention import dense_attention
from tests.helpers.ranks import run_ranks
from ulysses_accel.compat.yunchang import (
    EXTRACT_FUNC_DICT,
    PROCESS_GROUP,
    RING_IMPL_DICT,
    RING_IMPL_QKVPACKED_DICT,
    AttnType,
    LongContextAttention,
    LongContextAttentionQKVPacked,
    UlyssesAttention,
    set_seq_parallel_pg,
)
from ulysses_accel.errors import ConfigError, ShapeError

# Sums of at most 64 products of unit normals, merged in another order: a few hundred ulps of
# float64.
TOLERANCE = 1e-12
# The same for float32; YunChang's query gradients, rounded to bfloat16 on the way, are off by 4e-3.
SINGLE_TOLERANCE = 5e-6
RING_TYPES = ("basic", "zigzag", "strip")
# (Ulysses degree, ring degree) on 4 ranks: what is left over is data parallel.
SHAPES = ((1, 2), (2, 1), (2, 2), (1, 4), (4, 1))
LENGTH = 32


def place_of(rank: int, ud: int, rd: int, low: bool) -> tuple[int, int, int]:
    """(data parallel, ring, Ulysses) rank, as YunChang's document orders them."""
    data, place = divmod(rank, ud * rd)
    ring, ulysses = divmod(place, ud) if low else divmod(place, rd)[::-1]
    return data, ring, ulysses


def yunchang_positions(
    kind: str, length: int, ring: int, rd: int, ulysses: int, ud: int
) -> list[int]:
    """The tokens of one place by YunChang's definition, without any of the package's arithmetic."""
    tokens = list(range(length))
    if kind == "strip":
        part = [token for token in tokens if token % rd == ring]
    elif kind == "zigzag":
        chunk = length // (2 * rd)
        back = 2 * rd - 1 - ring
        part = tokens[ring * chunk : (ring + 1) * chunk] + tokens[back * chunk : (back + 1) * chunk]
    else:
        part = tokens[ring * (length // rd) : (ring + 1) * (length // rd)]
    size = len(part) // ud
    return part[ulysses * size : (ulysses + 1) * size]


@pytest.mark.parametrize("kind", EXTRACT_FUNC_DICT)
def test_extract_is_yunchangs_permutation_on_every_rank(kind: str) -> None:
    for ud, rd, data in itertools.product((1, 2, 3, 4), (1, 2, 3, 4), (1, 2)):
        size, length = ud * rd, 2 * ud * rd * 3
        value = torch.arange(2 * length * 3).view(2, length, 3)
        for rank in range(size * data):
            _, ring, ulysses = place_of(rank, ud, rd, low=True)
            own = yunchang_positions(kind, length, ring, rd, ulysses, ud)
            # Counted over all processes, and among the ranks that share a sequence.
            for counted, among in ((rank, size * data), (rank % size, size)):
                assert torch.equal(
                    EXTRACT_FUNC_DICT[kind](value, counted, among, rd, ud), value[:, own]
                )


def test_extract_takes_any_shape_dim_and_gradient() -> None:
    for shape, dim in (((2, 16), 1), ((2, 16, 3, 4, 5), 1), ((16, 2), 0)):
        value = torch.randn(shape, requires_grad=True)
        part = EXTRACT_FUNC_DICT["zigzag"](value, 1, 4, rd=2, ud=2, dim=dim)
        assert torch.equal(part, value.index_select(dim, torch.tensor([12, 13, 14, 15])))
        part.sum().backward()
        assert value.grad is not None
        assert int(value.grad.count_nonzero()) == part.numel()
    assert torch.equal(
        EXTRACT_FUNC_DICT["basic"](torch.arange(8).view(1, 8), 1, 4), torch.tensor([[2, 3]])
    )


def test_extract_refuses_what_does_not_fit() -> None:
    value = torch.zeros(1, 12)
    with pytest.raises(
        ShapeError,
        match=r"12 tokens can't be laid out zigzag over rd=4 × ud=1 ranks\. Pad it to 16",
    ):
        EXTRACT_FUNC_DICT["zigzag"](value, 0, 4, rd=4, ud=1)
    with pytest.raises(ConfigError, match="rank=0, world_size=4 do not fit rd=3 × ud=1"):
        EXTRACT_FUNC_DICT["strip"](value, 0, 4, rd=3, ud=1)
    with pytest.raises(ConfigError, match="rank=4, world_size=4"):
        EXTRACT_FUNC_DICT["basic"](value, 4, 4, rd=2, ud=2)


Attention = Callable[..., Tensor]


def worst_error(
    attention: Attention,
    kind: str,
    shape: tuple[int, int],
    heads: tuple[int, int],
    *,
    low: bool = True,
    window: int | None = None,
    dtype: torch.dtype = torch.float64,
    packed: bool = False,
    causal: bool = True,
    **options: Any,
) -> float:
    """The largest relative error of output and gradients against one process in float64, with
    tokens as extracted.
    """
    (ud, rd), rank, world_size = shape, dist.get_rank(), dist.get_world_size()
    data, ring, ulysses = place_of(rank, ud, rd, low)
    own = yunchang_positions(kind, LENGTH, ring, rd, ulysses, ud)
    # Each data parallel rank has a batch of its own.
    torch.manual_seed(data)
    inputs = [torch.randn(2, LENGTH, n, 4).to(dtype) for n in (heads[0], heads[1], heads[1])]
    weight = torch.randn(2, LENGTH, heads[0], 4).to(dtype)
    whole = [tensor.double().requires_grad_() for tensor in inputs]
    expected = reference(*(t.transpose(1, 2) for t in whole), None, causal, window).transpose(1, 2)
    (expected * weight).sum().backward()
    extract = EXTRACT_FUNC_DICT[kind]
    local = [
        extract(t, rank, world_size, rd=rd, ud=ud).detach().clone().requires_grad_() for t in inputs
    ]
    arguments = [torch.stack(local, dim=2)] if packed else local
    out = attention(
        *arguments,
        causal=causal,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        **options,
    )
    (out * extract(weight, rank, world_size, rd=rd, ud=ud)).sum().backward()
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(local, whole))]
    # Of one token's own window nothing but the value counts: the other gradients are zero, hence
    # the floor.
    return max(float((a - b[:, own]).abs().max() / b.abs().max().clamp(min=1)) for a, b in pairs)


def test_matches_one_process() -> None:
    """Every split, ring type, head ratio and mask; on (1, 2) and (2, 1) two data parallel ranks
    beside each other.
    """
    cases = list(
        itertools.product(SHAPES, (True, False), RING_TYPES, ((4, 4), (8, 2)), (True, False))
    )

    def body() -> list[float]:
        errors = []
        for shape, low, kind, heads, causal in cases:
            set_seq_parallel_pg(*shape, dist.get_rank(), dist.get_world_size(), use_ulysses_low=low)
            attention = LongContextAttention(ring_impl_type=kind)
            errors.append(worst_error(attention, kind, shape, heads, low=low, causal=causal))
        return errors

    failed = [
        (case, errors)
        for case, *errors in zip(cases, *run_ranks(body, 4))
        if not max(errors) <= TOLERANCE
    ]
    assert not failed


def test_packed_windowed_and_ring_only_match_one_process() -> None:
    def body() -> dict[str, float]:
        errors = {}
        for shape, kind in itertools.product(SHAPES, RING_TYPES):
            set_seq_parallel_pg(*shape, dist.get_rank(), dist.get_world_size())
            plain, packed = (
                LongContextAttention(2, 1, kind),
                LongContextAttentionQKVPacked(ring_impl_type=kind, use_sync=True),
            )
            errors[f"packed {shape} {kind}"] = worst_error(packed, kind, shape, (4, 4), packed=True)
            for window in (1, 5):
                errors[f"window {window} {shape} {kind}"] = worst_error(
                    plain, kind, shape, (4, 2), window=window
                )
            if shape[0] == 1:
                group = PROCESS_GROUP.RING_PG
                ring, both = RING_IMPL_DICT[kind], RING_IMPL_QKVPACKED_DICT[kind]
                errors[f"ring {shape} {kind}"] = worst_error(ring, kind, shape, (4, 2), group=group)
                errors[f"ring packed {shape} {kind}"] = worst_error(
                    both, kind, shape, (4, 4), group=group, packed=True
                )
        # Without a group the ring is of all ranks.
        set_seq_parallel_pg(1, 4, dist.get_rank(), 4)
        errors["world"] = worst_error(RING_IMPL_DICT["basic_pytorch"], "basic", (1, 4), (4, 2))
        return errors

    results = run_ranks(body, 4)
    assert not {
        name: worst
        for name in results[0]
        if not (worst := max(r[name] for r in results)) <= TOLERANCE
    }


def seen(causal: bool, window_size: tuple[int, int]) -> Tensor:
    """Which key `[LENGTH, LENGTH]` each query sees, by flash attention's definition."""
    left, right = window_size[0], 0 if causal else window_size[1]
    distance = torch.arange(LENGTH) - torch.arange(LENGTH)[:, None]
    mask = torch.ones_like(distance, dtype=torch.bool)
    mask &= (distance >= -left) if left >= 0 else True
    return mask & ((distance <= right) if right >= 0 else True)


def capped_error(
    kind: str, shape: tuple[int, int], causal: bool, window_size: tuple[int, int], softcap: float
) -> float:
    rank, mask = dist.get_rank(), seen(causal, window_size)[None].expand(2, -1, -1)
    torch.manual_seed(0)
    whole = [torch.randn(2, LENGTH, n, 4, dtype=torch.float64).requires_grad_() for n in (4, 2, 2)]
    expected = dense_attention(
        *(t.transpose(1, 2) for t in whole), mask, softcap or None
    ).transpose(1, 2)
    expected.square().sum().backward()
    extract = EXTRACT_FUNC_DICT[kind]
    set_seq_parallel_pg(*shape, rank, 4)
    local = [
        extract(t.detach(), rank, 4, rd=shape[1], ud=shape[0]).clone().requires_grad_()
        for t in whole
    ]
    out = LongContextAttention(ring_impl_type=kind)(
        *local, causal=causal, window_size=window_size, softcap=softcap
    )
    out.square().sum().backward()
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(local, whole))]
    own = extract(torch.arange(LENGTH)[None], rank, 4, rd=shape[1], ud=shape[0])[0]
    return max(
        float((a - b[:, own]).detach().abs().max() / b.detach().abs().max().clamp(min=1))
        for a, b in pairs
    )


def test_soft_caps_and_windows_match_one_process() -> None:
    """A ring computes the window on one side, on both and none, with and without a soft cap, as
    Ulysses alone does.
    """
    masks = [
        (True, (-1, -1)),
        (True, (4, 4)),
        (False, (4, 0)),
        (False, (-1, 0)),
        (False, (3, 3)),
        (False, (-1, -1)),
    ]
    shapes = list(zip([(1, 4), (2, 2), (4, 1)], RING_TYPES))
    cases = list(itertools.product(shapes, masks, (0.0, 2.0)))

    def body() -> list[float]:
        return [capped_error(kind, shape, *mask, softcap) for (shape, kind), mask, softcap in cases]

    failed = [
        (case, errors)
        for case, *errors in zip(cases, *run_ranks(body, 4))
        if not max(errors) <= TOLERANCE
    ]
    assert not failed


def y1(low: bool) -> float:
    """The kernel's name must not turn Ulysses attention into a ring over all processes."""
    shape = (2, 1)
    set_seq_parallel_pg(*shape, dist.get_rank(), 4, low)
    torch_types = [kind for kind in AttnType if kind.name.startswith("TORCH")]
    modules = [UlyssesAttention(PROCESS_GROUP.ULYSSES_PG, attn_type=kind) for kind in torch_types]
    return max(worst_error(module, "basic", shape, (4, 2), low=low) for module in modules)


def y2_y3() -> float:
    """torch's kernels give a log-sum-exp that merges, and a backward pass."""
    set_seq_parallel_pg(1, 4, dist.get_rank(), 4)
    exact = [kind for kind in AttnType if kind.is_exact]
    assert {AttnType.TORCH_MATH, AttnType.TORCH_CUDNN, AttnType.FA3} <= set(exact)
    return max(
        worst_error(LongContextAttention(attn_type=kind), "basic", (1, 4), (4, 2)) for kind in exact
    )


def y4() -> float:
    """Packed exchange works, with fewer key/value heads too."""
    set_seq_parallel_pg(2, 2, dist.get_rank(), 4)
    module = LongContextAttention(use_pack_qkv=True, ring_impl_type="zigzag")
    return max(worst_error(module, "zigzag", (2, 2), heads) for heads in ((4, 4), (4, 2)))


def y5() -> float:
    """FA3's name keeps causality, window and soft cap."""
    set_seq_parallel_pg(2, 2, dist.get_rank(), 4)
    module = LongContextAttention(ring_impl_type="strip", attn_type=AttnType.FA3)
    worst = max(worst_error(module, "strip", (2, 2), (4, 2), window=window) for window in (None, 3))
    set_seq_parallel_pg(4, 1, dist.get_rank(), 4)
    module = LongContextAttention(attn_type=AttnType.FA3)
    torch.manual_seed(0)
    query = torch.randn(1, 16, 4, 4, dtype=torch.float64) * 4
    scores = torch.einsum("bqhd,bkhd->bhqk", query, query) * 0.7
    scores = (3 * torch.tanh(scores / 3)).masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf)
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), query)
    own = query.chunk(4, dim=1)[dist.get_rank()]
    out = module(own, own, own, softmax_scale=0.7, causal=True, softcap=3.0)
    # The core takes its softmax in float32 at least.
    return max(worst, float((out - expected.chunk(4, dim=1)[dist.get_rank()]).abs().max()))


def y6_y7() -> float:
    """float32 gradients are float32's: no rounding on the way, no aliased accumulators, any ring
    size, 1 included.
    """
    worst = 0.0
    for shape in SHAPES:
        set_seq_parallel_pg(*shape, dist.get_rank(), 4)
        for kind in RING_TYPES:
            module = LongContextAttention(ring_impl_type=kind)
            worst = max(worst, worst_error(module, kind, shape, (4, 2), dtype=torch.float32))
    return worst


def y8() -> float:
    """No version of flash-attn is compared as a string: what is installed changes nothing."""
    set_seq_parallel_pg(2, 2, dist.get_rank(), 4)
    errors = []
    for version in ("2.6.3", "2.10.1"):
        sys.modules["flash_attn"] = types.ModuleType("flash_attn")
        sys.modules["flash_attn"].__version__ = version
        errors.append(worst_error(LongContextAttention(), "basic", (2, 2), (4, 2)))
    assert errors[0] == errors[1]
    return errors[0]


def y9() -> float:
    """With data parallelism, and with neighbours in the ring, `basic` and `strip` parts are where
    attention looks.
    """
    worst = 0.0
    for shape, low in (((1, 2), True), ((2, 1), True), ((2, 2), False)):
        set_seq_parallel_pg(*shape, dist.get_rank(), 4, low)
        for kind in ("basic", "strip"):
            worst = max(
                worst,
                worst_error(
                    LongContextAttention(ring_impl_type=kind), kind, shape, (4, 4), low=low
                ),
            )
    return worst


def y10() -> float:
    """Key/value heads fewer than the Ulysses degree, and heads that it does not divide."""
    set_seq_parallel_pg(4, 1, dist.get_rank(), 4)
    module = UlyssesAttention(PROCESS_GROUP.ULYSSES_PG)
    return max(
        worst_error(module, "basic", (4, 1), heads)
        for heads in ((4, 1), (8, 2), (6, 2), (7, 7), (5, 1))
    )


def test_yunchangs_bugs_are_absent() -> None:
    checks: dict[str, tuple[Callable[[], float], float]] = {
        "Y1": (lambda: max(y1(low=True), y1(low=False)), TOLERANCE),
        "Y2, Y3": (y2_y3, TOLERANCE),
        "Y4": (y4, TOLERANCE),
        "Y5": (y5, TOLERANCE),
        "Y6, Y7": (y6_y7, SINGLE_TOLERANCE),
        "Y8": (y8, TOLERANCE),
        "Y9": (y9, TOLERANCE),
        "Y10": (y10, TOLERANCE),
    }
    results = run_ranks(lambda: {name: check() for name, (check, _) in checks.items()}, 4)
    worst = {name: max(result[name] for result in results) for name in checks}
    assert not {name: error for name, error in worst.items() if not error <= checks[name][1]}
