"""The only creator of process groups: axes, joint axes and each rank's place among them.

Axis names and order are accelerate's. `sp` is the Ulysses degree, `cp` the ring degree; the ranks
of the joint axis `sequence` (cp × sp) process one batch together. Parameters shard over
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
    """Returns the axes that the mesh has: `sp` always, so that it can be asked for, and every axis
    above size 1.
    """
    return tuple(axis for axis in AXES if axis == "sp" or sizes.get(axis, 1) > 1)


def joint_axes(sizes: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Returns the joint axes that the mesh has, each with the axes it flattens; empty ones are left
    out.
    """
    active = active_axes(sizes)
    joints = {
        name: tuple(axis for axis in axes if axis in active) for name, axes in JOINT_AXES.items()
    }
    return {name: axes for name, axes in joints.items() if axes}


def build_mesh(sizes: Mapping[str, int], device_type: str) -> DeviceMesh:
    """Builds the device mesh with its joint axes; every rank must call it.

    Args:
        sizes: ranks along each axis of `AXES`; absent axes have 1.
        device_type: torch's name of the device, `cuda` or `cpu`.

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
    """Returns a joint axis of a mesh as a 1-D mesh, made at the first call, which every rank must
    make.

    Args:
        mesh: from `build_mesh`.
        name: a key of `JOINT_AXES`.
    """
    names = mesh.mesh_dim_names or ()
    axes = tuple(axis for axis in JOINT_AXES[name] if axis in names)
    return _private_api.flattened(mesh[axes], name)


def build_expert_mesh(ep_size: int, device_type: str) -> DeviceMesh:
    """Builds the mesh that experts are dealt over, beside the mesh of `build_mesh`; every rank must
    call it.

    Args:
        ep_size: ranks that share the experts of each layer; neighbours, so that tokens travel the
            shortest ways.
        device_type: torch's name of the device, `cuda` or `cpu`.

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
    """Names gloo by its device on an axis.

    torch's own differentiable all-gather takes a scatter path on groups called "gloo" that only
    works where global rank 0 is a member; under the name "cpu:gloo" it takes the all-to-all path,
    which works on every group.
    """
    return {axis: "cpu:gloo"} if dist.get_backend() == "gloo" else None


@dataclass(frozen=True)
class SequenceGroups:
    """One rank's place: the group that shares its batch, and its data parallel coordinates.

    Args:
        mesh: the mesh that the groups belong to.
        group: the ranks of the joint axis `sequence`, which hold one batch's shards in rank order.
        cpu_group: the same ranks on gloo, for agreements about the batch that must not wait for the
            device.
        world_group: all ranks that a loss over the whole global batch is summed over (every axis
            but tp).
        sp_group: the ranks of `group` that exchange tokens for heads.
        cp_group: the ranks of `group` that form a ring; None without one.
        size: ranks P in `group`.
        rank: this rank's place in `group`.
        data_parallel_size: how many different batches the mesh processes at once.
        data_parallel_rank: which of them this rank helps with.
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
    own: ProcessGroup
    own, _ = dist.new_subgroups_by_enumeration(_all_groups(mesh, len(members)), backend="gloo")
    return own


def _all_groups(mesh: DeviceMesh, size: int) -> list[list[int]]:
    """Returns the ranks of every sequence group of the mesh, in an order that all ranks share."""
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
        ulysses_inside: whether the ranks of a Ulysses group are neighbours; otherwise those of a
            ring are.

    Raises:
        MeshError: R × U does not divide the number of processes.
    """
    world_size, size = dist.get_world_size(), ring_size * ulysses_size
    if min(ring_size, ulysses_size) < 1 or world_size % size:
        raise MeshError(
            f"a ring of {ring_size} × {ulysses_size} Ulysses ranks does not divide {world_size} "
            "launched processes. "
            f"Change the degrees so that their product divides {world_size}."
        )
    ring_step, ulysses_step = (ulysses_size, 1) if ulysses_inside else (1, ring_size)
    firsts = range(0, world_size, size)
    rings = [
        [first + place * ulysses_step + ring * ring_step for ring in range(ring_size)]
        for first in firsts
        for place in range(ulysses_size)
    ]
    ulysses = [
        [first + ring * ring_step + place * ulysses_step for place in range(ulysses_size)]
        for first in firsts
        for ring in range(ring_size)
    ]
    ring_group: ProcessGroup = dist.new_subgroups_by_enumeration(rings)[0]
    ulysses_group: ProcessGroup = dist.new_subgroups_by_enumeration(ulysses)[0]
    return ring_group, ulysses_group
