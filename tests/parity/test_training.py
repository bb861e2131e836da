"""Whole optimizer steps against one process: accumulation with a partial last window, clipping,
schedule, weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ulysses_accel
from tests.helpers.batches import CASES, Sample, loader
from tests.helpers.models import build
from tests.helpers.parity_jobs import EXACT, Engine, Grads, data_rank, full_parameters
from tests.helpers.ranks import run_ranks

# Errors of one step enter the next one's forward, and the loss amplifies them some; seven
# micro-steps.
STEPS_EXACT = 10 * EXACT
# DeepSpeed's weights and gradients are float32, 6e-8 a rounding.
STEPS_FLOAT32 = 1e-5
CLIP = 0.5
KINDS = [
    "plain",
    "packed",
    "padded left",
    "odd length",
    "prompt masked",
    "five rows",
    "last ranks masked",
]


@dataclass(frozen=True)
class Plan:
    """A short training run.

    Args:
        samples: for each micro-step the batch of each data parallel rank.
        steps: micro-steps of an optimizer step.
        token_exact: whether losses are normalised by the tokens of the whole optimizer step.
    """

    samples: list[list[Sample]]
    steps: int
    token_exact: bool

    def windows(self) -> list[list[list[Sample]]]:
        """Returns the micro-steps of each optimizer step; the last one may have fewer."""
        return [
            self.samples[start : start + self.steps]
            for start in range(0, len(self.samples), self.steps)
        ]


@dataclass(frozen=True)
class Run:
    """What a run did: losses `[micro-step][data parallel rank]`, and of each optimizer step norm
    and learning rate.
    """

    losses: list[list[float]]
    norms: list[float]
    rates: list[float]
    parameters: Grads


def make_plan(dp_size: int, steps: int, token_exact: bool = False) -> Plan:
    samples = [
        [CASES[kind](100 + 2 * number + rank) for rank in range(dp_size)]
        for number, kind in enumerate(KINDS)
    ]
    return Plan(samples, steps, token_exact)


def optimizer_and_schedule(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def plain_run(plan: Plan) -> Run:
    """One process, whose batch is all data parallel ranks' batches."""
    model = build("llama")
    optimizer, schedule = optimizer_and_schedule(model)
    run = Run([], [], [], {})
    for window in plan.windows():
        num_items = (
            sum(sample.num_tokens for samples in window for sample in samples)
            if plan.token_exact
            else None
        )
        for samples in window:
            losses = [
                model(**sample.plain, num_items_in_batch=num_items).loss for sample in samples
            ]
            total: Tensor = torch.stack(losses).sum()
            # accelerate divides by the whole number of micro-steps in the partial window too.
            (total if num_items else total / len(samples) / plan.steps).backward()
            run.losses.append([float(loss.detach()) for loss in losses])
        run.norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        run.rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for _ in window[0]:
            # One step for each batch of the optimizer step, as accelerate does for data parallel
            # ranks.
            schedule.step()
        optimizer.zero_grad()
    run.parameters.update(full_parameters(model))
    return run


def token_counts(batches: Any, steps: int, world_group: Any) -> list[Tensor]:
    """Returns the tokens of each optimizer step, from a pass over the batches."""
    shards = list(batches)
    return [
        ulysses_accel.count_items(shards[start : start + steps], world_group)
        for start in range(0, len(shards), steps)
    ]


def sharded_run(engine: Engine, plan: Plan, dp_size: int, sp_size: int) -> list[Any]:
    accelerator = engine.accelerator(sp_size, dp_size, plan.steps)
    model = build("llama", torch.float32 if engine.name == "deepspeed" else torch.float64)
    optimizer, schedule = optimizer_and_schedule(model)
    samples = [sample for together in plan.samples for sample in together]
    model, optimizer, schedule, batches = accelerator.prepare(
        model, optimizer, schedule, loader(samples)
    )
    counts = token_counts(batches, plan.steps, accelerator.sequence_parallel.groups.world_group)
    losses, norms, rates = [], [], []
    for number, batch in enumerate(batches):
        with accelerator.accumulate(model):
            extra = {"num_items_in_batch": counts[number // plan.steps]} if plan.token_exact else {}
            loss = model(**batch, **extra).loss
            rate = optimizer.param_groups[0]["lr"]
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), CLIP)
                # DeepSpeed without ZeRO clips but does not tell the norm.
                norms += [] if norm is None else [float(norm)]
                rates.append(rate)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    return [losses, norms, rates, full_parameters(model), data_rank(accelerator)]


def relative(found: list[float], expected: list[float]) -> float:
    assert len(found) == len(expected)
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected))


def errors_of(plan: Plan, run: Run, result: list[Any]) -> dict[str, float]:
    losses, norms, rates, parameters, rank = result
    # A token-exact loss is the share of the whole global batch; otherwise it is that of this rank's
    # group.
    scale = plan.steps if plan.token_exact else 1
    expected = [sum(own) * scale if plan.token_exact else own[rank] for own in run.losses]
    assert parameters.keys() == run.parameters.keys()
    return {
        "losses": relative(losses, expected),
        "norms": relative(norms, run.norms) if norms else 0.0,
        "rates": relative(rates, run.rates),
        "weights": max(
            float((parameters[name].double() - value).norm() / value.norm())
            for name, value in run.parameters.items()
        ),
    }


def all_runs(
    engines: list[Engine], plans: list[tuple[Plan, Run]], dp_size: int, sp_size: int
) -> dict[str, Any]:
    return {
        f"{engine} steps={plan.steps} token_exact={plan.token_exact}": errors_of(
            plan, run, sharded_run(engine, plan, dp_size, sp_size)
        )
        for engine in engines
        for plan, run in plans
    }


def check_runs(
    engines: list[Engine], layout: tuple[int, int], tolerance: float, accumulation: list[int]
) -> None:
    dp_size, sp_size = layout
    plans = [make_plan(dp_size, steps, exact) for steps in accumulation for exact in (False, True)]
    pairs = [(plan, plain_run(plan)) for plan in plans]
    results = run_ranks(all_runs, dp_size * sp_size, engines, pairs, dp_size, sp_size, init=False)
    for runs in results:
        assert len(runs) == len(engines) * len(plans)
        failed = {
            name: errors for name, errors in runs.items() if not max(errors.values()) <= tolerance
        }
        assert not failed


@pytest.mark.parametrize(("dp_size", "sp_size"), [(1, 2), (2, 2)])
def test_ddp_and_fsdp2(dp_size: int, sp_size: int) -> None:
    check_runs([Engine("ddp"), Engine("fsdp2")], (dp_size, sp_size), STEPS_EXACT, [1, 3])


def test_deepspeed() -> None:
    engines = [Engine("deepspeed", stage, clipping=CLIP) for stage in range(4)]
    check_runs(engines, (1, 2), STEPS_FLOAT32, [3])
