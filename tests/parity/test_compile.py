"""A compiled model gives the eager gradients, those upstream of the exchange included."""

from __future__ import annotations

import torch
import torch._dynamo  # imported before the fork, once for all ranks
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from tests.helpers.ranks import run_ranks
from tests.parity.test_reaggregation import LABELS, TOKENS, build
from ulysses_accel import ParallelismConfig


def gradients(cp_size: int, sp_size: int, compiled: bool) -> dict[str, Tensor]:
    accelerator = Accelerator(
        cpu=True, parallelism_config=ParallelismConfig(cp_size=cp_size, sp_size=sp_size)
    )
    model = build()
    loader = DataLoader(
        [0], batch_size=1, collate_fn=lambda _: {"input_ids": TOKENS, "labels": LABELS}
    )
    model, _, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loader
    )
    raw = accelerator.unwrap_model(model)
    if compiled:
        raw.model.forward = torch.compile(raw.model.forward, backend="aot_eager")
    (batch,) = list(loader)
    accelerator.backward(model(**batch).loss)
    return {name: parameter.grad for name, parameter in raw.named_parameters()}


def check(cp_size: int, sp_size: int) -> None:
    eager, compiled = (
        run_ranks(gradients, cp_size * sp_size, cp_size, sp_size, flag, init=False, timeout=200)[0]
        for flag in (False, True)
    )
    for name, grad in eager.items():
        assert grad.norm() > 0, name
        # The same float64 operations; the compiler may reorder sums.
        assert (compiled[name] - grad).norm() <= 1e-12 * grad.norm(), name


def test_ulysses() -> None:
    check(1, 2)


def test_ring() -> None:
    check(2, 1)
