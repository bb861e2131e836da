"""Every memory feature together, through a stock `Accelerator`: the same training as with none of
them.

Tolerance: 1e-12 of a value in float64, as in `tests.helpers.parity_jobs`; three AdamW steps keep
roundings below 1e-13.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ulysses_accel
from tests.helpers.models import build
from tests.helpers.ranks import run_ranks
from ulysses_accel import MemoryConfig, ParallelismConfig
from ulysses_accel.memory.apply import apply_memory
from ulysses_accel.memory.checkpoint.layers import CheckpointedLayers

CLOSE = 1e-12
STEPS = 3
KEPT = {
    "save_attention": "host",
    "save_exchange": True,
    "checkpoint_every_n_layers": 2,
    "bf16_gradient_reduction": False,
}


def everything() -> MemoryConfig:
    return MemoryConfig.alst(tiled_mlp_bytes=2_000, tiled_loss_tokens=8, **KEPT)


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(3, 60, (STEPS, 29), generator=generator)
    positions = torch.cat([torch.arange(17), torch.arange(12)])
    return [{"input_ids": row, "labels": row.clone(), "position_ids": positions} for row in tokens]


def train(sizes: dict[str, int], memory: MemoryConfig | None) -> dict[str, Any]:
    """Returns the losses, the parameters after the last step, and what was installed."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(
        cpu=True, parallelism_config=ParallelismConfig(**sizes, memory_config=memory)
    )
    model = build("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(samples(), batch_size=1)
    )
    losses = []
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    inner = accelerator.unwrap_model(model)
    parameters = {name: parameter.detach().clone() for name, parameter in inner.named_parameters()}
    return {"losses": losses, "parameters": parameters, "recomputed": num_recomputed(accelerator)}


def num_recomputed(accelerator: Any) -> int:
    memory = getattr(accelerator, "memory", None)
    parts = next(iter(memory.installed.values())).parts if memory is not None else []
    return sum(part.num_recomputed for part in parts if isinstance(part, CheckpointedLayers))


def both(sizes: dict[str, int]) -> dict[str, Any]:
    plain, saving = train(sizes, None), train(sizes, everything())
    errors = [abs(a - b) / abs(a) for a, b in zip(plain["losses"], saving["losses"], strict=True)]
    for name, parameter in plain["parameters"].items():
        errors.append(float((parameter - saving["parameters"][name]).norm() / parameter.norm()))
    return {"error": max(errors), "plain": plain["recomputed"], "saving": saving["recomputed"]}


@pytest.mark.parametrize("sizes", [{"sp_size": 2}, {"cp_size": 2}, {"dp_replicate_size": 2}])
def test_training_is_the_same(sizes: dict[str, int]) -> None:
    for result in run_ranks(both, 2, sizes, init=False):
        assert result["error"] <= CLOSE
        assert result["plain"] == 0
        # Two layers, once in each step.
        assert result["saving"] == 2 * -(-STEPS // sizes.get("dp_replicate_size", 1))


def step(model: nn.Module) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    batch = {name: tensor[None] for name, tensor in samples()[0].items()}
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_alone_without_an_accelerator() -> None:
    model = build("llama").train()
    expected, gradients = step(model)
    installed = apply_memory(model, everything())
    found, own = step(model)
    assert abs(found - expected) <= CLOSE * expected
    for name, gradient in gradients.items():
        assert (own[name] - gradient).norm() <= CLOSE * gradient.norm(), name
    installed.close()
    assert step(model)[0] == expected
    assert not any("forward" in vars(module) for module in model.modules())


def test_uninstall_gives_the_accelerator_its_methods_back() -> None:
    accelerator = Accelerator(
        cpu=True, parallelism_config=ParallelismConfig(memory_config=MemoryConfig.alst())
    )
    assert type(accelerator) is not Accelerator
    accelerator.memory.close()
    assert type(accelerator) is Accelerator
    assert not hasattr(accelerator, "memory")


def test_public_name() -> None:
    assert ulysses_accel.MemoryConfig is MemoryConfig
