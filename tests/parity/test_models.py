"""Loss and every gradient of one step against one process, in float64: models, layouts and kinds of
batches, on DDP.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.helpers.batches import CASES, MASKED_CASES, Sample, loader
from tests.helpers.models import CONFIGS, build
from tests.helpers.parity_jobs import (
    EXACT,
    Engine,
    Grads,
    Report,
    assert_parity,
    compare,
    data_rank,
    full_gradients,
    lonely_loss,
    plain_loss,
    plain_step,
    report,
    zero_gradients,
)
from tests.helpers.ranks import run_ranks

# Data parallel, ring and Ulysses degree.
LAYOUTS = [(1, 1, 2), (2, 1, 1), (1, 1, 4), (2, 1, 2), (1, 2, 1), (1, 2, 2), (2, 2, 1)]
MODELS = sorted(CONFIGS)
# transformers' OPT does not look for packed documents in positions, and takes other positions from
# a padding mask.
REFERENCES = {"opt": lonely_loss}
Step = tuple[str, list[Sample], list[float], Grads]


def with_positions(sample: Sample) -> Sample:
    """Returns the sample with the positions told that others are given without: else a padded OPT
    batch is refused.
    """
    counted = torch.arange(sample.batch["input_ids"].shape[1]).expand_as(sample.batch["input_ids"])
    return replace(sample, batch={"position_ids": counted, **sample.batch})


def expected_steps(name: str, dp_size: int, is_sharded: bool) -> list[Step]:
    cases = {**CASES, **(MASKED_CASES if is_sharded else {})}
    reference = REFERENCES.get(name, plain_loss) if is_sharded else plain_loss
    model = build(name)
    steps = []
    for number, (case, sample) in enumerate(cases.items()):
        samples = [sample(2 * number + rank) for rank in range(dp_size)]
        if is_sharded and name in REFERENCES:
            samples = [with_positions(sample) for sample in samples]
        steps.append((case, samples, *plain_step(model, samples, reference)))
    return steps


def sharded_steps(plans: dict[str, list[Step]], layout: tuple[int, int, int]) -> Report:
    dp_size, cp_size, sp_size = layout
    accelerator = Engine("ddp").accelerator(sp_size, dp_size, cp_size=cp_size)
    results = {}
    for name, steps in plans.items():
        samples = [sample for _, together, _, _ in steps for sample in together]
        # Where no sequence is shared nothing of ours touches the batch: it must say by itself what
        # counts.
        model, batches = accelerator.prepare(
            build(name), loader(samples, plain=cp_size * sp_size == 1)
        )
        for (case, _, losses, grads), batch in zip(steps, batches, strict=True):
            zero_gradients(model)
            loss = model(**batch).loss
            accelerator.backward(loss)
            own = losses[data_rank(accelerator)]
            results[f"{name}: {case}"] = report(
                compare(float(loss.detach()), full_gradients(model), own, grads)
            )
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_models_and_batches(layout: tuple[int, int, int]) -> None:
    plans = {name: expected_steps(name, layout[0], layout[1] * layout[2] > 1) for name in MODELS}
    reports = run_ranks(sharded_steps, math.prod(layout), plans, layout, init=False)
    assert_parity(reports, count=sum(map(len, plans.values())))


def test_the_references_agree_where_transformers_packs() -> None:
    for name in ("llama", "gpt2", "gemma", "qwen3"):
        model = build(name)
        for case in ("packed", "odd packed", "padded left", "padded right"):
            sample = CASES[case](0)
            losses, grads = plain_step(model, [sample])
            alone, alone_grads = plain_step(model, [sample], lonely_loss)
            assert compare(alone[0], alone_grads, losses[0], grads).within(EXACT), (name, case)
