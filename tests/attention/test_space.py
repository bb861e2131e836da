"""The whole space of what attention computes, drawn at random, over real ranks against one process
in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.attention.ring.test_ring import local_order
from tests.helpers.dense_attention import cross_mask, dense_attention, self_mask, token_documents
from tests.helpers.ranks import run_ranks
from ulysses_accel.attention import SequenceAttention
from ulysses_accel.attention.call import AttentionCall
from ulysses_accel.sequence.description import SequenceDescription
from ulysses_accel.sequence.layout import LAYOUTS, Layout, multiple_of

# Sums of at most 100 products of unit normals, merged in another order: a few hundred ulps of
# float64.
TOLERANCE = 1e-12
HEADS = [(8, 8), (8, 4), (8, 2), (8, 1), (6, 2), (6, 3), (5, 1), (7, 7)]


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int]
    description: SequenceDescription
    heads: tuple[int, int]
    value_dim: int
    exchange: str
    core: str
    is_causal: bool
    window: int | None
    softcap: float | None
    has_sinks: bool
    crosses: bool

    @property
    def keys(self) -> SequenceDescription:
        """The sequence that is read."""
        return (
            self.description
            if not self.crosses or self.description.encoder is None
            else self.description.encoder
        )


@dataclass(frozen=True)
class Answer:
    """Inputs (query, key, value, sinks), the weight of each output in the loss, and what one
    process computes.
    """

    inputs: list[Tensor]
    weight: Tensor
    out: Tensor
    grads: list[Tensor]


def draw_rows(
    draw: Random, batch: int, length: int, has_padding: bool, has_holes: bool
) -> tuple[Any, Any]:
    """Documents that end anywhere, padding before, between and behind them, and holes inside of
    them.
    """
    rows, holes = [], []
    for _ in range(batch):
        bounds = sorted({0, length, *draw.choices(range(length + 1), k=draw.randint(0, 4))})
        row = tuple((a, b) for a, b in pairwise(bounds) if not has_padding or draw.random() < 0.5)
        rows.append(row or ((0, length),))
        inside = []
        for start, stop in rows[-1] if has_holes else ():
            cuts = sorted(set(draw.choices(range(start, stop + 1), k=6)))
            inside += list(zip(cuts[::2], cuts[1::2]))
        holes.append(tuple(inside))
    return tuple(rows), tuple(holes) if any(holes) else ()


def draw_description(
    draw: Random, batch: int, shape: tuple[int, int], layout: Layout
) -> SequenceDescription:
    ring, ulysses = shape
    length = multiple_of(ring, layout, ulysses) * draw.randint(1, 5)
    kind = draw.choice(["dense", "documents", "padded", "holes"])
    rows, holes = (((0, length),),) * batch, ()
    if kind != "dense":
        rows, holes = draw_rows(draw, batch, length, kind == "padded", kind == "holes")
    prefixes: tuple[tuple[int, ...], ...] = ()
    if draw.random() < 0.25:
        prefixes = tuple(
            tuple(draw.randint(0, stop - start) for start, stop in row) for row in rows
        )
    return SequenceDescription(
        length, ring * ulysses, rows, ring, layout, holes=holes, prefixes=prefixes
    )


def draw_case(draw: Random, size: int) -> Case:
    ulysses = draw.choice([n for n in range(1, size + 1) if size % n == 0])
    shape, batch = (size // ulysses, ulysses), draw.choice([1, 2])
    description = draw_description(draw, batch, shape, draw.choice(LAYOUTS))
    crosses, is_causal = draw.random() < 0.25, draw.random() < 0.6
    if crosses:
        encoder = draw_description(
            draw, batch, draw.choice([(1, 1), shape, shape]), draw.choice(LAYOUTS)
        )
        description = replace(description, encoder=encoder, cache={})
    window = None
    if not crosses and draw.random() < 0.4:
        window = draw.randint(int(is_causal), description.sequence_length)
    return Case(
        shape,
        description,
        draw.choice([heads for heads in HEADS if heads[0] >= ulysses]),
        draw.choice([4, 3]),
        draw.choice(["p2p", "all_gather"]),
        draw.choice(["sdpa", "eager"]),
        is_causal,
        window,
        draw.choice([None, None, 2.0]),
        draw.random() < 0.4,
        crosses,
    )


def answer(case: Case) -> Answer:
    torch.manual_seed(0)
    description, (num_heads, num_kv) = case.description, case.heads
    lengths, batch = (
        (description.sequence_length, case.keys.sequence_length),
        description.batch_size,
    )
    shapes = (
        (num_heads, lengths[0], 4),
        (num_kv, lengths[1], 4),
        (num_kv, lengths[1], case.value_dim),
    )
    inputs = [torch.randn(batch, *shape, dtype=torch.float64) for shape in shapes]
    inputs.append(torch.randn(num_heads, dtype=torch.float64))
    mask = (
        cross_mask(description, case.keys)
        if case.crosses
        else self_mask(description, case.is_causal, case.window)
    )
    # Outputs of padding do not count.
    weight = torch.randn(batch, num_heads, lengths[0], case.value_dim, dtype=torch.float64)
    weight = weight * (token_documents(description) >= 0)[:, None, :, None]
    whole = [tensor.clone().requires_grad_() for tensor in inputs]
    out = dense_attention(*whole[:3], mask, case.softcap, whole[3] if case.has_sinks else None)
    (out * weight).sum().backward()
    return Answer(
        inputs,
        weight,
        out.detach(),
        [torch.zeros_like(t) if t.grad is None else t.grad for t in whole],
    )


def own_tokens(description: SequenceDescription, ring_rank: int, ulysses_rank: int) -> Tensor:
    if description.num_shards == 1:
        return torch.arange(description.sequence_length)
    size, ring = description.num_shards // description.ring_size, description.ring_size
    return local_order(description.sequence_length, ring, ring_rank, description.layout).chunk(
        size
    )[ulysses_rank]


def worst_error(mesh: DeviceMesh, case: Case, expected: Answer) -> float:
    ring, ulysses = mesh["cp"], mesh["sp"]
    attention = SequenceAttention(ulysses.get_group(), ring.get_group(), case.core, case.exchange)  # type: ignore[arg-type]
    places = (ring.get_local_rank(), ulysses.get_local_rank())
    own = [own_tokens(case.description, *places), *[own_tokens(case.keys, *places)] * 2]
    local = [
        tensor[:, :, tokens].clone().requires_grad_()
        for tensor, tokens in zip(expected.inputs, own)
    ]
    sinks = expected.inputs[3].clone().requires_grad_()
    call = AttentionCall(
        case.is_causal, softcap=case.softcap, sinks=sinks if case.has_sinks else None
    )
    out = attention(*local, case.description, call, case.window, crosses=case.crosses).transpose(
        1, 2
    )
    (out * expected.weight[:, :, own[0]]).sum().backward()
    counted = (token_documents(case.description) >= 0)[:, None, own[0], None]
    pairs = [(out * counted, expected.out[:, :, own[0]] * counted)]
    for index, tensor in enumerate([*local, sinks]):
        grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        if index == 3 or (index > 0 and case.keys.num_shards == 1):
            # What all ranks have: each contributes its share.
            dist.all_reduce(grad)
            pairs.append((grad, expected.grads[index]))
        else:
            pairs.append((grad, expected.grads[index][:, :, own[index]]))
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1.0)) for a, b in pairs)


@pytest.mark.parametrize(("size", "number"), [(1, 60), (2, 60), (3, 50), (4, 70), (8, 12)])
def test_matches_one_process(size: int, number: int) -> None:
    drawn = [draw_case(Random(1000 * size + index), size) for index in range(number)]
    answers = [answer(case) for case in drawn]

    def body() -> list[float]:
        shapes = {case.shape for case in drawn}
        meshes = {
            shape: init_device_mesh("cpu", shape, mesh_dim_names=("cp", "sp"))
            for shape in sorted(shapes)
        }
        return [
            worst_error(meshes[case.shape], case, expected)
            for case, expected in zip(drawn, answers)
        ]

    worst = run_ranks(body, size, timeout=170)
    failed = [
        (case, errors) for case, *errors in zip(drawn, *worst) if not max(errors) <= TOLERANCE
    ]
    assert not failed
