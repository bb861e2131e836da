"""One step of a Llama in a ring, and in a ring of Ulysses groups, against one process on FSDP2 and
DeepSpeed.

Tolerances as in `test_engines.py`: FSDP2 computes in float64, DeepSpeed's gradients are float32.
"""

from __future__ import annotations

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
    counted_linear_tokens,
    data_rank,
    report,
    zero_gradients,
)
from tests.helpers.ranks import run_ranks
from tests.parity.test_engines import FLOAT32, Step, expected_steps, keep_gradients
from ulysses_accel.sequence.description import DESCRIPTION_KEY
from ulysses_accel.sequence.layout import Layout

KINDS = ("plain", "packed", "padded left", "odd length", "a group masked")
FSDP2 = [Engine("fsdp2"), Engine("fsdp2", offload=True)]
DEEPSPEED = [Engine("deepspeed", stage) for stage in (1, 2, 3)]
# (data parallel, ring, Ulysses) degrees.
SPLITS = [(1, 2, 1), (1, 2, 2), (2, 2, 1)]
Split = tuple[int, int, int]


def chosen_steps(dp_size: int) -> list[Step]:
    return [step for step in expected_steps(dp_size) if step[0] in KINDS]


def ring_steps(engine: Engine, steps: list[Step], split: Split, layout: Layout) -> Report:
    dp_size, cp_size, sp_size = split
    accelerator = engine.accelerator(sp_size, dp_size, cp_size=cp_size)
    model = build("llama", torch.float32 if engine.name == "deepspeed" else torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    samples = [sample for _, together, _, _ in steps for sample in together]
    model, optimizer, batches = accelerator.prepare(model, optimizer, loader(samples))
    gradients = keep_gradients(model)
    results = {}
    for (case, together, losses, grads), batch in zip(steps, batches, strict=True):
        assert batch[DESCRIPTION_KEY].layout == layout
        with counted_linear_tokens(model) as tokens:
            loss = model(**batch).loss
        whole = together[data_rank(accelerator)].plain["input_ids"].numel()
        # Replicated work would pass every comparison of numbers; padding adds some tokens to a
        # share.
        assert max(tokens) < whole, (case, max(tokens), whole)
        accelerator.backward(loss)
        own = losses[data_rank(accelerator)]
        results[f"{engine}: {case}"] = report(
            compare(float(loss.detach()), gradients(), own, grads)
        )
        zero_gradients(model)
    return results


def all_engines(engines: list[Engine], steps: list[Step], split: Split, layout: Layout) -> Report:
    results: Report = {}
    for engine in engines:
        results.update(ring_steps(engine, steps, split, layout))
    return results


def check(
    engines: list[Engine],
    split: Split,
    tolerance: float,
    layout: Layout = "zigzag",
    exchange: str = "p2p",
) -> None:
    steps = chosen_steps(split[0])
    world_size = split[0] * split[1] * split[2]
    env = {"PARALLELISM_CONFIG_CP_LAYOUT": layout, "PARALLELISM_CONFIG_CP_EXCHANGE": exchange}
    reports = run_ranks(all_engines, world_size, engines, steps, split, layout, init=False, env=env)
    assert_parity(reports, tolerance, len(engines) * len(KINDS))


@pytest.mark.parametrize("split", SPLITS)
def test_fsdp2(split: Split) -> None:
    check(FSDP2, split, EXACT)


@pytest.mark.parametrize(
    ("layout", "exchange"),
    [("zigzag", "all_gather"), ("contiguous", "all_gather"), ("striped", "p2p")],
)
def test_fsdp2_in_other_layouts_and_exchanges(layout: Layout, exchange: str) -> None:
    check(FSDP2[:1], (1, 2, 2), EXACT, layout, exchange)


@pytest.mark.parametrize("split", SPLITS)
def test_deepspeed(split: Split) -> None:
    check(DEEPSPEED, split, FLOAT32)
