"""The tiled loss under every engine, with sequences sharded over two ranks, against one process
without it.

Tolerances are those of tests/parity/test_engines.py: exact in float64; DeepSpeed computes in
float32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh

from tests.helpers.batches import CASES, MASKED_CASES, Sample, loader
from tests.helpers.models import build
from tests.helpers.parity_jobs import (
    EXACT,
    Engine,
    Grads,
    Report,
    assert_parity,
    compare,
    full_gradients,
    plain_step,
    report,
)
from tests.helpers.ranks import run_ranks
from tests.memory.tiled_loss.test_models import batch
from tests.parity.test_engines import FLOAT32, keep_gradients
from ulysses_accel.memory import tile_loss

KINDS = ("packed", "odd length", "last ranks masked", "all masked")
Step = tuple[str, Sample, float, Grads]


def expected_steps(name: str) -> list[Step]:
    model = build(name)
    steps = []
    for number, (case, sample) in enumerate({**CASES, **MASKED_CASES}.items()):
        if case in KINDS:
            made = sample(number)
            losses, grads = plain_step(model, [made])
            steps.append((case, made, losses[0], grads))
    assert len(steps) == len(KINDS)
    return steps


def engine_steps(
    engine: Engine, name: str, steps: list[Step], before_prepare: bool, options: dict[str, Any]
) -> Report:
    accelerator = engine.accelerator(sp_size=2)
    model = build(name, torch.float32 if engine.name == "deepspeed" else torch.float64)
    if before_prepare:
        tile_loss(model, tile_tokens=3, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model, optimizer, batches = accelerator.prepare(
        model, optimizer, loader([sample for _, sample, _, _ in steps])
    )
    if not before_prepare:
        tile_loss(model, tile_tokens=3, **options)
    gradients = keep_gradients(model)
    results = {}
    for (case, _, expected_loss, expected), sharded in zip(steps, batches, strict=True):
        output = model(**sharded)
        assert output.logits is None
        accelerator.backward(output.loss)
        results[case] = report(
            compare(float(output.loss.detach()), gradients(), expected_loss, expected)
        )
        model.zero_grad() if engine.name == "deepspeed" else optimizer.zero_grad()
    return results


def all_engines(engines: tuple[Engine, ...], name: str, steps: list[Step]) -> list[Report]:
    """Installs before prepare and holds gradients, installs after it and makes them in backward."""
    modes = ((True, {}), (False, {"recompute": True}))
    return [engine_steps(engine, name, steps, *mode) for engine in engines for mode in modes]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sharded_sequences_exactly(name: str) -> None:
    for reports in run_ranks(
        all_engines, 2, (Engine(), Engine("fsdp2")), name, expected_steps(name), init=False
    ):
        assert_parity(reports, EXACT, len(KINDS))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sharded_sequences_under_deepspeed(name: str) -> None:
    engines = (Engine("deepspeed", 1), Engine("deepspeed", 3))
    for reports in run_ranks(all_engines, 2, engines, name, expected_steps(name), init=False):
        assert_parity(reports, FLOAT32, len(KINDS))


def _own_group(recompute: bool, with_norm: bool) -> list[dict[str, Tensor]]:
    """Returns two steps' gradients of a model whose head is resharded after its forward."""
    model = build("llama")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    last = [model.model.norm, model.lm_head] if with_norm else model.lm_head
    for part in (*model.model.layers, last, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    tile_loss(model, tile_tokens=5, recompute=recompute)
    steps = []
    for _ in range(2):
        model.zero_grad()
        model(**batch()).loss.backward()
        steps.append(full_gradients(model))
    return steps


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("with_norm", [False, True])
def test_a_head_that_is_resharded_after_its_forward(recompute: bool, with_norm: bool) -> None:
    model = build("llama")
    model(**batch()).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for grads in [
        step for steps in run_ranks(_own_group, 2, recompute, with_norm) for step in steps
    ]:
        assert grads.keys() == expected.keys()
        for name, grad in expected.items():
            assert (grads[name] - grad).norm() <= EXACT * grad.norm(), name
