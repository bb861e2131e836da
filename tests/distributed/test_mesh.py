"""Every factorization of up to 1,024 ranks: who shares a group with whom, in which order, and that
all ranks agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.helpers.ranks import run_ranks
from ulysses_accel.distributed.mesh import (
    AXES,
    JOINT_AXES,
    _all_groups,
    active_axes,
    build_mesh,
    joint_axes,
    sequence_groups,
)
from ulysses_accel.errors import MeshError

WORLD_SIZES = [2**power for power in range(11)] + [3, 6, 12, 30, 96, 1000]
Sizes = dict[str, int]


def test_names_and_order_are_accelerate_s() -> None:
    assert AXES == ("dp_replicate", "dp_shard", "cp", "sp", "tp")
    assert JOINT_AXES == {
        "dp": ("dp_replicate", "dp_shard"),
        "dp_shard_cp": ("dp_shard", "cp", "sp"),
        "dp_cp": ("dp_replicate", "dp_shard", "cp", "sp"),
        "sequence": ("cp", "sp"),
    }


def factorizations(number: int, factors: int = len(AXES)) -> Iterator[tuple[int, ...]]:
    if factors == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in factorizations(number // first, factors - 1):
                yield (first, *rest)


def place(rank: int, sizes: Sizes) -> dict[str, int]:
    """A rank's coordinates, counted by hand: tp runs fastest, dp_replicate slowest."""
    found = {}
    for axis in reversed(AXES):
        rank, found[axis] = divmod(rank, sizes[axis])
    return found


def sharing(rank: int, sizes: Sizes, axes: tuple[str, ...]) -> list[int]:
    """The ranks that differ from `rank` in the given axes only, in the order of their
    coordinates.
    """
    own = place(rank, sizes)
    strides = {
        axis: math.prod(sizes[later] for later in AXES[AXES.index(axis) + 1 :]) for axis in AXES
    }
    base = sum(own[axis] * strides[axis] for axis in AXES if axis not in axes)
    ordered = [axis for axis in AXES if axis in axes]
    return [
        base + sum(index * strides[axis] for index, axis in zip(indices, ordered))
        for indices in product(*(range(sizes[axis]) for axis in ordered))
    ]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_groups_partition_the_ranks_for_every_factorization(world_size: int) -> None:
    everyone = list(range(world_size))
    count = 0
    for factors in factorizations(world_size):
        sizes = dict(zip(AXES, factors))
        active = active_axes(sizes)
        assert active == tuple(axis for axis in AXES if axis == "sp" or sizes[axis] > 1)
        # What torch fills a mesh with; only the axes that exist are dims of it.
        table = torch.arange(world_size).view([sizes[axis] for axis in active])
        mesh: Any = SimpleNamespace(mesh=table, mesh_dim_names=active)
        groups = _all_groups(mesh, sizes["cp"] * sizes["sp"])
        assert sorted(rank for group in groups for rank in group) == everyone
        for group in (groups[0], groups[-1]):
            assert group == sharing(group[0], sizes, JOINT_AXES["sequence"])
            assert sizes["tp"] > 1 or group == list(range(group[0], group[0] + len(group)))
        for name, axes in joint_axes(sizes).items():
            assert axes == tuple(axis for axis in JOINT_AXES[name] if axis in active)
            assert math.prod(sizes[axis] for axis in axes) == math.prod(
                sizes[axis] for axis in JOINT_AXES[name]
            )
        count += 1
    exponents = [sum(1 for _ in _powers(world_size, prime)) for prime in (2, 3, 5)]
    assert count == math.prod(
        math.comb(exponent + len(AXES) - 1, len(AXES) - 1) for exponent in exponents
    )


def _powers(number: int, prime: int) -> Iterator[int]:
    while number % prime == 0:
        number //= prime
        yield prime


@pytest.mark.parametrize("factors", [(2, 3, 2, 2, 2), (1, 4, 1, 8, 1), (2, 1, 3, 5, 1)])
def test_ranks_and_coordinates_are_a_bijection(factors: tuple[int, ...]) -> None:
    sizes = dict(zip(AXES, factors))
    world_size = math.prod(factors)
    places = {tuple(place(rank, sizes).values()) for rank in range(world_size)}
    assert len(places) == world_size
    for axes in JOINT_AXES.values():
        groups = {tuple(sharing(rank, sizes, axes)) for rank in range(world_size)}
        assert sorted(rank for group in groups for rank in group) == list(range(world_size))


SAMPLED = [
    (1, 1, 1, 1, 1),
    (1, 1, 1, 2, 1),
    (2, 1, 1, 1, 1),
    (2, 2, 2, 2, 2),
    (1, 3, 2, 2, 1),
    (3, 1, 1, 5, 2),
    (1, 8, 1, 8, 1),
    (4, 1, 4, 4, 1),
    (2, 4, 2, 4, 2),
    (1, 1, 1, 256, 1),
    (1, 16, 8, 8, 1),
    (4, 16, 2, 4, 2),
    (1, 1, 32, 32, 1),
    (1, 128, 1, 8, 1),
]


def seen_by(rank: int, sizes: Sizes) -> tuple[dict[str, Any], list[list[int]]]:
    """Builds the mesh as one rank of many would; returns its groups, and all groups in the order of
    their making.
    """
    world_size = math.prod(sizes.values())
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    made: list[list[int]] = []
    stock = device_mesh.new_group

    def recorded(ranks: list[int], *args: Any, **kwargs: Any) -> Any:
        made.append(list(ranks))
        return stock(ranks, *args, **kwargs)

    device_mesh.new_group = recorded
    try:
        mesh = build_mesh(sizes, "cpu")
        groups = sequence_groups(mesh)
        names = [*active_axes(sizes), *joint_axes(sizes)]
        found: dict[str, Any] = {
            name: dist.get_process_group_ranks(mesh[name].get_group()) for name in names
        }
        found["place"] = [
            groups.size,
            groups.rank,
            groups.data_parallel_size,
            groups.data_parallel_rank,
        ]
        members = (groups.group, groups.cpu_group, groups.world_group, groups.sp_group)
        found["groups"] = [dist.get_process_group_ranks(group) for group in members]
        found["ring"] = (
            [] if groups.cp_group is None else dist.get_process_group_ranks(groups.cp_group)
        )
    finally:
        device_mesh.new_group = stock
        dist.destroy_process_group()
    return found, made


def sampled_ranks(world_size: int) -> list[int]:
    return sorted({0, world_size // 3, world_size - 1})


def sampled() -> list[list[tuple[dict[str, Any], list[list[int]]]]]:
    return [
        [seen_by(rank, dict(zip(AXES, factors))) for rank in sampled_ranks(math.prod(factors))]
        for factors in SAMPLED
    ]


def check_rank(found: dict[str, Any], rank: int, sizes: Sizes) -> None:
    own = place(rank, sizes)
    for axis in active_axes(sizes):
        assert found[axis] == sharing(rank, sizes, (axis,))
    for name in joint_axes(sizes):
        assert found[name] == sharing(rank, sizes, JOINT_AXES[name])
    shared = sharing(rank, sizes, ("cp", "sp"))
    assert found["place"] == [
        sizes["cp"] * sizes["sp"],
        shared.index(rank),
        sizes["dp_replicate"] * sizes["dp_shard"],
        own["dp_replicate"] * sizes["dp_shard"] + own["dp_shard"],
    ]
    world = sharing(rank, sizes, JOINT_AXES["dp_cp"])
    assert found["groups"] == [shared, shared, world, sharing(rank, sizes, ("sp",))]
    assert found["ring"] == (sharing(rank, sizes, ("cp",)) if sizes["cp"] > 1 else [])


def test_real_meshes_have_these_groups_and_all_ranks_make_them_in_one_order() -> None:
    (found,) = run_ranks(sampled, 1, init=False)
    assert len(found) == len(SAMPLED)
    for factors, ranks in zip(SAMPLED, found):
        sizes = dict(zip(AXES, factors))
        orders = []
        for rank, (groups, made) in zip(sampled_ranks(math.prod(factors)), ranks, strict=True):
            check_rank(groups, rank, sizes)
            orders.append(made)
        assert all(order == orders[0] for order in orders), factors
        # A single axis is the world's own group.
        assert orders[0] or sum(factor > 1 for factor in factors) <= 1


def wrong_product() -> str:
    with pytest.raises(MeshError) as caught:
        build_mesh({"dp_replicate": 2, "sp": 2}, "cpu")
    return str(caught.value)


def test_a_wrong_product_is_refused_on_every_rank() -> None:
    for message in run_ranks(wrong_product, 2):
        assert (
            "dp_replicate=2 × dp_shard=1 × cp=1 × sp=2 × tp=1 has 4 ranks, but 2 processes were "
            "launched" in message
        )
        assert "launch 4 processes" in message
