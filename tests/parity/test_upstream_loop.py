"""The training loop of accelerate's sequence parallelism page, word for word, gives single-process
gradients.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed.nn.functional  # the page takes it for granted

from tests.helpers.batches import CASES, Sample, loader
from tests.helpers.models import build
from tests.helpers.parity_jobs import (
    EXACT,
    Engine,
    Grads,
    Report,
    assert_parity,
    compare,
    data_rank,
    plain_step,
    report,
    zero_gradients,
)
from tests.helpers.ranks import run_ranks
from tests.parity.test_engines import FLOAT32, keep_gradients

Step = tuple[str, list[Sample], list[float], Grads]
KINDS = ("plain", "packed", "padded left", "odd length", "first ranks masked", "last ranks masked")


def documented_loss(
    accelerator: Any, model: Any, unwrapped_model: Any, batch: Any, parallelism_config: Any
) -> Any:
    """The page's lines, in its order and with its names."""
    sp_size = parallelism_config.sp_size if parallelism_config is not None else 1
    if sp_size > 1:
        sp_group = accelerator.torch_device_mesh["sp"].get_group()
        sp_world_size = parallelism_config.sp_size

    outputs = model(**batch)
    shift_labels = batch["shift_labels"]
    loss = unwrapped_model.loss_function(
        logits=outputs.logits,
        labels=None,
        shift_labels=shift_labels,
        vocab_size=unwrapped_model.config.vocab_size,
    )
    if sp_size > 1:
        losses_per_rank = torch.distributed.nn.functional.all_gather(loss, group=sp_group)
        good_tokens = (shift_labels != -100).view(-1).sum()
        good_tokens_per_rank = torch.distributed.nn.functional.all_gather(
            good_tokens, group=sp_group
        )
        total_loss = sum(
            losses_per_rank[rank] * good_tokens_per_rank[rank]
            for rank in range(sp_world_size)
            if good_tokens_per_rank[rank] > 0
        )
        total_good_tokens = sum(good_tokens_per_rank)
        loss = total_loss / max(total_good_tokens, 1)
    return loss


def run_loop(engine: Engine, steps: list[Step], dp_size: int, sp_size: int) -> Report:
    accelerator = engine.accelerator(sp_size, dp_size)
    model = build("llama", torch.float32 if engine.name == "deepspeed" else torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    samples = [sample for _, together, _, _ in steps for sample in together]
    model, optimizer, dl = accelerator.prepare(model, optimizer, loader(samples))
    unwrapped_model = accelerator.unwrap_model(model)
    gradients = keep_gradients(model)
    results = {}
    for (case, _, losses, grads), batch in zip(steps, dl, strict=True):
        zero_gradients(model)
        loss = documented_loss(
            accelerator, model, unwrapped_model, batch, accelerator.parallelism_config
        )
        assert math.isfinite(float(loss.detach()))
        accelerator.backward(loss)
        own = losses[data_rank(accelerator)]
        results[f"{engine}: {case}"] = report(
            compare(float(loss.detach()), gradients(), own, grads)
        )
        optimizer.step()
    return results


def run_all(engines: list[Engine], steps: list[Step], dp_size: int, sp_size: int) -> Report:
    results: Report = {}
    for engine in engines:
        results.update(run_loop(engine, steps, dp_size, sp_size))
    return results


def expected_steps(dp_size: int) -> list[Step]:
    model = build("llama")
    together = [
        (kind, [CASES[kind](2 * n + rank) for rank in range(dp_size)])
        for n, kind in enumerate(KINDS)
    ]
    return [(kind, samples, *plain_step(model, samples)) for kind, samples in together]


@pytest.mark.parametrize(("dp_size", "sp_size"), [(1, 2), (2, 2)])
def test_ddp_and_fsdp2(dp_size: int, sp_size: int) -> None:
    steps = expected_steps(dp_size)
    engines = [Engine("ddp"), Engine("fsdp2")]
    reports = run_ranks(run_all, dp_size * sp_size, engines, steps, dp_size, sp_size, init=False)
    assert_parity(reports, EXACT, len(engines) * len(steps))


def test_deepspeed() -> None:
    steps = expected_steps(1)
    engines = [Engine("deepspeed", stage) for stage in range(4)]
    reports = run_ranks(run_all, 2, engines, steps, 1, 2, init=False)
    assert_parity(reports, FLOAT32, len(engines) * len(steps))
