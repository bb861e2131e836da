"""The mesh axes of a config: their sizes, and the names that stock code asks for."""

from __future__ import annotations

import math

from ulysses_accel.config_fields import AXES


class MeshAxes:
    """What follows from the five sizes alone; a base class of `ParallelismConfig`."""

    dp_replicate_size: int
    dp_shard_size: int
    cp_size: int
    sp_size: int
    tp_size: int
    _tp_hidden: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every mesh axis, in the order of the mesh."""
        return {axis: getattr(self, f"{axis}_size") for axis in AXES}

    @property
    def _sizes(self) -> dict[str, int]:
        # Stock code and the Trainer assign to `tp_size` and friends: one truth, read from the attributes.
        return self.sizes

    @property
    def total_size(self) -> int:
        """The product of all sizes: the number of processes."""
        return math.prod(self.sizes.values())

    @property
    def sequence_parallel_size(self) -> int:
        """The number of processes that share one sequence: cp_size × sp_size."""
        return self.cp_size * self.sp_size

    @property
    def data_parallel_size(self) -> int:
        """The number of different batches in one step."""
        return self.dp_replicate_size * self.dp_shard_size

    @property
    def non_data_parallel_size(self) -> int:
        """The number of processes that work on the same batch."""
        return self.cp_size * self.sp_size * self.tp_size

    @property
    def cp_enabled(self) -> bool:
        """Always false; read `cp_size` for the ring degree.

        Stock accelerate and the Trainer act on true: they force causal attention on every module named `self_attn`,
        demand an FSDP2 plugin and wrap each step in torch's own context parallelism. Our ring does none of that.
        """
        return False

    @property
    def tp_enabled(self) -> bool:
        """True where `tp_size` is above 1; false while stock code prepares a model that is cut already."""
        return self.tp_size > 1 and not self._tp_hidden

    def _active(self, *axes: str) -> list[str]:
        sizes = self.sizes
        return [axis for axis in AXES if axis in axes and sizes[axis] > 1]

    @property
    def dp_dim_names(self) -> list[str]:
        """The axes above 1 whose processes see different batches."""
        return self._active("dp_replicate", "dp_shard")

    @property
    def non_dp_dim_names(self) -> list[str]:
        """The axes above 1 whose processes work on the same batch."""
        return self._active("cp", "sp", "tp")

    @property
    def dp_shard_cp_dim_names(self) -> list[str]:
        """The axes above 1 over which parameters are sharded; flattened they are the axis `dp_shard_cp`."""
        return self._active("dp_shard", "cp", "sp")

    @property
    def dp_cp_dim_names(self) -> list[str]:
        """The axes above 1 over which gradients are averaged; flattened they are the axis `dp_cp`."""
        return self._active("dp_replicate", "dp_shard", "cp", "sp")

    @property
    def fsdp_dim_names(self) -> list[str]:
        """The mesh axes that FSDP2 takes; only axes that exist in the mesh."""
        # The mesh has the joint axis always, of one rank where there is nothing but replicas and tensor parallelism.
        return self._active("dp_replicate") + (
            ["dp_shard_cp"] if self.dp_shard_cp_dim_names or self.tp_size > 1 else []
        )

    @property
    def active_mesh_dims(self) -> list[str]:
        """All axes above 1, in the order of the mesh."""
        return self._active(*AXES)
