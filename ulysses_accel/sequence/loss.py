"""Differentiable token-weighted aggregation of a loss over the ranks that share a batch.

Invariant: the mean over all ranks of the per-rank gradients is the gradient of the single-process
loss. Every engine averages gradients over all ranks, so the loss that each rank backpropagates
carries the factor of the group's size. Sum over tokens divided by the token count, never a mean of
means; finite when a rank, or all ranks, have no counted token; one collective; nothing is read back
to the host.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ulysses_accel.sequence.labels import IGNORE_INDEX, num_counted


class _TokenMean(torch.autograd.Function):
    """Mean over all ranks' tokens of per-rank means, each weighted by its rank's number of
    tokens.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, count: Tensor, group: ProcessGroup) -> Tensor:
        # float64: a float32 sum of token counts is exact only up to 16.7 million tokens.
        weight = count.to(torch.float64)
        local_sum = torch.where(count > 0, loss.to(torch.float64) * weight, 0.0)
        totals = torch.stack([local_sum, weight])
        dist.all_reduce(totals, group=group)
        total_weight = totals[1].clamp(min=1.0)
        # Every rank backpropagates this same scalar: the sum of their gradients is the group's size
        # times the local one.
        ctx.save_for_backward(weight / total_weight * group.size())
        ctx.dtype = loss.dtype
        return (totals[0] / total_weight).to(loss.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (share,) = ctx.saved_tensors
        return (grad * share).to(ctx.dtype), None, None


class _SumOfShares(torch.autograd.Function):
    """Sum over ranks of losses that are already divided by the global token count."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, group: ProcessGroup) -> Tensor:
        ctx.size = group.size()
        total = loss.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.size, None


class _SharedScalar(torch.autograd.Function):
    """A scalar that is the same on every rank, whose gradient may not be."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        mean = grad / ctx.group.size()
        dist.all_reduce(mean, group=ctx.group)
        return mean, None


def shared_scalar(loss: Tensor, group: ProcessGroup) -> Tensor:
    """Returns an aggregated loss that may be used differently on each rank, for one scalar's
    collective in backward.

    `aggregate_loss` counts on every rank's using its result alike. A loop that aggregates a second
    time, with weights for each rank, as the documented one does on a loss that the model has
    computed, is right with this one too.

    Args:
        loss: scalar, the same on every rank of the group.
        group: the ranks that have it.
    """
    shared: Tensor = _SharedScalar.apply(loss, group)  # type: ignore[no-untyped-call]
    return shared


def aggregate_loss(
    loss: Tensor,
    shift_labels: Tensor,
    group: ProcessGroup,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Returns the loss of the full batch, from each rank's loss on its shard.

    Without `num_items_in_batch` the loss is normalised over `group`, the ranks that share a
        sequence: `loss` is this
    rank's mean over its counted tokens (NaN where it has none, as torch gives it). With it, `loss`
    is this rank's sum divided by that number, as transformers' loss functions return it, and
    `group` is every rank that the number was counted over (`count_items`).

    Args:
        loss: scalar, this rank's loss.
        shift_labels: `[B, S / P]`, this rank's labels.
        group: the ranks whose tokens the result is the mean of.
        num_items_in_batch: counted tokens of all ranks and accumulation steps together.
        ignore_index: the label of tokens that don't count.

    Returns:
        Scalar, the same on every rank of the group; 0 with zero gradients when no token counts.
    """
    if num_items_in_batch is not None:
        shares: Tensor = _SumOfShares.apply(loss, group)  # type: ignore[no-untyped-call]
        return shares
    count = num_counted(shift_labels, ignore_index)
    mean: Tensor = _TokenMean.apply(loss, count, group)  # type: ignore[no-untyped-call]
    return mean


def mean_as_share(loss: Tensor, labels: Tensor, num_items_in_batch: Tensor | int) -> Tensor:
    """Returns a shard's mean loss as its share of a mean over more tokens, for models that only
    compute the mean.

    Args:
        loss: scalar, the mean over this rank's counted tokens; NaN where it has none.
        labels: `[B, S / P]`, this rank's labels.
        num_items_in_batch: counted tokens of all ranks and accumulation steps together.

    Returns:
        Scalar, this rank's sum divided by that number; 0 where no token counts.
    """
    count = num_counted(labels)
    return torch.where(count > 0, loss * count, 0.0) / num_items_in_batch


def count_items(
    batches: Iterable[dict[str, Any]], group: ProcessGroup, *, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Returns the counted tokens of several sharded micro-batches over all ranks of `group`, for
    token-exact accumulation: pass it to every forward of the step as `num_items_in_batch`.

    Args:
        batches: the sharded micro-batches of one optimizer step, each with `shift_labels` `[B, S /
            P]`, or with `labels` where the model's loss does not shift them.
        group: all ranks that take part in the step (every mesh axis but tp).
        ignore_index: the label of tokens that don't count.

    Returns:
        Integer scalar, at least 1, the same on every rank.
    """
    labels = (
        batch["shift_labels"] if "shift_labels" in batch else batch["labels"] for batch in batches
    )
    counts = [num_counted(part, ignore_index) for part in labels]
    total = torch.stack(counts).sum()
    dist.all_reduce(total, group=group)
    return total.clamp(min=1)
