"""Every family of models against one process: loss, all gradients, and each rank's share of the
work, in float64.

Tolerance 1e-12, for the reason that `jobs` states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.helpers.architectures import (
    ARCHITECTURES,
    Batch,
    InDouble,
    build,
    kinds,
    make_batch,
    num_counted,
    reference_parts,
)
from tests.helpers.parity_jobs import (
    EXACT,
    Engine,
    Grads,
    compare,
    counted_linear_tokens,
    zero_gradients,
)
from tests.helpers.ranks import run_ranks

# Ring and Ulysses degree.
LAYOUTS = [(1, 2), (2, 1), (2, 2)]
# Padding up to what the ranks divide may add this much to the smallest batches.
MOST_PADDING = 1.4


@dataclass(frozen=True)
class Expected:
    loss: float
    grads: Grads
    linear_tokens: int


def one_process(model: Any, name: str, kind: str) -> Expected:
    zero_gradients(model)
    parts = [part for part in reference_parts(name, kind) if num_counted(name, part)]
    counts = [num_counted(name, part) for part in parts]
    total = torch.zeros((), dtype=torch.float64)
    with counted_linear_tokens(model) as tokens, InDouble():
        for part, count in zip(parts, counts):
            # transformers looks for packed documents only where there is no cache.
            extra = {"use_cache": False} if kind == "packed" else {}
            total = total + model(**part, **extra).loss * count / sum(counts)
        total.backward()
    grads = {
        key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None
    }
    return Expected(float(total.detach()), grads, sum(tokens))


def expected_of(name: str) -> dict[str, Expected]:
    model = build(name)
    return {kind: one_process(model, name, kind) for kind in kinds(ARCHITECTURES[name].form)}


def sharded(
    plans: dict[str, dict[str, Expected]], layout: tuple[int, int]
) -> dict[str, list[float]]:
    cp_size, sp_size = layout
    found = {}
    for name, cases in plans.items():
        accelerator = Engine("ddp").accelerator(
            sp_size, 1, cp_size=cp_size, kwargs_handlers=[unused()]
        )
        whole: Any = [make_batch(name, kind) for kind in cases]
        model, batches = accelerator.prepare(
            build(name), DataLoader(whole, batch_size=1, collate_fn=first)
        )
        for (kind, expected), batch in zip(cases.items(), batches, strict=True):
            zero_gradients(model)
            with counted_linear_tokens(model) as tokens, InDouble():
                loss = model(**batch).loss
                accelerator.backward(loss)
            own = gradients(accelerator.unwrap_model(model), expected.grads)
            difference = compare(float(loss.detach()), own, expected.loss, expected.grads)
            share = sum(tokens) / expected.linear_tokens
            found[f"{name}: {kind}"] = [
                difference.loss,
                difference.grad,
                abs(difference.ratio),
                share,
            ]
    return found


def unused() -> Any:
    from accelerate.utils import DistributedDataParallelKwargs

    # Experts that no token of a rank chose have no gradient there.
    return DistributedDataParallelKwargs(find_unused_parameters=True)


def gradients(model: nn.Module, like: Grads) -> Grads:
    found: dict[str, Tensor | None] = {
        name: parameter.grad for name, parameter in model.named_parameters()
    }
    extra = {
        name
        for name, grad in found.items()
        if name not in like and grad is not None and bool(grad.any())
    }
    assert not extra
    return {
        name: torch.zeros_like(like[name]) if grad is None else grad
        for name, grad in found.items()
        if name in like
    }


def first(samples: list[Batch]) -> Batch:
    return samples[0]


@pytest.fixture(scope="module")
def plans() -> dict[str, dict[str, Expected]]:
    return {name: expected_of(name) for name in ARCHITECTURES}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_gradients_and_work(
    plans: dict[str, dict[str, Expected]], layout: tuple[int, int]
) -> None:
    size = math.prod(layout)
    for rank in run_ranks(sharded, size, plans, layout, init=False):
        assert len(rank) == sum(map(len, plans.values()))
        wrong = {case: errors for case, errors in rank.items() if not max(errors[:3]) <= EXACT}
        assert not wrong
        # Whisper's encoder is whole on every rank, by design.
        shares = {
            case: errors[3] for case, errors in rank.items() if not case.startswith("whisper")
        }
        assert {case: share for case, share in shares.items() if share > MOST_PADDING / size} == {}
