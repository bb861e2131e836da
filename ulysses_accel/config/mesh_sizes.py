"""The mesh axes of a config: their sizes, the properties that accelerate reads, the sizes that fit
a number of processes, and `sequence_parallelism_mode`, ColossalAI's word for them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from ulysses_accel import _private_api
from ulysses_accel.config.settings import Setting, Source
from ulysses_accel.config.sources import Layer
from ulysses_accel.distributed.axes import AXES
from ulysses_accel.errors import ConfigError

Sizes = Mapping[str, int]
MAX_SUGGESTIONS = 6
_ONE = "Leave sequence_parallelism_mode out to use several kinds together"


class MeshAxes:
    """What follows from the five sizes alone; a base class of `ParallelismConfig`."""

    dp_replicate_size: int
    dp_shard_size: int
    cp_size: int
    sp_size: int
    tp_size: int
    _tp_hidden: bool = False
    _fsdp_plugin: Any = None
    _follows_launcher: bool = False
    _is_attached: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every mesh axis, in the order of the mesh."""
        return {axis: getattr(self, f"{axis}_size") for axis in AXES}

    @property
    def _sizes(self) -> dict[str, int]:
        # accelerate 1.15 keeps a second copy in `_sizes`, and its own code and the Trainer assign
        # to `tp_size`: the attributes are the only copy here.
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

        Where it is true, accelerate 1.15 and the Trainer force causal attention on every module
        named `self_attn`, require an FSDP2 plugin and wrap each step in torch's context
        parallelism. Our ring attention needs none of that.
        """
        return False

    @property
    def tp_enabled(self) -> bool:
        """True where `tp_size` is above 1; false while accelerate prepares a model whose weights
        are sharded already.
        """
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
        """The axes above 1 over which parameters are sharded; flattened they are the axis
        `dp_shard_cp`.
        """
        return self._active("dp_shard", "cp", "sp")

    @property
    def dp_cp_dim_names(self) -> list[str]:
        """The axes above 1 over which gradients are averaged; flattened they are the axis
        `dp_cp`.
        """
        return self._active("dp_replicate", "dp_shard", "cp", "sp")

    @property
    def fsdp_dim_names(self) -> list[str]:
        """The mesh axes that FSDP2 takes; only axes that exist in the mesh."""
        # The mesh always has the joint axis; it has one rank where there are only replicas and
        # tensor parallelism.
        return self._active("dp_replicate") + (
            ["dp_shard_cp"] if self.dp_shard_cp_dim_names or self.tp_size > 1 else []
        )

    @property
    def active_mesh_dims(self) -> list[str]:
        """All axes above 1, in the order of the mesh."""
        return self._active(*AXES)


def divisors(number: int) -> list[int]:
    """Returns the divisors of a positive number, the smallest first."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def legal_factorizations(
    world_size: int, sizes: Sizes, free: frozenset[str]
) -> list[dict[str, int]]:
    """Lists a few sizes whose product is the number of processes, the nearest ones first.

    Args:
        world_size: the number of processes.
        sizes: the requested size of every axis.
        free: the axes left at their defaults; these are changed before the others.

    Returns:
        At most `MAX_SUGGESTIONS` complete assignments, never empty for a positive number of
        processes.
    """
    legal: list[dict[str, int]] = []
    for candidate in _candidates(world_size, sizes, free):
        if candidate not in legal:
            legal.append(candidate)
        if len(legal) == MAX_SUGGESTIONS:
            break
    return legal


def describe_sizes(sizes: Sizes) -> str:
    """Writes the axes above 1 as constructor arguments, such as `dp_shard_size=2, sp_size=4`."""
    return (
        ", ".join(f"{axis}_size={size}" for axis, size in sizes.items() if size > 1)
        or "every size 1"
    )


def _candidates(world_size: int, sizes: Sizes, free: frozenset[str]) -> Iterator[dict[str, int]]:
    ones = dict.fromkeys(AXES, 1)
    # One axis changed: the free ones first, then the requested ones, data parallelism before the
    # axes that share a batch.
    for axis in sorted(AXES, key=lambda name: name not in free):
        others = math.prod(size for name, size in sizes.items() if name != axis)
        if world_size % others == 0:
            yield {**ones, **sizes, axis: world_size // others}
    # The axes that share a batch kept, all data parallelism on one axis.
    kept = {axis: sizes[axis] for axis in ("cp", "sp", "tp")}
    rest, remainder = divmod(world_size, math.prod(kept.values()))
    if remainder == 0:
        yield {**ones, **kept, "dp_shard": rest}
        yield {**ones, **kept, "dp_replicate": rest}
    # A degree that does not divide the world: the nearest degrees that do.
    axis = max(kept, key=lambda name: kept[name])
    for degree in sorted(divisors(world_size), key=lambda d: (abs(d - kept[axis]), d)):
        yield {**ones, "dp_replicate": world_size // degree, axis: degree}


def warn_of_earlier_accelerator(cp_size: int, sp_size: int) -> None:
    """Warns that an accelerator without a config exists already: accelerate ignores the config of
    any later one.

    Args:
        cp_size: of the config that comes too late.
        sp_size: likewise.
    """
    shared = _private_api.accelerator_state()
    if (
        cp_size * sp_size > 1
        and "parallelism_config" in shared
        and shared["parallelism_config"] is None
    ):
        warnings.warn(
            f"sp_size={sp_size} and cp_size={cp_size} come too late: an Accelerator was created in "
            "this process without a parallelism_config, and accelerate ignores that of later ones. "
            "Create this one first.",
            stacklevel=4,
        )


def sizes_of_mode(settings: Layer) -> dict[str, Setting]:
    """Returns the sizes that `sequence_parallelism_mode` implies.

    `split_gather` shards the sequence over the `tp` axis between the linear layers, which every
    `tp_size` above 1 does; sp_size and cp_size are not changed. `all_to_all` is Ulysses over
    `sp_size`, without a ring. `ring_attn` is ring attention: its degree is cp_size, or sp_size
    where cp_size is 1. So ColossalAI's `HybridParallelPlugin(tp_size=4, sp_size=1,
    sequence_parallelism_mode="split_gather")` and `(tp_size=2, sp_size=2,
    sequence_parallelism_mode="all_to_all")` or `"ring_attn"` have the same arguments here; the
    latter two shard over `tp` as well.

    Args:
        settings: every field's setting.

    Returns:
        Settings that override those of the same name; none where no mode is set.

    Raises:
        ConfigError: the sizes contradict the mode.
    """
    mode = settings["sequence_parallelism_mode"]
    if mode.value is None:
        return {}
    sizes = {name: settings[name] for name in ("tp_size", "cp_size", "sp_size")}
    shown = ", ".join(f"{name}={setting}" for name, setting in sizes.items())
    here = f"sequence_parallelism_mode={mode.value!r} (from {mode.source})"
    if mode.value == "split_gather":
        if sizes["tp_size"].value == 1:
            raise ConfigError(
                f"{here} shards the sequence over tensor parallel ranks, but {shown}. Set tp_size."
            )
        return {}
    ring, ulysses = sizes["cp_size"], sizes["sp_size"]
    if mode.value == "all_to_all":
        if ulysses.value == 1 or ring.value not in (1, "auto"):
            raise ConfigError(
                f"{here} is Ulysses over sp_size ranks alone, but {shown}. Set sp_size only. "
                f"{_ONE}."
            )
        return {"cp_size": _implied(1, mode)}
    if ring.value != 1 and ulysses.value != 1:
        raise ConfigError(f"{here} has one degree, but {shown}. Set sp_size or cp_size. {_ONE}.")
    if ring.value == 1 and ulysses.value == 1:
        raise ConfigError(f"{here} needs the ring's degree, but {shown}. Set sp_size, or cp_size.")
    if ring.value != 1:
        return {"sp_size": _implied(1, mode)}
    from_sp_size = Source(
        "derived",
        f"sp_size={ulysses.value} from {ulysses.source}, as sequence_parallelism_mode='ring_attn'",
    )
    return {"cp_size": Setting(ulysses.value, from_sp_size), "sp_size": _implied(1, mode)}


def _implied(size: int, mode: Setting) -> Setting:
    return Setting(
        size, Source("derived", f"sequence_parallelism_mode={mode.value!r} from {mode.source}")
    )
