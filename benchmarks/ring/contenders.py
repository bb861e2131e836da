"""The rings, and the Ulysses groups in a ring, that `benchmarks.exchange` compares.

Interface as in `benchmarks.contenders`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.contenders import NAMED_BACKEND, Attend, Case, Layer, installed
from ulysses_accel.sequence.layout import LAYOUTS, Layout

OURS_USP, OURS_ULYSSES = "ours, 2 × 2", "ours, Ulysses alone"
TORCH = "torch, zigzag alltoall"


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Args:
        module: what must be installed.
        build: makes it for a case; called on every rank.
        layout: how its tokens are dealt over the ring.
        shares_kernel: whether its blocks are computed by the same fused operator as ours. Where
            they are plain tensor operations, which on a GPU would be a fused kernel too, copies,
            memory and times say nothing about it.
    """

    module: str
    build: Callable[[Case], Attend]
    layout: Layout = "contiguous"
    shares_kernel: bool = True


def rings() -> dict[str, Contender]:
    """Rings over the whole world, by name."""
    found: dict[str, Contender] = {}
    for layout in LAYOUTS:
        for exchange in ("p2p", "all_gather"):
            found[f"ours, {layout} {exchange}"] = _ours(layout, exchange)
    found[TORCH] = _torch("zigzag", False)
    found["torch, zigzag allgather"] = _torch("zigzag", True)
    found["torch, contiguous alltoall"] = _torch("contiguous", False)
    found["YunChang, zigzag"] = _yunchang("zigzag", "zigzag")
    found["YunChang, basic"] = _yunchang("basic", "contiguous")
    found["YunChang, strip"] = _yunchang("strip", "striped")
    found["ringmaster, zigzag"] = _ringmaster("zigzag", balance="head_tail")
    found["ringmaster, p2p"] = _ringmaster("contiguous", rotate="alltoall")
    found["ringmaster, allgather"] = _ringmaster("contiguous", rotate="allgather")
    found["ring-attention-pytorch"] = _lucidrains("contiguous")
    found["ring-attention-pytorch, striped"] = _lucidrains("striped")
    return {name: contender for name, contender in found.items() if installed(contender.module)}


def unified() -> dict[str, Contender]:
    """Rings of two places over groups of Ulysses ranks, by name, beside our Ulysses and ring
    alone.
    """
    found = {
        f"{OURS_USP} zigzag p2p": _ours_usp("p2p"),
        f"{OURS_USP} zigzag all_gather": _ours_usp("all_gather"),
        OURS_ULYSSES: Contender("ulysses_accel", _build_our_ulysses),
        "YunChang, 2 × 2 zigzag": _yunchang("zigzag", "zigzag", ring_size=2),
        "YunChang, 2 × 2 basic": _yunchang("basic", "contiguous", ring_size=2),
        "ringmaster, 2 × 2 p2p": _ringmaster("contiguous", rotate="alltoall", ring_size=2),
        "ringmaster, 2 × 2 allgather": _ringmaster("contiguous", rotate="allgather", ring_size=2),
    }
    return {name: contender for name, contender in found.items() if installed(contender.module)}


def preload() -> None:
    """Import what the ranks will need before they are forked; YunChang needs its stand-in, and
    takes a moment only.
    """
    for module in ("benchmarks.ring.torch_ring", "ring_attention_pytorch"):
        if installed(module):
            importlib.import_module(module)


def _ours(layout: Layout, exchange: Any) -> Contender:
    def build(_: Case) -> Attend:
        attention = importlib.import_module("ulysses_accel.attention").ring_attention

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            output: Tensor = attention(
                query, key, value, dist.group.WORLD, layout=layout, exchange=exchange
            )
            return output.transpose(1, 2)

        return attend

    return Contender("ulysses_accel", build, layout)


def _grid(
    ring_size: int, backend: str = "gloo"
) -> tuple[dist.ProcessGroup, dist.ProcessGroup, Tensor]:
    """Returns this rank's ring, its Ulysses group, and all ranks as `[R, U]`; neighbours are
    Ulysses ranks.
    """
    ranks = torch.arange(dist.get_world_size()).view(ring_size, -1)
    ring = dist.new_subgroups_by_enumeration(ranks.T.tolist(), backend=backend)[0]
    ulysses = dist.new_subgroups_by_enumeration(ranks.tolist(), backend=backend)[0]
    return ring, ulysses, ranks


def _ours_usp(exchange: Any) -> Contender:
    def build(_: Case) -> Attend:
        attention = importlib.import_module("ulysses_accel.attention").usp_attention
        ring, ulysses, _ranks = _grid(2)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            output: Tensor = attention(
                query, key, value, ulysses, ring, layout="zigzag", exchange=exchange
            )
            return output.transpose(1, 2)

        return attend

    return Contender("ulysses_accel", build, "zigzag")


def _build_our_ulysses(_: Case) -> Attend:
    attention = importlib.import_module("ulysses_accel.attention").ulysses_attention
    return lambda query, key, value: attention(query, key, value, dist.group.WORLD).transpose(1, 2)


def _torch(layout: Layout, gathers: bool) -> Contender:
    def build(_: Case) -> Attend:
        ring = importlib.import_module("benchmarks.ring.torch_ring").torch_ring
        zigzag = layout == "zigzag"
        return lambda query, key, value: ring(
            query, key, value, dist.group.WORLD, zigzag=zigzag, gathers=gathers
        ).transpose(1, 2)

    return Contender("torch", build, layout)


def _yunchang(kind: str, layout: Layout, ring_size: int | None = None) -> Contender:
    def build(case: Case) -> Attend:
        from benchmarks.ring.yunchang_ring import build_yunchang

        return build_yunchang(case, kind, ring_size or dist.get_world_size())

    return Contender("yunchang", build, layout)


def _lucidrains(layout: Layout) -> Contender:
    def build(case: Case) -> Attend:
        from ring_attention_pytorch.ring_flash_attention import ring_flash_attn_

        groups = case.heads // case.kv_heads
        options = (None, True, case.tokens, True, layout == "striped", None, None, False, 50.0)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # It pairs query head h with key head h mod K, transformers with h // (H / K).
            query = query.unflatten(1, (-1, groups)).transpose(1, 2).flatten(1, 2)
            output: Tensor = ring_flash_attn_(
                *(t.transpose(1, 2) for t in (query, key, value)), *options
            )
            return output.unflatten(2, (groups, -1)).transpose(2, 3).flatten(2, 3)

        return attend

    return Contender("ring_attention_pytorch", build, layout, shares_kernel=False)


def _ringmaster(
    layout: Layout, rotate: str = "alltoall", balance: str = "none", ring_size: int | None = None
) -> Contender:
    """ringmaster's ring on the path of its GPU collectives; its blocks are plain tensor operations
    on a CPU.

    Its zigzag ring runs on a CPU only as that of packed documents: here one, that is the whole
        sequence.
    """

    def build(case: Case) -> Attend:
        import ringmaster
        from ringmaster.strategies.ring import make_ring_attention
        from ringmaster.strategies.usp import make_usp_attention

        world = dist.get_world_size()
        size, method = ring_size or world, ringmaster.RotateMethod(rotate)
        config = ringmaster.RingmasterConfig(
            size=world,
            ulysses_size=world // size,
            ring_size=size,
            rotate_method=method,
            load_balance=ringmaster.LoadBalance(balance),
        )
        runtime = ringmaster.setup(
            config, num_kv_heads=case.kv_heads, device_mesh=_mesh(size), device_type="cpu"
        )
        if balance == "head_tail":
            ends = torch.arange(case.batch + 1, dtype=torch.int32) * case.tokens
            runtime.varlen = (ends, case.tokens)
        make = make_ring_attention if size == world else make_usp_attention
        attention, layer = make("math", "math", method), Layer(case)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            ringmaster.set_runtime(runtime)
            output: Tensor = attention(layer, query, key, value, None)[0]
            return output

        return attend

    return Contender("ringmaster", build, layout, shares_kernel=False)


def _mesh(ring_size: int) -> Any:
    """Returns the mesh that ringmaster reads its groups from, of gloo under another name: see
    `build_ringmaster`.
    """
    from torch.distributed.device_mesh import DeviceMesh

    from benchmarks.contenders import register_named_backend

    register_named_backend()
    ring, ulysses, ranks = _grid(ring_size, NAMED_BACKEND)
    if ranks.shape[1] == 1:
        return DeviceMesh.from_group(ring, "cpu", mesh_dim_names=("cp",))
    return DeviceMesh.from_group(
        [ring, ulysses], "cpu", mesh=ranks, mesh_dim_names=("cp_ring", "cp_ulysses")
    )
