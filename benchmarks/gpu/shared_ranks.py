"""Two ranks that share one GPU: the exchange on device tensors, for its numbers and not for its
speed.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks.gpu.scale import Scale
from benchmarks.memory.measure import relative_error
from ulysses_accel.attention.strategy import usp_attention

RANKS = 2
# bfloat16 keeps 8 bits, and both sides are rounded.
TOLERANCE = 2e-2


def shared_ranks(scale: Scale) -> dict[str, Any]:
    """Ulysses and ring attention of two gloo ranks on the same device (NCCL refuses two ranks on
    one).
    """
    tokens = 4 * scale.unit if scale.device.type == "cuda" else 64
    with tempfile.TemporaryDirectory() as folder:
        settings = (
            folder,
            scale.device.type,
            tokens,
            scale.heads,
            scale.key_heads,
            scale.hidden // scale.heads,
        )
        spawn(_rank_main, args=settings, nprocs=RANKS)
        errors: dict[str, Any] = json.loads((Path(folder) / "errors.json").read_text())
    texts = [
        f"{kind} {value}"
        if isinstance(value, str)
        else f"{kind} {value:.1e}{'' if value <= TOLERANCE else ' WRONG'}"
        for kind, value in errors.items()
    ]
    return {"tokens": tokens, "errors": errors, "finding": "errors " + ", ".join(texts)}


def _rank_main(
    rank: int, folder: str, device: str, tokens: int, heads: int, key_heads: int, size: int
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), RANKS)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    errors: dict[str, Any] = {}
    for kind in ("ulysses", "ring"):
        try:
            errors[kind] = _error(rank, device, tokens, (heads, key_heads, size), kind)
        except RuntimeError as error:
            # Which collectives gloo has for device tensors is its own affair, and the same on both
            # ranks.
            errors[kind] = f"refused: {str(error).strip().splitlines()[0][:120]}"
    if rank == 0:
        (Path(folder) / "errors.json").write_text(json.dumps(errors))
    dist.destroy_process_group()


def _error(rank: int, device: str, tokens: int, sizes: tuple[int, int, int], kind: str) -> float:
    """The worst relative error of output and gradients of this rank's tokens."""
    heads, key_heads, size = sizes
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    counts = (heads, key_heads, key_heads, heads)
    whole = [
        torch.randn(1, count, tokens, size, generator=generator).to(device, dtype)
        for count in counts
    ]
    *inputs, grad = whole
    reference = _run(inputs, grad, lambda q, k, v: usp_attention(q, k, v, None, None))
    own = slice(rank * tokens // RANKS, (rank + 1) * tokens // RANKS)
    groups = (dist.group.WORLD, None) if kind == "ulysses" else (None, dist.group.WORLD)
    shards = [tensor[:, :, own].contiguous() for tensor in whole]
    found = _run(
        shards[:3], shards[3], lambda q, k, v: usp_attention(q, k, v, *groups, layout="contiguous")
    )
    return max(
        relative_error(mine, full[:, :, own].double()) for mine, full in zip(found, reference)
    )


def _run(inputs: list[torch.Tensor], grad: torch.Tensor, attend: Any) -> list[torch.Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = attend(*leaves)
    output.backward(grad)
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
