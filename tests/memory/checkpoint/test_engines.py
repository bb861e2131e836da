"""Checkpointing on every engine, with the sequence shared by two ranks, against one process without
it.

Tolerances are those of `tests.parity.test_engines`: exact in float64, a few float32 roundings under
DeepSpeed, which keeps gradients in float32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.batches import loader
from tests.helpers.models import build
from tests.helpers.parity_jobs import (
    EXACT,
    Engine,
    Report,
    assert_parity,
    compare,
    data_rank,
    report,
    zero_gradients,
)
from tests.helpers.ranks import run_ranks
from tests.parity.test_engines import FLOAT32, Step, expected_steps, keep_gradients
from ulysses_accel.memory.checkpoint.layers import checkpoint_layers

WAYS: tuple[dict[str, Any], ...] = (
    {"offload": True},
    {"every_n_layers": 2, "offload": True, "keep_last": 0},
)


def checkpointed_steps(
    engines: list[Engine], steps: list[Step], sp_size: int, cp_size: int
) -> Report:
    results: Report = {}
    for engine in engines:
        for way in WAYS:
            results.update(one_way(engine, steps, sp_size, cp_size, way))
    return results


def one_way(
    engine: Engine, steps: list[Step], sp_size: int, cp_size: int, way: dict[str, Any]
) -> Report:
    accelerator = engine.accelerator(sp_size, cp_size=cp_size)
    model = build("llama", torch.float32 if engine.name == "deepspeed" else torch.float64)
    layers = checkpoint_layers(model, **way)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    samples = [sample for _, together, _, _ in steps for sample in together]
    model, optimizer, batches = accelerator.prepare(model, optimizer, loader(samples))
    gradients = keep_gradients(model)
    results = {}
    for (case, _, losses, grads), batch in zip(steps, batches, strict=True):
        loss = model(**batch).loss
        accelerator.backward(loss)
        own = losses[data_rank(accelerator)]
        results[f"{engine} {way}: {case}"] = report(
            compare(float(loss.detach()), gradients(), own, grads)
        )
        zero_gradients(model)
    assert layers.num_recomputed == len(steps) * len(layers.layers)
    assert layers.slab.num_bytes_used == 0
    return results


def chosen_steps() -> list[Step]:
    return [
        step
        for step in expected_steps(1)
        if step[0] in ("packed", "odd length", "last ranks masked")
    ]


@pytest.mark.parametrize(("sp_size", "cp_size"), [(2, 1), (1, 2)])
def test_exact_engines(sp_size: int, cp_size: int) -> None:
    engines, steps = [Engine("ddp"), Engine("fsdp2")], chosen_steps()
    reports = run_ranks(checkpointed_steps, 2, engines, steps, sp_size, cp_size, init=False)
    assert_parity(reports, EXACT, len(engines) * len(WAYS) * len(steps))


def test_deepspeed() -> None:
    engines, steps = [Engine("deepspeed", stage) for stage in (1, 3)], chosen_steps()
    reports = run_ranks(checkpointed_steps, 2, engines, steps, 2, 1, init=False)
    assert_parity(reports, FLOAT32, len(engines) * len(WAYS) * len(steps))
