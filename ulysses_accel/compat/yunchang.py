"""YunChang's interface (long-context-attention 0.6) on this package's ring, Ulysses and unified attention.

Names, signatures and token layouts are YunChang's, tensors are its `[B, s, H, D]`. What can't be computed exactly is
refused by the argument's name. Data parallelism on top needs nothing: groups and layouts are of the ranks that share a
sequence, whether these are counted in the world or among themselves.
Shapes: B = rows, S = tokens of the whole sequence, H / K = query / key-value heads, U = Ulysses ranks, R = ring ranks,
P = U × R, s = S / P tokens, D / Dv = head sizes.
Source: USP (arXiv 2405.07719), https://github.com/feifeibear/long-context-attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ulysses_accel.attention import usp_attention
from ulysses_accel.errors import ConfigError, MeshError, ShapeError, UnsupportedModelError, closest
from ulysses_accel.mesh import ring_and_ulysses_groups
from ulysses_accel.sequence import next_multiple
from ulysses_accel.sequence_layout import Layout, multiple_of, runs

_LAYOUTS: dict[str, Layout] = {
    "basic": "contiguous",
    "zigzag": "zigzag",
    "strip": "striped",
    "basic_pytorch": "contiguous",
}


class AttnType(Enum):
    """YunChang's names of attention kernels; exact ones all give the same numbers here, the others are refused."""

    AITER = "aiter"
    FA = "fa"
    FA3 = "fa3"
    FLASHINFER = "flashinfer"
    TORCH = "torch"
    TORCH_MATH = "torch_math"
    TORCH_FLASH = "torch_flash"
    TORCH_EFFICIENT = "torch_efficient"
    TORCH_CUDNN = "torch_cudnn"
    NPU = "npu"
    SAGE_AUTO = "sage_auto"
    SAGE_FP16 = "sage_fp16"
    SAGE_FP16_TRITON = "sage_fp16_triton"
    SAGE_FP8 = "sage_fp8"
    SAGE_FP8_SM90 = "sage_fp8_sm90"
    SPARSE_SAGE = "sparse_sage"

    @classmethod
    def from_string(cls, s: str) -> AttnType:
        """Returns the kernel of that value, `fa`, `torch_flash`, ...

        Raises:
            ConfigError: there is none.
        """
        for member in cls:
            if member.value == s:
                return member
        raise ConfigError(f"attn_type={s!r} is not known.{closest(s, [member.value for member in cls])}")

    @property
    def is_exact(self) -> bool:
        """Whether the kernel computes attention itself, not a quantized or sparse approximation."""
        return "sage" not in self.value


class ProcessGroups:
    """The groups of this process that `set_seq_parallel_pg` chose, and those that it made so far.

    `ULYSSES_PG` and `RING_PG` are None until then. Modules keep the groups that were chosen when they were made.
    """

    def __init__(self) -> None:
        self.ULYSSES_PG: ProcessGroup | None = None
        self.RING_PG: ProcessGroup | None = None
        self.use_ulysses_low = True
        self._made: dict[tuple[int, int, bool], tuple[ProcessGroup, ProcessGroup]] = {}
        self._world: ProcessGroup | None = None

    def choose(self, ulysses_degree: int, ring_degree: int, use_ulysses_low: bool) -> None:
        """Makes the groups where they are not there yet, and chooses them; every rank must call it."""
        if self._world is not dist.group.WORLD:
            # torch.distributed was started anew, and its old groups are gone.
            self._made, self._world = {}, dist.group.WORLD
        wanted = (ulysses_degree, ring_degree, use_ulysses_low)
        if wanted not in self._made:
            self._made[wanted] = ring_and_ulysses_groups(ring_degree, ulysses_degree, ulysses_inside=use_ulysses_low)
        self.RING_PG, self.ULYSSES_PG = self._made[wanted]
        self.use_ulysses_low = use_ulysses_low


PROCESS_GROUP = ProcessGroups()


def set_seq_parallel_pg(
    sp_ulysses_degree: int, sp_ring_degree: int, rank: int, world_size: int, use_ulysses_low: bool = True
) -> None:
    """Chooses the groups of modules made from now on; groups are made once for equal arguments. All ranks must call it.

    Args:
        sp_ulysses_degree: ranks U that exchange tokens for heads.
        sp_ring_degree: ranks R that rotate keys; U × R divides the number of processes, the rest is data parallel.
        rank: this process.
        world_size: all processes.
        use_ulysses_low: whether the ranks of a Ulysses group are neighbours; otherwise those of a ring are.

    Raises:
        MeshError: rank or world size are not those of torch.distributed, or the degrees don't divide the processes.
    """
    if (rank, world_size) != (dist.get_rank(), dist.get_world_size()):
        raise MeshError(
            f"rank={rank}, world_size={world_size} were given, but this is rank {dist.get_rank()} of "
            f"{dist.get_world_size()} processes. Give torch.distributed's get_rank() and get_world_size()."
        )
    PROCESS_GROUP.choose(sp_ulysses_degree, sp_ring_degree, use_ulysses_low)


def _own_tokens(length: int, ring: tuple[int, int], ulysses: tuple[int, int], layout: Layout) -> Tensor:
    """Returns the token positions of one place, `[S / P]`; `ring` and `ulysses` are (rank, size)."""
    multiple = multiple_of(ring[1], layout, ulysses[1])
    if length % multiple:
        raise ShapeError(
            f"a sequence of {length} tokens can't be laid out {layout} over rd={ring[1]} × ud={ulysses[1]} ranks. "
            f"Pad it to {next_multiple(length, multiple)} tokens."
        )
    spans = runs(length, ring[1], ring[0], layout)
    tokens = torch.cat([torch.arange(run.start, run.start + run.count * run.step, run.step) for run in spans])
    return tokens.chunk(ulysses[1])[ulysses[0]]


def _extract(value: Tensor, rank: int, world_size: int, rd: int, ud: int, dim: int, layout: Layout) -> Tensor:
    groups = (PROCESS_GROUP.RING_PG, PROCESS_GROUP.ULYSSES_PG)
    for name, degree, group in zip(("rd", "ud"), (rd, ud), groups):
        if group is not None and group.size() != degree:
            raise ConfigError(
                f"{name}={degree}, but set_seq_parallel_pg made groups of {group.size()} ranks. Give the same degrees."
            )
    if world_size % (rd * ud) or not 0 <= rank < world_size:
        raise ConfigError(
            f"rank={rank}, world_size={world_size} do not fit rd={rd} × ud={ud}. Give this rank and the number of "
            f"ranks, of all processes or of those that share a sequence."
        )
    place = rank % (rd * ud)
    # Ulysses groups hold consecutive tokens of the layout whichever groups are neighbours in rank.
    ring_rank, ulysses_rank = divmod(place, ud) if PROCESS_GROUP.use_ulysses_low else (place % rd, place // rd)
    own = _own_tokens(value.shape[dim], (ring_rank, rd), (ulysses_rank, ud), layout)
    return value.index_select(dim, own.to(value.device))


def basic_extract_local(
    value: Tensor, rank: int, world_size: int, rd: int | None = None, ud: int | None = None, dim: int = 1
) -> Tensor:
    """Returns a rank's part of a sequence in its own order, for `ring_impl_type="basic"`.

    Args:
        value: `[B, S, ...]`, the whole sequence.
        rank: which rank, counted over all processes or over those that share a sequence.
        world_size: how many ranks are counted so.
        rd: ring degree R; as chosen by `set_seq_parallel_pg` when None.
        ud: Ulysses degree U; likewise.
        dim: the sequence dim of `value`.

    Returns:
        `[B, S / P, ...]`, a copy that gradients go through.

    Raises:
        ConfigError: rank, number of ranks and degrees don't fit each other.
        ShapeError: the sequence can't be dealt to the ranks.
    """
    ring, ulysses = PROCESS_GROUP.RING_PG, PROCESS_GROUP.ULYSSES_PG
    rd = rd if rd is not None else (ring.size() if ring is not None else 1)
    ud = ud if ud is not None else (ulysses.size() if ulysses is not None else world_size // rd)
    return _extract(value, rank, world_size, rd, ud, dim, "contiguous")


def stripe_extract_local(value: Tensor, rank: int, world_size: int, rd: int, ud: int, dim: int = 1) -> Tensor:
    """Returns a rank's part of a sequence dealt token by token over the ring, for `ring_impl_type="strip"`.

    Args, returns and errors are those of `basic_extract_local`.
    """
    return _extract(value, rank, world_size, rd, ud, dim, "striped")


def zigzag_extract_local(value: Tensor, rank: int, world_size: int, rd: int, ud: int, dim: int = 1) -> Tensor:
    """Returns a rank's part from the front and the back of a sequence, for `ring_impl_type="zigzag"`.

    Args, returns and errors are those of `basic_extract_local`.
    """
    return _extract(value, rank, world_size, rd, ud, dim, "zigzag")


EXTRACT_FUNC_DICT: Mapping[str, Callable[..., Tensor]] = {
    "basic": basic_extract_local,
    "strip": stripe_extract_local,
    "zigzag": zigzag_extract_local,
    "basic_pytorch": basic_extract_local,
}


def _layout_of(ring_impl_type: str) -> Layout:
    if ring_impl_type not in _LAYOUTS:
        raise ConfigError(f"ring_impl_type={ring_impl_type!r} is not known.{closest(ring_impl_type, _LAYOUTS)}")
    return _LAYOUTS[ring_impl_type]


def _check_kernel(attn_type: AttnType, attn_processor: Any = None) -> None:
    if not attn_type.is_exact:
        raise UnsupportedModelError(
            f"attn_type={attn_type} approximates attention, which is not computed here. Use AttnType.FA."
        )
    if attn_processor is not None:
        raise UnsupportedModelError(
            f"attn_processor={type(attn_processor).__name__} is not run: blocks are computed by torch's kernels. "
            f"Use attn_processor=None."
        )


def _check_dims(scatter_idx: int, gather_idx: int, heads_dim: int) -> None:
    if (scatter_idx, gather_idx) != (heads_dim, 1):
        raise ConfigError(
            f"scatter_idx={scatter_idx}, gather_idx={gather_idx} are not computed: heads are dim {heads_dim}, tokens "
            f"dim 1. Use scatter_idx={heads_dim}, gather_idx=1."
        )


def _chosen_groups() -> tuple[ProcessGroup, ProcessGroup]:
    if PROCESS_GROUP.ULYSSES_PG is None or PROCESS_GROUP.RING_PG is None:
        raise MeshError("there are no groups yet. Call set_seq_parallel_pg on every rank first.")
    return PROCESS_GROUP.ULYSSES_PG, PROCESS_GROUP.RING_PG


def _window(window_size: tuple[int, int]) -> int | None:
    """Returns how many tokens one sees, itself included; None for all."""
    left, right = window_size
    if (left, right) == (-1, -1):
        return None
    if left < 0 or right != 0:
        raise UnsupportedModelError(
            f"window_size={tuple(window_size)} is not computed. Use (w - 1, 0), which lets a token see w tokens up to "
            f"itself, or (-1, -1)."
        )
    return left + 1


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ulysses_group: ProcessGroup | None,
    ring_group: ProcessGroup | None,
    layout: Layout,
    *,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """Runs unified attention on `[B, s, H, D]`, or says which argument it does not compute."""
    window = _window(window_size)
    ring_size = ring_group.size() if ring_group is not None else 1
    refused = {"alibi_slopes": alibi_slopes is not None, "return_attn_probs": return_attn_probs}
    if ring_size > 1 or window is not None:
        refused |= {"dropout_p": dropout_p != 0.0, "softcap": softcap != 0.0}
    if query.device.type != "cpu":
        refused["deterministic"] = deterministic and not torch.are_deterministic_algorithms_enabled()
    for name in [name for name, wanted in refused.items() if wanted]:
        given = {"dropout_p": dropout_p, "softcap": softcap}.get(name, "set")
        raise UnsupportedModelError(
            f"{name} ({given}) is not computed on a ring of {ring_size} with window_size={tuple(window_size)}. "
            f"{_REMEDIES[name]}"
        )
    # With a window only its halo needs to travel.
    exchange: Any = "p2p" if window is None else "all_gather"
    # sdpa has no soft cap; eager has one everywhere, flash only on its devices.
    core = "sdpa" if softcap == 0.0 else ("eager" if query.device.type == "cpu" else "flash_attention_2")
    out = usp_attention(
        *(tensor.transpose(1, 2) for tensor in (query, key, value)),
        ulysses_group,
        ring_group,
        # A window without keys behind the query is causal, with or without the flag.
        is_causal=causal or window is not None,
        window=window,
        scale=softmax_scale,
        dropout=dropout_p,
        softcap=softcap or None,
        layout=layout,
        exchange=exchange,
        core=core,
    )
    return out.transpose(1, 2)


_REMEDIES = {
    "alibi_slopes": "Use alibi_slopes=None.",
    "return_attn_probs": "Use return_attn_probs=False: scores are never held whole.",
    "dropout_p": "Use dropout_p=0.0, or sp_ring_degree=1 without a window.",
    "softcap": "Use softcap=0.0, or sp_ring_degree=1 without a window.",
    "deterministic": "Call torch.use_deterministic_algorithms(True), which torch's kernels follow.",
}
