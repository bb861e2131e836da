"""Backward passes that compute a forward again, or belong to two forwards: each must see its own
batch's documents.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from tests.helpers.batches import CASES, Sample, loader
from tests.helpers.models import build
from tests.helpers.parity_jobs import (
    Engine,
    Grads,
    Report,
    assert_parity,
    compare,
    data_rank,
    full_gradients,
    plain_loss,
    report,
    zero_gradients,
)
from tests.helpers.ranks import run_ranks

KINDS = ("packed", "padded left", "odd packed", "plain", "five rows", "prompt masked")
# None, or torch.utils.checkpoint's use_reentrant.
CHECKPOINTS = (None, False, True)
# A chosen and a rejected batch, as preference losses have them: of different documents, rows or
# lengths.
PAIRS = (
    ("packed", "padded left"),
    ("odd packed", "packed"),
    ("padded right", "five rows"),
    ("plain", "packed"),
)
ENGINES = (Engine("ddp"), Engine("fsdp2"))


def preference(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Couples two losses, so that the gradient of each has a factor from the other."""
    return (chosen - 0.5 * rejected).exp()


def expected_of(batches: list[tuple[list[Sample], ...]]) -> list[tuple[list[float], Grads]]:
    """Returns for each step every data parallel rank's loss and the mean's gradients; a step has
    one batch or two.
    """
    model = build("llama")
    results = []
    for step in batches:
        zero_gradients(model)
        losses = []
        for samples in zip(*step):
            parts = [plain_loss(model, sample) for sample in samples]
            loss = preference(*parts) if len(parts) == 2 else parts[0]
            (loss / len(step[0])).backward()
            losses.append(float(loss.detach()))
        results.append(
            (losses, {name: value.grad.clone() for name, value in model.named_parameters()})
        )
    return results


def prepared(
    engine: Engine, checkpoint: bool | None, dp_size: int, sp_size: int, static: bool
) -> tuple[Any, nn.Module]:
    handlers = [DistributedDataParallelKwargs(static_graph=True)] if static else []
    accelerator = engine.accelerator(sp_size, dp_size, kwargs_handlers=handlers)
    model = build("llama")
    if checkpoint is not None:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": checkpoint}
        )
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    return accelerator, model


def sharded(batches: Any, expected: Any, dp_size: int, sp_size: int) -> Report:
    results = {}
    forwards = len(batches[0])
    for engine in ENGINES:
        for checkpoint in CHECKPOINTS:
            # DDP itself can't take two reentrant recomputes of a layer in one backward unless its
            # graph is static.
            static = engine.name == "ddp" and forwards == 2 and checkpoint is True
            accelerator, model = prepared(engine, checkpoint, dp_size, sp_size, static)
            drawn = iter(
                accelerator.prepare(
                    loader([sample for step in batches for part in step for sample in part])
                )
            )
            for number, (losses, grads) in enumerate(expected):
                zero_gradients(model)
                parts = [model(**next(drawn)).loss for _ in range(forwards)]
                loss = preference(*parts) if forwards == 2 else parts[0]
                accelerator.backward(loss)
                own = losses[data_rank(accelerator)]
                difference = compare(float(loss.detach()), full_gradients(model), own, grads)
                results[f"{engine.name} checkpoint={checkpoint} {number}"] = report(difference)
    return results


@pytest.mark.parametrize(("dp_size", "sp_size"), [(1, 2), (2, 2)])
def test_activation_checkpointing(dp_size: int, sp_size: int) -> None:
    together = [
        [CASES[kind](2 * n + rank) for rank in range(dp_size)] for n, kind in enumerate(KINDS)
    ]
    batches: list[tuple[list[Sample], ...]] = [(samples,) for samples in together]
    expected = expected_of(batches)
    reports = run_ranks(sharded, dp_size * sp_size, batches, expected, dp_size, sp_size, init=False)
    assert_parity(reports, count=len(ENGINES) * len(CHECKPOINTS) * len(KINDS))


@pytest.mark.parametrize(("dp_size", "sp_size"), [(1, 2), (2, 2)])
def test_two_forwards_before_one_backward(dp_size: int, sp_size: int) -> None:
    batches = [
        tuple(
            [CASES[kind](4 * n + 2 * part + rank) for rank in range(dp_size)]
            for part, kind in enumerate(pair)
        )
        for n, pair in enumerate(PAIRS)
    ]
    expected = expected_of(batches)
    reports = run_ranks(sharded, dp_size * sp_size, batches, expected, dp_size, sp_size, init=False)
    assert_parity(reports, count=len(ENGINES) * len(CHECKPOINTS) * len(PAIRS))
