"""One step of a Llama against one process on every engine, through `accelerator.backward`.

FSDP2 computes in float64. DeepSpeed keeps gradients and master weights in float32 whatever the
model's dtype, so its models are float32 and are compared with the float64 reference: `FLOAT32` is
some hundred float32 roundings (6e-8 each) of sums over at most a few hundred terms, and a wrong
scale or a missing token is off by 1e-2 at least.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.helpers.batches import CASES, MASKED_CASES, Sample, loader
from tests.helpers.models import build
from tests.helpers.parity_jobs import (
    EXACT,
    Engine,
    Grads,
    Report,
    assert_parity,
    compare,
    data_rank,
    full_gradients,
    plain_step,
    report,
    zero_gradients,
)
from tests.helpers.ranks import run_ranks

FLOAT32 = 1e-5
Step = tuple[str, list[Sample], list[float], Grads]
ZERO = [Engine("deepspeed", stage, scatter) for stage in range(4) for scatter in (True, False)]
OFFLOADED = [Engine("deepspeed", stage, offload=True) for stage in (1, 2, 3)]


def expected_steps(dp_size: int) -> list[Step]:
    model = build("llama")
    steps = []
    for number, (case, sample) in enumerate({**CASES, **MASKED_CASES}.items()):
        samples = [sample(2 * number + rank) for rank in range(dp_size)]
        steps.append((case, samples, *plain_step(model, samples)))
    return steps


def keep_gradients(model: Any) -> Callable[[], Grads]:
    """Returns what gives the gradients of the last backward; DeepSpeed's are gone once its engine
    made the step.
    """
    if not hasattr(model, "zero_optimization"):
        return lambda: full_gradients(model)
    kept: list[Grads] = []
    step = model.step

    def keep_and_step() -> None:
        kept.append(full_gradients(model))
        step()

    model.step = keep_and_step
    return kept.pop


def engine_steps(engine: Engine, steps: list[Step], dp_size: int, sp_size: int) -> Report:
    accelerator = engine.accelerator(sp_size, dp_size)
    model = build("llama", torch.float32 if engine.name == "deepspeed" else torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    samples = [sample for _, together, _, _ in steps for sample in together]
    model, optimizer, batches = accelerator.prepare(model, optimizer, loader(samples))
    gradients = keep_gradients(model)
    results = {}
    for (case, _, losses, grads), batch in zip(steps, batches, strict=True):
        loss = model(**batch).loss
        accelerator.backward(loss)
        own = losses[data_rank(accelerator)]
        results[f"{engine}: {case}"] = report(
            compare(float(loss.detach()), gradients(), own, grads)
        )
        zero_gradients(model)
    return results


def all_engines(engines: list[Engine], steps: list[Step], dp_size: int, sp_size: int) -> Report:
    results: Report = {}
    for engine in engines:
        results.update(engine_steps(engine, steps, dp_size, sp_size))
    return results


@pytest.mark.parametrize(("dp_size", "sp_size"), [(1, 2), (1, 4), (2, 2)])
def test_fsdp2(dp_size: int, sp_size: int) -> None:
    steps = expected_steps(dp_size)
    engines = [Engine("fsdp2"), Engine("fsdp2", offload=True)]
    reports = run_ranks(
        all_engines, dp_size * sp_size, engines, steps, dp_size, sp_size, init=False
    )
    assert_parity(reports, EXACT, len(engines) * len(steps))


def test_deepspeed() -> None:
    steps = expected_steps(1)
    scattering = [engine for engine in ZERO if engine.reduce_scatter]
    reports = run_ranks(all_engines, 2, scattering, steps, 1, 2, init=False)
    assert_parity(reports, FLOAT32, len(scattering) * len(steps))


def test_deepspeed_without_reduce_scatter() -> None:
    steps = [
        step
        for step in expected_steps(1)
        if step[0] in ("packed", "odd length", "last ranks masked")
    ]
    engines = [engine for engine in ZERO if not engine.reduce_scatter]
    reports = run_ranks(all_engines, 2, engines, steps, 1, 2, init=False)
    assert_parity(reports, FLOAT32, len(engines) * 3)


@pytest.mark.parametrize(("dp_size", "sp_size"), [(1, 4), (2, 2)])
def test_deepspeed_on_four_ranks(dp_size: int, sp_size: int) -> None:
    steps = [
        step
        for step in expected_steps(dp_size)
        if step[0] in ("packed", "odd length", "a group masked")
    ]
    engines = [engine for engine in ZERO if engine.reduce_scatter]
    reports = run_ranks(all_engines, 4, engines, steps, dp_size, sp_size, init=False)
    assert_parity(reports, FLOAT32, len(engines) * 3)


def test_deepspeed_offload() -> None:
    steps = [
        step for step in expected_steps(1) if step[0] in ("packed", "padded left", "all masked")
    ]
    reports = run_ranks(all_engines, 2, OFFLOADED, steps, 1, 2, init=False)
    assert_parity(reports, FLOAT32, len(OFFLOADED) * 3)
