"""The attention layers that `benchmarks.exchange` compares: a rank's `[B, H, S/P, D]` in, `[B, S/P,
H, D]` out.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

OURS, DEEPSPEED, RINGMASTER, RINGMASTER_GLOO = (
    "ours",
    "DeepSpeed",
    "ringmaster",
    "ringmaster (gloo path)",
)
NAMED_BACKEND = "relabelled"


@dataclass(frozen=True)
class Case:
    """One attention layer: query heads, key/value heads, total tokens, head size, batch."""

    heads: int
    kv_heads: int
    tokens: int = 2048
    head_size: int = 64
    batch: int = 1

    def unit(self, world_size: int) -> int:
        """Bytes of one head of one rank's shard (float32)."""
        return self.batch * self.tokens // world_size * self.head_size * 4


class Layer(torch.nn.Module):
    """What transformers hands to an attention function as `module`."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.is_causal = True
        self.num_key_value_groups = case.heads // case.kv_heads


def available() -> dict[str, Callable[[Case], Attend]]:
    """Builders of the implementations that are installed, by name."""
    builders: dict[str, tuple[str, Callable[[Case], Attend]]] = {
        OURS: ("ulysses_accel.attention.ulysses.exchange", build_ours),
        DEEPSPEED: ("deepspeed", build_deepspeed),
        RINGMASTER: ("ringmaster", lambda case: build_ringmaster(case, NAMED_BACKEND)),
        RINGMASTER_GLOO: ("ringmaster", lambda case: build_ringmaster(case, "gloo")),
    }
    return {name: build for name, (module, build) in builders.items() if installed(module)}


def preload() -> None:
    """Import what the ranks will need before they are forked: importing costs seconds, forking
    milliseconds.
    """
    for module in (
        "transformers.modeling_utils",
        "deepspeed",
        "ringmaster",
        "ulysses_accel.attention",
    ):
        if installed(module):
            importlib.import_module(module)


def installed(module: str) -> bool:
    """Whether a module can be found without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def build_ours(case: Case) -> Attend:
    """`ulysses_accel.attention.ulysses_attention` on the world's group."""
    attention = importlib.import_module("ulysses_accel.attention").ulysses_attention

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = attention(
            query, key, value, dist.group.WORLD, is_causal=True, core="sdpa"
        )
        return output.transpose(1, 2)

    return attend


def build_deepspeed(case: Case) -> Attend:
    """DeepSpeed's `UlyssesSPAttentionHF` around transformers' sdpa."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False)
    group, layer = dist.group.WORLD, Layer(case)
    shard = case.tokens // dist.get_world_size()
    ulysses = UlyssesSPAttentionHF(
        attn=ALL_ATTENTION_FUNCTIONS["sdpa"],
        batch_size=case.batch,
        attn_head_count=case.heads,
        attn_head_size=case.head_size,
        kv_head_count=case.kv_heads,
        num_hidden_layers=1,
        process_group=group,
        seq_length_is_variable=True,
    )
    start = dist.get_rank() * shard
    positions = torch.arange(start, start + shard).expand(case.batch, -1).contiguous()

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = ulysses(layer, query, key, value, None, position_ids=positions)[0]
        return output.unflatten(-1, (-1, case.head_size)) if output.dim() == 3 else output

    return attend


def build_ringmaster(case: Case, backend: str) -> Attend:
    """ringmaster's Ulysses around transformers' sdpa, on a group whose backend has the given name.

    ringmaster replaces the all-to-all by an all-gather where the backend is called "gloo"; under
    another name the same gloo runs the path that it takes on GPUs.
    """
    import ringmaster
    from ringmaster.strategies.ulysses import make_ulysses_attention
    from torch.distributed.device_mesh import DeviceMesh

    if backend == NAMED_BACKEND:
        register_named_backend()
    world = dist.get_world_size()
    group = dist.new_group(backend=backend)
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("cp",))
    config = ringmaster.RingmasterConfig(
        size=world, backend=ringmaster.Backend.ULYSSES, ulysses_size=world, ring_size=1
    )
    runtime = ringmaster.setup(
        config, num_kv_heads=case.kv_heads, device_mesh=mesh, device_type="cpu", inner_attn="sdpa"
    )
    attention, layer = make_ulysses_attention("sdpa"), Layer(case)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ringmaster.set_runtime(runtime)
        output: torch.Tensor = attention(layer, query, key, value, None)[0]
        return output

    return attend


def core_only(case: Case, world_size: int) -> Callable[[], None]:
    """The attention core alone, forward and backward, on the shapes that a rank gets after the
    exchange.
    """
    group_size = case.heads // case.kv_heads
    heads = case.heads // world_size
    query, key, value = (
        torch.randn(case.batch, case.tokens, count, case.head_size).transpose(1, 2).requires_grad_()
        for count in (heads, max(heads // group_size, 1), max(heads // group_size, 1))
    )

    def run() -> None:
        output = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
        )
        torch.autograd.grad(output, (query, key, value), torch.ones_like(output))

    return run


def register_named_backend() -> None:
    """Makes gloo known under another name as well."""
    if NAMED_BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAMED_BACKEND, _create_gloo, devices=["cpu"])


def _create_gloo(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroup:
    return dist.ProcessGroupGloo(store, rank, size, timeout)
