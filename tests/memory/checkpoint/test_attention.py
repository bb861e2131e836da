"""Saved attention is never computed again, and with `save_exchange` no collective is repeated.

Counted by the block kernels' and the collectives' own calls; gradients are compared with the plain
model's on the same ranks, where the same kernels run in the same order: to 1e-13 in float64, since
attention that is kept runs by blocks.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import ulysses_accel
from tests.helpers.ranks import run_ranks
from ulysses_accel import MemoryConfig
from ulysses_accel.errors import ConfigError
from ulysses_accel.memory.apply import apply_memory
from ulysses_accel.memory.checkpoint.layers import CheckpointedLayers, checkpoint_layers

LAYERS, TOKENS, HIDDEN, HEADS = 3, 24, 32, 4
CLOSE = 1e-13


class Calls(TorchDispatchMode):
    """Counts attention kernels and all-to-alls."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = self.exchanges = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.attention += "flash_attention" in name and "backward" not in name
        self.exchanges += name.startswith("ulysses_accel.all_to_all")
        return func(*args, **(kwargs or {}))


def llama(dropout: float) -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "vocab_size": 64,
    }
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": 2, "attention_dropout": dropout}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False)).double().train()


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(0, 64, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(15), torch.arange(9)]).expand(2, -1).contiguous()
    return {"input_ids": tokens, "labels": tokens.clone(), "position_ids": positions}


def sharded_steps(
    sizes: dict[str, int], ways: list[dict[str, Any]], dropout: float
) -> list[dict[str, Any]]:
    """Returns for the plain model and for each way the counts and the distance from the plain
    model.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, parallelism_config=ulysses_accel.ParallelismConfig(**sizes))
    model = accelerator.prepare(llama(dropout))
    loader = accelerator.prepare_data_loader(
        torch.utils.data.DataLoader([0], collate_fn=lambda _: batch())
    )
    (local,) = list(loader)
    inner = accelerator.unwrap_model(model)
    plain: dict[str, Tensor] = {}
    results = []
    for way in [None, *ways]:
        engine = checkpoint_layers(inner, **way) if way is not None else None
        for _ in range(2):
            found = one_step(accelerator, model, local)
        grads = found.pop("grads")
        plain = plain or grads
        errors = [float((grads[name] - grad).norm() / grad.norm()) for name, grad in plain.items()]
        results.append({**found, "error": max(errors), **slab_bytes(engine)})
        if engine is not None:
            engine.close()
    return results


def slab_bytes(engine: CheckpointedLayers | None) -> dict[str, int]:
    return {"host": engine.attention_slab.num_bytes if engine is not None else 0}


def one_step(accelerator: Any, model: nn.Module, local: dict[str, Any]) -> dict[str, Any]:
    model.zero_grad()
    torch.manual_seed(5)
    with Calls() as forward:
        loss = model(**local).loss
    with Calls() as backward:
        accelerator.backward(loss)
    counts = {
        name: getattr(calls, name)
        for name, calls in (("attention", backward), ("exchanges", backward))
    }
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"forward": forward.attention, **counts, "grads": grads}


WAYS: list[dict[str, Any]] = [
    {},
    {"save_attention": "device"},
    {"save_attention": "host", "offload": True, "every_n_layers": 2},
    {"save_attention": "device", "save_exchange": True},
    {"save_attention": "host", "save_exchange": True, "offload": True},
]


@pytest.mark.parametrize("sizes", [{"sp_size": 2}, {"cp_size": 2}])
def test_attention_runs_once(sizes: dict[str, int]) -> None:
    for plain, again, device, host, exchange, both in run_ranks(
        sharded_steps, 2, sizes, WAYS, 0.0, init=False
    ):
        assert again["attention"] >= LAYERS
        assert all(way["attention"] == 0 for way in (device, host, exchange, both))
        assert all(way["error"] <= CLOSE for way in (again, device, host, exchange, both))
        if "sp_size" in sizes:
            # Backward: two of a layer's own, and two that its recompute repeats.
            assert plain["exchanges"] == exchange["exchanges"] == both["exchanges"] == 2 * LAYERS
            assert device["exchanges"] == again["exchanges"] == 4 * LAYERS
        tokens = 2 * TOKENS // 2
        output, lse = tokens * HIDDEN * 8, tokens * HEADS * 8
        assert host["host"] == LAYERS * (output + lse)


def test_dropout_is_replayed() -> None:
    for _, _, device, host, *_ in run_ranks(
        sharded_steps, 2, {"cp_size": 2}, WAYS, 0.3, init=False
    ):
        # Kernels with dropout are plain operations, which are not counted here; a mask drawn anew
        # would be far off.
        assert max(device["error"], host["error"]) <= CLOSE


def test_budget_keeps_whole_layers_from_the_last() -> None:
    each = 2 * TOKENS // 2 * (HIDDEN * 8 + 4 * HEADS)
    ways = [
        {"save_attention": "device", "save_attention_bytes": int(layers * each)}
        for layers in (0.9, 2.5, 99)
    ]
    for _, none, two, every in run_ranks(sharded_steps, 2, {"cp_size": 2}, ways, 0.0, init=False):
        per_layer = none["attention"] // LAYERS
        assert [none["attention"], two["attention"], every["attention"]] == [
            LAYERS * per_layer,
            per_layer,
            0,
        ]


def test_refusal() -> None:
    with pytest.raises(ConfigError, match="save_attention='disk'"):
        checkpoint_layers(llama(0.0), save_attention="disk")
    assert not dist.is_initialized()


def test_attention_runs_once_on_one_process() -> None:
    model = llama(0.0)
    tokens = batch()["input_ids"]

    def counted() -> tuple[int, dict[str, Tensor]]:
        model.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        with Calls() as calls:
            loss.backward()
        return calls.attention, {name: p.grad.clone() for name, p in model.named_parameters()}

    _, plain = counted()
    config = MemoryConfig(checkpoint=True)
    again = apply_memory(model, config)
    assert counted()[0] == LAYERS
    again.close()
    saving = apply_memory(model, MemoryConfig(checkpoint=True, save_attention="device"))
    calls, grads = counted()
    assert calls == 0
    assert (
        max(float((grads[name] - grad).norm() / grad.norm()) for name, grad in plain.items())
        <= CLOSE
    )
    saving.close()
    assert model.config._attn_implementation == "sdpa"
