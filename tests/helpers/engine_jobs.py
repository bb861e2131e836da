"""What the tests of the engines share: recognisable samples, and short training loops that run on
every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.helpers.batches import Sample, loader
from tests.helpers.models import VOCAB, build
from tests.helpers.parity_jobs import compare, full_gradients, plain_step, zero_gradients
from ulysses_accel.errors import UlyssesAccelError

FIRST_ID = 3


def documents(count: int, length: int = 16) -> list[dict[str, Tensor]]:
    """Returns samples of random tokens; sample i is full of nothing but begins with the token
    `FIRST_ID + i`.
    """
    generator = torch.Generator().manual_seed(count)
    found = []
    for index in range(count):
        ids = torch.randint(FIRST_ID, VOCAB, (length,), generator=generator)
        ids[0] = FIRST_ID + index
        found.append({"input_ids": ids, "labels": ids.clone()})
    return found


def batches_of(
    count: int, batch_size: int = 1, length: int = 16, **options: Any
) -> DataLoader[Any]:
    """Returns a loader over `documents`."""
    return DataLoader(documents(count, length), batch_size=batch_size, **options)  # type: ignore[arg-type]


def numbers(batch: dict[str, Any]) -> list[int]:
    """Returns which samples a batch holds; asks all ranks, because the first shard's holder alone
    can tell.
    """
    first = batch["input_ids"][:, 0].clone()
    dist.broadcast(first, src=0)
    return [int(token) - FIRST_ID for token in first]


def own_numbers(batch: dict[str, Any]) -> list[int]:
    """Returns which samples a batch holds, on ranks that hold their first tokens; nothing
    elsewhere.
    """
    if "position_ids" in batch and int(batch["position_ids"][0, 0]) > 0:
        return []
    return [int(token) - FIRST_ID for token in batch["input_ids"][:, 0]]


def error_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Returns `Type: message` of the package's error that the call raises, "" when it returns."""
    try:
        function(*args, **kwargs)
    except UlyssesAccelError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def distance(model: nn.Module, loss: Tensor, reference: nn.Module, sample: Sample) -> float:
    """Returns how far a loss and the gradients that lie on a model are from one process's,
    relatively.
    """
    losses, grads = plain_step(reference, [sample])
    found = compare(float(loss.detach()), full_gradients(model), losses[0], grads)
    return max(found.loss, found.grad, abs(found.ratio))


def worst_distance(
    accelerator: Any, samples: list[Sample], name: str = "llama", config: Any = None
) -> float:
    """Returns the largest `distance` over some batches, each forwarded and backwarded once."""
    model, batches = accelerator.prepare(build(name, config=config), loader(samples))
    reference = build(name, config=config)
    found = []
    for sample, batch in zip(samples, batches, strict=True):
        zero_gradients(model)
        loss = model(**batch).loss
        accelerator.backward(loss)
        found.append(distance(model, loss, reference, sample))
    return max(found)


def train(
    accelerator: Any, model: Any, optimizer: Any, batches: Any, scheduler: Any = None
) -> list[float]:
    """Trains one epoch as accelerate's examples do; returns the losses of all micro-steps."""
    losses = []
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses
