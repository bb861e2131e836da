"""YunChang's process groups and token layouts: which ranks share a sequence, and which of its
tokens each has.

Shapes: B = rows, S = tokens of the full sequence, U = Ulysses ranks, R = ring ranks, P = U × R.
Source: USP (arXiv 2405.07719), https://github.com/feifeibear/long-context-attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ulysses_accel.distributed.mesh import ring_and_ulysses_groups
from ulysses_accel.errors import ConfigError, MeshError, ShapeError
from ulysses_accel.sequence.layout import Layout, multiple_of, runs
from ulysses_accel.sequence.sharding import next_multiple


class ProcessGroups:
    """The groups of this process that `set_seq_parallel_pg` chose, and all that it created.

    `ULYSSES_PG` and `RING_PG` are None until then. Modules keep the groups that were chosen when
    they were constructed.
    """

    def __init__(self) -> None:
        self.ULYSSES_PG: ProcessGroup | None = None
        self.RING_PG: ProcessGroup | None = None
        self.use_ulysses_low = True
        self._created: dict[tuple[int, int, bool], tuple[ProcessGroup, ProcessGroup]] = {}
        self._world: ProcessGroup | None = None

    def choose(self, ulysses_degree: int, ring_degree: int, use_ulysses_low: bool) -> None:
        """Chooses the groups, created at the first choice of them; every rank must call it."""
        if self._world is not dist.group.WORLD:
            # torch.distributed was started again, and its earlier groups are gone.
            self._created, self._world = {}, dist.group.WORLD
        degrees = (ulysses_degree, ring_degree, use_ulysses_low)
        if degrees not in self._created:
            self._created[degrees] = ring_and_ulysses_groups(
                ring_degree, ulysses_degree, ulysses_inside=use_ulysses_low
            )
        self.RING_PG, self.ULYSSES_PG = self._created[degrees]
        self.use_ulysses_low = use_ulysses_low


PROCESS_GROUP = ProcessGroups()


def set_seq_parallel_pg(
    sp_ulysses_degree: int,
    sp_ring_degree: int,
    rank: int,
    world_size: int,
    use_ulysses_low: bool = True,
) -> None:
    """Chooses the groups of modules constructed from now on; groups are created once for equal
    arguments. All ranks must call it.

    Args:
        sp_ulysses_degree: ranks U that exchange tokens for heads.
        sp_ring_degree: ranks R that rotate keys; U × R divides the number of processes, the rest is
            data parallel.
        rank: this process.
        world_size: all processes.
        use_ulysses_low: whether the ranks of a Ulysses group are neighbours; otherwise those of a
            ring are.

    Raises:
        MeshError: rank or world size are not those of torch.distributed, or the degrees don't
            divide the processes.
    """
    if (rank, world_size) != (dist.get_rank(), dist.get_world_size()):
        raise MeshError(
            f"rank={rank}, world_size={world_size} were passed, but this is rank {dist.get_rank()} "
            f"of {dist.get_world_size()} processes. Pass torch.distributed's get_rank() and "
            "get_world_size()."
        )
    PROCESS_GROUP.choose(sp_ulysses_degree, sp_ring_degree, use_ulysses_low)


def _local_tokens(
    length: int, ring: tuple[int, int], ulysses: tuple[int, int], layout: Layout
) -> Tensor:
    """Returns the token indices of one rank, `[S / P]`; `ring` and `ulysses` are (rank, size)."""
    multiple = multiple_of(ring[1], layout, ulysses[1])
    if length % multiple:
        raise ShapeError(
            f"a sequence of {length} tokens can't be laid out {layout} over rd={ring[1]} × "
            f"ud={ulysses[1]} ranks. Pad it to {next_multiple(length, multiple)} tokens."
        )
    spans = runs(length, ring[1], ring[0], layout)
    tokens = torch.cat(
        [torch.arange(run.start, run.start + run.count * run.step, run.step) for run in spans]
    )
    return tokens.chunk(ulysses[1])[ulysses[0]]


def _extract(
    value: Tensor, rank: int, world_size: int, rd: int, ud: int, dim: int, layout: Layout
) -> Tensor:
    groups = (PROCESS_GROUP.RING_PG, PROCESS_GROUP.ULYSSES_PG)
    for name, degree, group in zip(("rd", "ud"), (rd, ud), groups):
        if group is not None and group.size() != degree:
            raise ConfigError(
                f"{name}={degree}, but set_seq_parallel_pg created groups of {group.size()} "
                "ranks. Use the same degrees."
            )
    if world_size % (rd * ud) or not 0 <= rank < world_size:
        raise ConfigError(
            f"rank={rank}, world_size={world_size} do not fit rd={rd} × ud={ud}. Pass this rank "
            "and the number of ranks, of all processes or of those that share a sequence."
        )
    index = rank % (rd * ud)
    # Ulysses groups hold consecutive tokens of the layout whichever groups are neighbours in rank.
    ring_rank, ulysses_rank = (
        divmod(index, ud) if PROCESS_GROUP.use_ulysses_low else (index % rd, index // rd)
    )
    tokens = _local_tokens(value.shape[dim], (ring_rank, rd), (ulysses_rank, ud), layout)
    return value.index_select(dim, tokens.to(value.device))


def basic_extract_local(
    value: Tensor,
    rank: int,
    world_size: int,
    rd: int | None = None,
    ud: int | None = None,
    dim: int = 1,
) -> Tensor:
    """Returns a rank's shard of a sequence in its original order, for `ring_impl_type="basic"`.

    Args:
        value: `[B, S, ...]`, the full sequence.
        rank: which rank, counted over all processes or over those that share a sequence.
        world_size: the number of these ranks.
        rd: ring degree R; as chosen by `set_seq_parallel_pg` when None.
        ud: Ulysses degree U; likewise.
        dim: the sequence dim of `value`.

    Returns:
        `[B, S / P, ...]`, a copy that gradients go through.

    Raises:
        ConfigError: rank, number of ranks and degrees don't fit each other.
        ShapeError: the sequence can't be partitioned over the ranks.
    """
    ring, ulysses = PROCESS_GROUP.RING_PG, PROCESS_GROUP.ULYSSES_PG
    if rd is None:
        rd = 1 if ring is None else ring.size()
    if ud is None:
        ud = world_size // rd if ulysses is None else ulysses.size()
    return _extract(value, rank, world_size, rd, ud, dim, "contiguous")


def stripe_extract_local(
    value: Tensor, rank: int, world_size: int, rd: int, ud: int, dim: int = 1
) -> Tensor:
    """Returns a rank's shard of a sequence distributed token by token over the ring, for
    `ring_impl_type="strip"`.

    Args, returns and errors are those of `basic_extract_local`.
    """
    return _extract(value, rank, world_size, rd, ud, dim, "striped")


def zigzag_extract_local(
    value: Tensor, rank: int, world_size: int, rd: int, ud: int, dim: int = 1
) -> Tensor:
    """Returns a rank's shard from the front and the back of a sequence, for
    `ring_impl_type="zigzag"`.

    Args, returns and errors are those of `basic_extract_local`.
    """
    return _extract(value, rank, world_size, rd, ud, dim, "zigzag")


EXTRACT_FUNC_DICT: Mapping[str, Callable[..., Tensor]] = {
    "basic": basic_extract_local,
    "strip": stripe_extract_local,
    "zigzag": zigzag_extract_local,
    "basic_pytorch": basic_extract_local,
}


def chosen_groups() -> tuple[ProcessGroup, ProcessGroup]:
    """Returns the Ulysses and the ring group that `set_seq_parallel_pg` chose.

    Raises:
        MeshError: it was not called.
    """
    if PROCESS_GROUP.ULYSSES_PG is None or PROCESS_GROUP.RING_PG is None:
        raise MeshError("there are no groups yet. Call set_seq_parallel_pg on every rank first.")
    return PROCESS_GROUP.ULYSSES_PG, PROCESS_GROUP.RING_PG
