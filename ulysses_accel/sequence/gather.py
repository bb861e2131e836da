"""What losses of whole samples need of a sharded sequence: all of it, one rank's part of it, or one
vector of a row.

Each function is differentiable, and its backward sums over ranks what each of them does with the
result. Where every rank computes the same loss of it, as one process would, the mean over ranks of
the gradients, which every engine takes, is one process's gradient: of what comes before the
exchange and of what comes after it. A loss that already carries the factor of `aggregate_loss` does
not need them.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ulysses_accel.distributed.collectives import all_gather, all_reduce
from ulysses_accel.errors import ConfigError, ShapeError
from ulysses_accel.sequence.description import SequenceDescription
from ulysses_accel.sequence.layout import ring_order
from ulysses_accel.sequence.sharding import shard

Pooling = Literal["first", "last", "mean", "max"]
Unit = Literal["row", "document"]


def gather_sequence(
    tensor: Tensor, description: SequenceDescription, group: ProcessGroup, *, dim: int = 1
) -> Tensor:
    """Returns the full sequence on every rank, in the order of its tokens whatever the layout,
    padding included.

    Args:
        tensor: `[B, S / P, ...]`, this rank's shard.
        description: of the batch, its `sequence_description`.
        group: the P ranks that share the sequence, `accelerator.sequence_parallel.group`.
        dim: the sequence dim of `tensor`.

    Returns:
        `[B, S, ...]`, the same on every rank.

    Raises:
        ShapeError: the tensor or the group is not of the described batch.
    """
    _check(tensor, description, group, dim, description.shard_length)
    if description.num_shards == 1:
        return tensor
    # [B, S/P, ...] -> [B, S, ...]
    full = all_gather(tensor, group, dim)
    order = _order(description, tensor.device)
    return full if order is None else full.index_select(dim, order.argsort())


def shard_sequence(
    tensor: Tensor, description: SequenceDescription, group: ProcessGroup, *, dim: int = 1
) -> Tensor:
    """Returns this rank's part of a sequence that it has all of: the inverse of `gather_sequence`,
    without exchange.

    Args:
        tensor: `[B, S, ...]`, in the order of its tokens, padded as the batch is.
        description: of the batch, its `sequence_description`.
        group: the P ranks that share the sequence, `accelerator.sequence_parallel.group`.
        dim: the sequence dim of `tensor`.

    Returns:
        `[B, S / P, ...]`; its gradient is zero on the other ranks' tokens.

    Raises:
        ShapeError: the tensor or the group is not of the described batch.
    """
    _check(tensor, description, group, dim, description.sequence_length)
    if description.num_shards == 1:
        return tensor
    order = _order(description, tensor.device)
    # [B, S, ...] -> [B, S/P, ...]
    if order is None:
        return shard(tensor, description.num_shards, group.rank(), dim)
    return tensor.index_select(dim, shard(order, description.num_shards, group.rank(), 0))


def pool_sequence(
    hidden: Tensor,
    description: SequenceDescription,
    group: ProcessGroup,
    how: Pooling,
    *,
    of: Unit = "row",
) -> Tensor:
    """Returns one vector for each row or document of a sharded sequence; padding and holes don't
    count.

    No rank gets the full sequence: each adds what its tokens contribute, and one vector for each
    row is exchanged.

    Args:
        hidden: `[B, S / P, ...]`, this rank's shard, usually `[B, S / P, D]`.
        description: of the batch, its `sequence_description`.
        group: the P ranks that share the sequence, `accelerator.sequence_parallel.group`.
        how: the `first` or `last` token that is not padding, the `mean` over tokens, or the `max`
            of each feature, whose gradient is shared by equal tokens, as in `torch.amax`.
        of: what is pooled: each `row` `[B, ...]`, or each `document` of packed rows `[N, ...]`, in
            the order of `description.rows`.

    Returns:
        `[B, ...]` or `[N, ...]`, the same on every rank; zeros for a row of nothing but padding.

    Raises:
        ConfigError: `how` or `of` is not one of these.
        ShapeError: the tensor or the group is not of the described batch.
    """
    if how not in ("first", "last", "mean", "max") or of not in ("row", "document"):
        raise ConfigError(
            f"pool_sequence was to return the {how!r} of each {of!r}. Use 'first', 'last', 'mean' "
            "or 'max', of a "
            f"'row' or a 'document'."
        )
    _check(hidden, description, group, 1, description.shard_length)
    units = unit_numbers(description, of)
    count = description.batch_size if of == "row" else sum(map(len, description.rows))
    if how in ("first", "last"):
        units = _only(units, how)
    sharing = group if description.num_shards > 1 else None
    local = shard_sequence(units, description, group).flatten()
    chosen = (local >= 0).nonzero().flatten()
    local = local[chosen].to(hidden.device)
    # [B, S/P, ...] -> [n, ...], the n tokens of this rank that count
    tokens = hidden.flatten(0, 1)[chosen.to(hidden.device)]
    if how == "max":
        return _maximum(tokens, local, count, sharing)
    total = _sum(tokens, local, count, sharing)
    if how != "mean":
        return total
    lengths = torch.bincount(units[units >= 0], minlength=count).clamp(min=1).to(total)
    return total / lengths.view(-1, *[1] * (total.ndim - 1))


def unit_numbers(description: SequenceDescription, of: Unit = "row") -> Tensor:
    """Returns for each token the number of the row or document that it counts for, -1 for padding
    and holes.

    Args:
        description: of the batch.
        of: whether rows or documents are numbered, across all rows of the batch.

    Returns:
        `[B, S]` of int64 on the host, in the order of the sequence.
    """
    numbers = torch.full((description.batch_size, description.sequence_length), -1)
    document = 0
    for row, segments in enumerate(description.rows):
        for start, stop in segments:
            numbers[row, start:stop] = row if of == "row" else document
            document += 1
    for row, holes in enumerate(description.holes):
        for start, stop in holes:
            numbers[row, start:stop] = -1
    return numbers


def _only(units: Tensor, how: Pooling) -> Tensor:
    """Returns numbers `[B, S]` of which only the first or last token of each unit is left."""
    flat = units.flatten()
    kept = torch.full_like(flat, -1)
    counted = (flat >= 0).nonzero().flatten()
    numbers = flat[counted]
    edge = torch.ones_like(numbers, dtype=torch.bool)
    changes = numbers[1:] != numbers[:-1]
    if how == "first":
        edge[1:] = changes
    else:
        edge[:-1] = changes
    kept[counted[edge]] = numbers[edge]
    return kept.view_as(units)


def _sum(tokens: Tensor, local: Tensor, count: int, group: ProcessGroup | None) -> Tensor:
    """Returns the sum over all ranks' tokens of each unit, `[n, ...] -> [count, ...]`."""
    total = tokens.new_zeros((count, *tokens.shape[1:])).index_add(0, local, tokens)
    return total if group is None else all_reduce(total, group)


def _maximum(tokens: Tensor, local: Tensor, count: int, group: ProcessGroup | None) -> Tensor:
    """Returns the maximum over all ranks' tokens of each unit, `[n, ...] -> [count, ...]`."""
    with torch.no_grad():
        maximum = tokens.new_full((count, *tokens.shape[1:]), -torch.inf)
        maximum = maximum.index_reduce(0, local, tokens, "amax")
        if group is not None:
            dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
        maximum = torch.where(maximum == -torch.inf, 0.0, maximum)
        greatest = (tokens == maximum[local]).to(tokens.dtype)
        ties = _sum(greatest, local, count, group).clamp(min=1.0)
    # A mean over equal tokens has the right gradient, and is the maximum but for rounding.
    mean = _sum(tokens * (greatest / ties[local]), local, count, group)
    return maximum + (mean - mean.detach())


def _order(description: SequenceDescription, device: torch.device) -> Tensor | None:
    order = ring_order(description.sequence_length, description.ring_size, description.layout)
    return None if order is None else order.to(device)


def _check(
    tensor: Tensor, description: SequenceDescription, group: ProcessGroup, dim: int, length: int
) -> None:
    """Refuses what is not a tensor of the described batch; all ranks see the same."""
    if description.num_shards not in (1, group.size()):
        raise ShapeError(
            f"the batch's sequence_description is of {description.num_shards} ranks that share a "
            "sequence, the group "
            f"given has {group.size()}. Use accelerator.sequence_parallel.group."
        )
    if not -tensor.ndim <= dim < tensor.ndim or tensor.shape[dim] != length:
        raise ShapeError(
            f"a tensor of shape {tuple(tensor.shape)} was given for {length} tokens in dim {dim} "
            f"({description.sequence_length} tokens over {description.num_shards} ranks). Give the "
            "tensor of this "
            f"batch, and its sequence dim."
        )
