"""Loss and every gradient of one step against one process, in float64: models, layouts and kinds of batches, on DDP."""

from __future__ import annotations

import pytest

from tests.parity.batches import CASES, MASKED_CASES, Sample, loader
from tests.parity.jobs import (
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
from tests.parity.models import CONFIGS, build
from tests.ranks import run_ranks

LAYOUTS = [(1, 2), (2, 1), (1, 4), (2, 2)]
MODELS = sorted(CONFIGS)
# transformers' OPT does not look for packed documents in positions, and takes other positions from a padding mask.
REFERENCES = {"opt": lonely_loss}
Step = tuple[str, list[Sample], list[float], Grads]


def expected_steps(name: str, dp_size: int, sp_size: int) -> list[Step]:
    cases = {**CASES, **(MASKED_CASES if sp_size > 1 else {})}
    model = build(name)
    steps = []
    for number, (case, sample) in enumerate(cases.items()):
        samples = [sample(2 * number + rank) for rank in range(dp_size)]
        steps.append((case, samples, *plain_step(model, samples, REFERENCES.get(name, plain_loss))))
    return steps


def sharded_steps(plans: dict[str, list[Step]], dp_size: int, sp_size: int) -> Report:
    accelerator = Engine("ddp").accelerator(sp_size, dp_size)
    results = {}
    for name, steps in plans.items():
        samples = [sample for _, together, _, _ in steps for sample in together]
        # Without sequence parallelism nothing of ours touches the batch: it must say by itself what counts.
        model, batches = accelerator.prepare(build(name), loader(samples, plain=sp_size == 1))
        for (case, _, losses, grads), batch in zip(steps, batches, strict=True):
            zero_gradients(model)
            loss = model(**batch).loss
            accelerator.backward(loss)
            own = losses[data_rank(accelerator)]
            results[f"{name}: {case}"] = report(compare(float(loss.detach()), full_gradients(model), own, grads))
    return results


@pytest.mark.parametrize(("dp_size", "sp_size"), LAYOUTS)
def test_models_and_batches(dp_size: int, sp_size: int) -> None:
    plans = {name: expected_steps(name, dp_size, sp_size) for name in MODELS}
    reports = run_ranks(sharded_steps, dp_size * sp_size, plans, dp_size, sp_size, init=False)
    assert_parity(reports, count=sum(map(len, plans.values())))
