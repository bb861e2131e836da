"""XTuner's process groups: which ranks share a sequence, which hold different ones, and how
torch.distributed starts.

Every getter reads the present state, so that a call before `init_sequence_parallel` does not change
later ones. Source: https://github.com/InternLM/xtuner, its document on sequence parallelism.
"""

from __future__ import annotations

import os
import re
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from ulysses_accel.distributed.mesh import ring_and_ulysses_groups
from ulysses_accel.errors import ConfigError, MeshError, closest
from ulysses_accel.integrations.accelerate.process_state import close_gloo_at_exit

DEFAULT_PORT = "29500"


class SequenceParallel:
    """The groups of this process that `init_sequence_parallel` created; they end with
    torch.distributed itself.
    """

    def __init__(self) -> None:
        self._world: ProcessGroup | None = None
        self._groups: dict[str, ProcessGroup] = {}

    def group(self, name: str) -> ProcessGroup | None:
        """Returns the group `sequence`, `data` or `inner`; None where it was not created for the
        running world.
        """
        return self._groups.get(name) if self._world is dist.group.WORLD else None

    def keep(self, **groups: ProcessGroup) -> None:
        """Adds groups of the running world; those of an earlier one are dropped."""
        if self._world is not dist.group.WORLD:
            self._groups, self._world = {}, dist.group.WORLD
        self._groups.update(groups)


SEQUENCE_PARALLEL = SequenceParallel()


def init_dist(
    launcher: str, backend: str = "nccl", init_backend: str = "torch", **kwargs: Any
) -> None:
    """Starts torch.distributed from a launcher's environment variables, and selects this rank's
    GPU.

    Args:
        launcher: `pytorch` (torchrun's variables) or `slurm` (srun's, one task for each process).
        backend: of torch.distributed: `nccl`, or `gloo` on CPUs.
        init_backend: `torch` or `deepspeed`: the library that starts it.
        kwargs: passed to it; `port` is the first host's under Slurm, unless MASTER_PORT is set.

    Raises:
        ConfigError: another launcher, or missing variables.
    """
    if launcher not in ("pytorch", "slurm"):
        raise ConfigError(
            f"launcher={launcher!r} is not known.{closest(launcher, ('pytorch', 'slurm'))}"
        )
    if init_backend not in ("torch", "deepspeed"):
        raise ConfigError(
            f"init_backend={init_backend!r} is not "
            f"known.{closest(init_backend, ('torch', 'deepspeed'))}"
        )
    port = kwargs.pop("port", None)
    if launcher == "slurm":
        os.environ.update(slurm_environment(None if port is None else str(port)))
    missing = [
        name
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if name not in os.environ
    ]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} are not set. Start the script with torchrun, or use "
            "launcher='slurm'."
        )
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if init_backend == "deepspeed":
        import deepspeed

        deepspeed.init_distributed(dist_backend=backend, **kwargs)
    else:
        dist.init_process_group(backend, **kwargs)


def slurm_environment(port: str | None = None) -> dict[str, str]:
    """Returns torch.distributed's variables, from those that srun sets for each task.

    Args:
        port: on the first host, where MASTER_PORT is not set.

    Raises:
        ConfigError: this is not a Slurm task.
    """
    names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODELIST")
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} are not set: this is not a Slurm task. Start the script with "
            "srun."
        )
    rank, world_size, local_rank, hosts = (os.environ[name] for name in names)
    return {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": local_rank,
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or first_host(hosts),
        "MASTER_PORT": os.environ.get("MASTER_PORT") or port or DEFAULT_PORT,
    }


def first_host(hosts: str) -> str:
    """Returns the first host of a Slurm list such as `a,b`, `node[07-12,20]` or `r[1-2]n[3-4]`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts.strip())
    # The first number of a bracket is the first host's.
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group() if first is not None else "")


def init_sequence_parallel(sequence_parallel_size: int = 1) -> None:
    """Creates the groups of neighbouring ranks that share a sequence; every rank must call it,
    once.

    Args:
        sequence_parallel_size: ranks P that share each sequence; divides the number of processes.

    Raises:
        MeshError: torch.distributed is not initialized, P does not divide the processes, or the
            groups exist already.
    """
    if not dist.is_initialized():
        raise MeshError(
            f"init_sequence_parallel({sequence_parallel_size}) needs torch.distributed, which is "
            "not initialized. Call init_dist first."
        )
    group = SEQUENCE_PARALLEL.group("sequence")
    if group is not None:
        raise MeshError(
            f"init_sequence_parallel({sequence_parallel_size}) was called again: groups of "
            f"{group.size()} ranks exist already. Call it once."
        )
    world_size = dist.get_world_size()
    _check_divides(sequence_parallel_size, world_size, "sequence_parallel_size")
    # Ranks at the same position of different sequence groups hold different data: they form no
    # ring.
    data, sequence = ring_and_ulysses_groups(
        world_size // sequence_parallel_size, sequence_parallel_size
    )
    SEQUENCE_PARALLEL.keep(sequence=sequence, data=data)
    close_gloo_at_exit()


def init_inner_sequence_parallel(inner_sequence_parallel_size: int = 1) -> None:
    """Creates the inner groups over which XTuner repeats heads, for code that reads them; every
    rank must call it.

    Nothing here needs them: heads that P does not divide are partitioned unevenly, and ranks beyond
    the heads form a ring.

    Args:
        inner_sequence_parallel_size: ranks in each; divides P.

    Raises:
        MeshError: there are no sequence groups yet, or the size does not divide them.
    """
    group = SEQUENCE_PARALLEL.group("sequence")
    if group is None:
        raise MeshError(
            "there are no sequence groups yet. Call init_sequence_parallel on every rank first."
        )
    _check_divides(inner_sequence_parallel_size, group.size(), "inner_sequence_parallel_size")
    number = dist.get_world_size() // inner_sequence_parallel_size
    SEQUENCE_PARALLEL.keep(inner=ring_and_ulysses_groups(number, inner_sequence_parallel_size)[1])


def _check_divides(size: int, total: int, name: str) -> None:
    if size < 1 or total % size:
        legal = ", ".join(str(number) for number in range(1, total + 1) if total % number == 0)
        raise MeshError(f"{name}={size} does not divide {total} processes. Use one of: {legal}.")


def is_inner_sequence_parallel_initialized() -> bool:
    """Returns whether `init_inner_sequence_parallel` created groups."""
    return get_inner_sequence_parallel_group() is not None


def get_sequence_parallel_group() -> ProcessGroup | None:
    """Returns the ranks that share this rank's sequence; None before `init_sequence_parallel`."""
    return SEQUENCE_PARALLEL.group("sequence")


def get_sequence_parallel_world_size() -> int:
    """Returns the ranks P that share a sequence; 1 before `init_sequence_parallel`."""
    return _size(get_sequence_parallel_group())


def get_sequence_parallel_rank() -> int:
    """Returns which of them this is; 0 before `init_sequence_parallel`."""
    return _rank(get_sequence_parallel_group())


def get_inner_sequence_parallel_group() -> ProcessGroup | None:
    """Returns this rank's inner group; None before `init_inner_sequence_parallel`."""
    return SEQUENCE_PARALLEL.group("inner")


def get_inner_sequence_parallel_world_size() -> int:
    """Returns the ranks in an inner group; 1 without one."""
    return _size(get_inner_sequence_parallel_group())


def get_inner_sequence_parallel_rank() -> int:
    """Returns which of them this is; 0 without an inner group."""
    return _rank(get_inner_sequence_parallel_group())


def get_data_parallel_group() -> ProcessGroup:
    """Returns the ranks that hold the same shard of different sequences.

    Raises:
        MeshError: `init_sequence_parallel` was not called.
    """
    group = SEQUENCE_PARALLEL.group("data")
    if group is None:
        raise MeshError(
            "there are no data parallel groups yet. Call init_sequence_parallel on every rank "
            "first."
        )
    return group


def get_data_parallel_world_size() -> int:
    """Returns how many different batches are processed at once; the number of ranks before
    `init_sequence_parallel`.
    """
    group = SEQUENCE_PARALLEL.group("data") or dist.group.WORLD
    return _size(group)


def get_data_parallel_rank() -> int:
    """Returns which of these batches this rank helps with."""
    group = SEQUENCE_PARALLEL.group("data") or dist.group.WORLD
    return _rank(group)


def _size(group: ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def _rank(group: ProcessGroup | None) -> int:
    return 0 if group is None else group.rank()


def sequence_group(group: ProcessGroup | None) -> ProcessGroup | None:
    """Returns the group, or the sequence group where it is None; None where no sequence is
    shared.
    """
    chosen = group if group is not None else get_sequence_parallel_group()
    return chosen if _size(chosen) > 1 else None
