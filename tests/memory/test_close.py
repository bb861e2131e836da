"""What `close()` leaves behind, and what a model with memory features leaves behind when it is
deleted: nothing, without the garbage collector.
"""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.models import build
from ulysses_accel import MemoryConfig
from ulysses_accel.memory import tile_loss, tile_mlp, tile_mlps, tile_norm, tile_norms
from ulysses_accel.memory.apply import InstalledMemory, apply_memory
from ulysses_accel.memory.checkpoint.host_slab import HostSlab
from ulysses_accel.memory.checkpoint.layers import CheckpointedLayers, checkpoint_layers

FEATURES: dict[str, dict[str, Any]] = {
    "tiled_mlp": {"tiled_mlp": True, "tiled_mlp_bytes": 2_000},
    "tiled_norm": {"tiled_norm": True},
    "tiled_loss": {"tiled_loss": True, "tiled_loss_tokens": 8},
    "checkpoint": {"checkpoint": True},
    "checkpoint_every_2": {"checkpoint": True, "checkpoint_every_n_layers": 2},
    "offload": {"checkpoint": True, "checkpoint_offload": True, "checkpoint_keep_last": 0},
    "attention_on_device": {"checkpoint": True, "save_attention": "device"},
    "attention_on_host": {"checkpoint": True, "save_attention": "host", "save_exchange": True},
    "attention_limited": {
        "checkpoint": True,
        "save_attention": "host",
        "save_attention_bytes": 10_000,
    },
    "everything": {
        "tiled_mlp": True,
        "tiled_mlp_bytes": 2_000,
        "tiled_norm": True,
        "tiled_loss": True,
        "tiled_loss_tokens": 8,
        "checkpoint": True,
        "checkpoint_offload": True,
        "checkpoint_keep_last": 0,
        "save_attention": "device",
    },
}


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def step(model: nn.Module) -> None:
    tokens = torch.randint(3, 60, (1, 29), generator=torch.Generator().manual_seed(4))
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    model.zero_grad()


def slabs_of(installed: InstalledMemory) -> list[weakref.ref[HostSlab]]:
    slabs = []
    for part in installed.parts:
        if isinstance(part, CheckpointedLayers):
            slabs += [weakref.ref(part.slab), weakref.ref(part.attention_slab)]
    return slabs


def contents(model: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """Returns every module's attributes: their identities, and the contents of its dicts."""
    result = []
    for name, module in model.named_modules():
        values: dict[str, Any] = {}
        for key, value in vars(module).items():
            values[key] = id(value)
            if isinstance(value, dict):
                values[f"{key} contents"] = [(entry, id(value[entry])) for entry in value]
        result.append((name, values))
    return result


@pytest.mark.parametrize("name", FEATURES)
def test_close_restores_every_module(name: str) -> None:
    model = build("llama").train()
    step(model)
    before = contents(model)
    installed = apply_memory(model, MemoryConfig(**FEATURES[name]))
    assert contents(model) != before
    step(model)
    installed.close()
    assert contents(model) == before
    installed.close()
    assert contents(model) == before


def test_close_restores_what_was_set_before() -> None:
    model = build("llama").train()
    model.gradient_checkpointing_enable()
    outer = apply_memory(model, MemoryConfig(**FEATURES["tiled_mlp"]))
    before = contents(model)
    inner = apply_memory(model, MemoryConfig(tiled_norm=True, checkpoint=True))
    step(model)
    inner.close()
    assert contents(model) == before
    outer.close()
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("name", FEATURES)
def test_a_deleted_model_is_freed(name: str) -> None:
    model = build("llama").train()
    installed = apply_memory(model, MemoryConfig(**FEATURES[name]))
    step(model)
    slabs = slabs_of(installed)
    alive = [weakref.ref(module) for module in model.modules()]
    alive += [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    assert not any(reference() is not None for reference in alive)
    # There is nothing to restore any more.
    installed.close()
    del installed
    assert not any(reference() is not None for reference in slabs)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(
    "install",
    [
        lambda model: tile_mlp(model.model.layers[0].mlp),
        lambda model: tile_norm(model.model.norm),
        tile_mlps,
        lambda model: tile_norms(model)[0],
        tile_loss,
        checkpoint_layers,
    ],
    ids=["tile_mlp", "tile_norm", "tile_mlps", "tile_norms", "tile_loss", "checkpoint_layers"],
)
def test_an_installation_does_not_keep_its_model(install: Any) -> None:
    model = build("llama").train()
    before = contents(model)
    install(model).close()
    assert contents(model) == before
    installed = install(model)
    step(model)
    alive = weakref.ref(model)
    del model
    assert alive() is None
    # There is nothing to restore any more.
    installed.close()


@pytest.mark.parametrize("name", ["tiled_loss", "checkpoint", "offload"])
def test_a_deep_copy_is_independent(name: str) -> None:
    model = build("llama").train()
    installed = apply_memory(model, MemoryConfig(**FEATURES[name]))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    installed.close()
    tokens = torch.randint(3, 60, (1, 29), generator=torch.Generator().manual_seed(4))
    output = twin(input_ids=tokens, labels=tokens, use_cache=False)
    output.loss.backward()
    # Logits of zero: each of the vocabulary's tokens is as likely.
    assert float(output.loss.detach()) == pytest.approx(math.log(model.config.vocab_size))
    assert all(parameter.grad is not None for parameter in twin.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
