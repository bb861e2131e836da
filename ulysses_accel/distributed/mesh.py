"""The device mesh, its process groups, and each rank's coordinates.

Axis names and order are accelerate's. `sp` is the Ulysses degree, `cp` the ring degree; the ranks
of the joint axis `sequence` (cp × sp) process one batch together. Parameters are sharded over
`dp_shard_cp` (dp_shard × cp × sp).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ulysses_accel import _private_api
from ulysses_accel.distributed.axes import AXES
from ulysses_accel.errors import MeshError

JOINT_AXES = {
    "dp": ("dp_replicate", "dp_shard"),
    "dp_shard_cp": ("dp_shard", "cp", "sp"),
    "dp_cp": ("dp_replicate", "dp_shard", "cp", "sp"),
    "sequence": ("cp", "sp"),
}


def active_axes(sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the axes of the mesh: every axis above size 1, and `sp` in any case, so that
    `mesh["sp"]` always exists.
    """
    return tuple(axis for axis in AXES if axis == "sp" or sizes.get(axis, 1) > 1)


def joint_axes(sizes: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Returns the joint axes of the mesh, each with the active axes that it flattens; without those
    that have none.
    """
    active = active_axes(sizes)
    joint: dict[str, tuple[str, ...]] = {}
    for name, axes in JOINT_AXES.items():
        active_in_joint = tuple(axis for axis in axes if axis in active)
        if active_in_joint:
            joint[name] = active_in_joint
    return joint


def build_mesh(sizes: Mapping[str, int], device_type: str) -> DeviceMesh:
    """Builds the device mesh with its joint axes; every rank must call it.

    Args:
        sizes: ranks along each axis of `AXES`; axes that are not in it have 1.
        device_type: `cuda` or `cpu`.

    Returns:
        A mesh whose axes are `active_axes(sizes)`, with `joint_axes(sizes)` flattened.

    Raises:
        MeshError: the product of the sizes is not the number of processes.
    """
    world_size = dist.get_world_size()
    product = math.prod(sizes.get(axis, 1) for axis in AXES)
    if product != world_size:
        factors = " × ".join(f"{axis}={sizes.get(axis, 1)}" for axis in AXES)
        raise MeshError(
            f"the mesh {factors} has {product} ranks, but {world_size} processes were launched. "
            f"Change the sizes so that their product is {world_size}, or launch {product} "
            "processes."
        )
    active = active_axes(sizes)
    mesh = init_device_mesh(
        device_type,
        tuple(sizes.get(axis, 1) for axis in active),
        mesh_dim_names=active,
        backend_override=_backend_override(),
    )
    for name in joint_axes(sizes):
        joint_axis(mesh, name)
    return mesh


def joint_axis(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """Returns a joint axis of a mesh as a 1-D mesh; the first call creates it, and every rank must
    make it.

    Args:
        mesh: from `build_mesh`.
        name: a key of `JOINT_AXES`.
    """
    names = mesh.mesh_dim_names or ()
    axes = tuple(axis for axis in JOINT_AXES[name] if axis in names)
    return _private_api.flattened(mesh[axes], name)


def build_expert_mesh(ep_size: int, device_type: str) -> DeviceMesh:
    """Builds the mesh that experts are distributed over, besides the mesh of `build_mesh`; every
    rank must call it.

    Args:
        ep_size: ranks that each layer's experts are distributed over; consecutive ranks, which are
            usually on one node.
        device_type: `cuda` or `cpu`.

    Returns:
        A mesh with the axes `ep_replicate`, whose ranks have the same experts, and `ep`.

    Raises:
        MeshError: the size does not divide the number of processes.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size % ep_size:
        raise MeshError(
            f"ep_size={ep_size} does not divide {world_size} launched processes. Use one of "
            f"{[size for size in range(1, world_size + 1) if world_size % size == 0]}."
        )
    shape, names = (world_size // ep_size, ep_size), ("ep_replicate", "ep")
    override = _backend_override("ep")
    return init_device_mesh(device_type, shape, mesh_dim_names=names, backend_override=override)


def _backend_override(axis: str = "sp") -> dict[int | str, Any] | None:
    """Returns `cpu:gloo` as the backend of an axis where the default backend is gloo.

    torch's differentiable all-gather uses scatter on groups whose backend is called "gloo", which
    works only where global rank 0 is a member; with "cpu:gloo" it uses all-to-all, which works on
    every group.
    """
    return {axis: "cpu:gloo"} if dist.get_backend() == "gloo" else None


@dataclass(frozen=True)
class SequenceGroups:
    """One rank's groups and its data parallel coordinates.

    Args:
        mesh: that the groups belong to.
        group: the ranks of the joint axis `sequence`, which hold the shards of one batch in rank
            order.
        cpu_group: the same ranks on gloo, for agreements about the batch that must not wait for the
            device.
        world_group: all ranks that the loss of the global batch is summed over (every axis but
            tp).
        sp_group: the ranks of `group` that exchange tokens for heads.
        cp_group: the ranks of `group` that form a ring; None without one.
        size: ranks P in `group`.
        rank: this rank in `group`.
        data_parallel_size: number of different batches that the mesh processes at a time.
        data_parallel_rank: index of this rank's batch among them.
    """

    mesh: DeviceMesh
    group: ProcessGroup
    cpu_group: ProcessGroup
    world_group: ProcessGroup
    sp_group: ProcessGroup
    cp_group: ProcessGroup | None
    size: int
    rank: int
    data_parallel_size: int
    data_parallel_rank: int


def sequence_groups(mesh: DeviceMesh) -> SequenceGroups:
    """Returns this rank's groups in a mesh from `build_mesh`; every rank must call it, once for
    each mesh.
    """
    sequence = joint_axis(mesh, "sequence")
    group = sequence.get_group()
    names = mesh.mesh_dim_names or ()
    data_axes = [axis for axis in ("dp_replicate", "dp_shard") if axis in names]
    data_rank, data_size = 0, 1
    for axis in data_axes:
        data_rank = data_rank * mesh[axis].size() + mesh[axis].get_local_rank()
        data_size *= mesh[axis].size()
    return SequenceGroups(
        mesh=mesh,
        group=group,
        cpu_group=_cpu_group(mesh, group),
        world_group=joint_axis(mesh, "dp_cp").get_group(),
        sp_group=mesh["sp"].get_group(),
        cp_group=mesh["cp"].get_group() if "cp" in names else None,
        size=sequence.size(),
        rank=sequence.get_local_rank(),
        data_parallel_size=data_size,
        data_parallel_rank=data_rank,
    )


def _cpu_group(mesh: DeviceMesh, group: ProcessGroup) -> ProcessGroup:
    """Returns `group` itself on the CPU, and otherwise a gloo group of the same ranks."""
    if mesh.device_type == "cpu":
        return group
    members = dist.get_process_group_ranks(group)
    cpu_group: ProcessGroup
    cpu_group, _ = dist.new_subgroups_by_enumeration(
        _all_groups(mesh, len(members)), backend="gloo"
    )
    return cpu_group


def _all_groups(mesh: DeviceMesh, size: int) -> list[list[int]]:
    """Returns the ranks of every sequence group of the mesh, in the same order on all ranks."""
    names = list(mesh.mesh_dim_names or ())
    axes = [names.index(axis) for axis in JOINT_AXES["sequence"] if axis in names]
    others = [index for index in range(len(names)) if index not in axes]
    table = mesh.mesh.permute(*others, *axes).reshape(-1, size)
    return [[int(rank) for rank in row] for row in table]


def ring_and_ulysses_groups(
    ring_size: int, ulysses_size: int, *, ulysses_inside: bool = True
) -> tuple[ProcessGroup, ProcessGroup]:
    """Returns this rank's ring and its Ulysses group, for code that has no mesh; every rank must
    call it.

    Args:
        ring_size: ranks R of each ring.
        ulysses_size: ranks U of each Ulysses group; each R × U consecutive ranks share a sequence.
        ulysses_inside: whether the ranks of a Ulysses group are consecutive; otherwise those of a
            ring are.

    Returns:
        The ring, and the Ulysses group.

    Raises:
        MeshError: R × U does not divide the number of processes.
    """
    world_size, size = dist.get_world_size(), ring_size * ulysses_size
    if min(ring_size, ulysses_size) < 1 or world_size % size:
        raise MeshError(
            f"a ring of {ring_size} × {ulysses_size} Ulysses ranks does not divide {world_size} "
            f"launched processes. Change the degrees so that their product divides {world_size}."
        )
    ring_step, ulysses_step = (ulysses_size, 1) if ulysses_inside else (1, ring_size)
    rings: list[list[int]] = []
    ulysses: list[list[int]] = []
    for first in range(0, world_size, size):
        for ulysses_rank in range(ulysses_size):
            start = first + ulysses_rank * ulysses_step
            rings.append([start + ring_rank * ring_step for ring_rank in range(ring_size)])
        for ring_rank in range(ring_size):
            start = first + ring_rank * ring_step
            ulysses.append([start + rank * ulysses_step for rank in range(ulysses_size)])
    ring_group: ProcessGroup = dist.new_subgroups_by_enumeration(rings)[0]
    ulysses_group: ProcessGroup = dist.new_subgroups_by_enumeration(ulysses)[0]
    return ring_group, ulysses_group
