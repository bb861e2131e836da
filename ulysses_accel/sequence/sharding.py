"""A sequence padded to a length that divides, sharded over its ranks, and put together again.

Invariant: `unshard(shard(x)) == x`, every token of every sample is on exactly one rank.

Shapes: B = batch rows, S = tokens of the full (padded) sequence, P = ranks that share one
sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ulysses_accel import _private_api
from ulysses_accel.errors import ShapeError

_SHARD_MARK = "ulysses_accel_shard"


def next_multiple(length: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `length`, both in tokens."""
    return -(-length // multiple) * multiple


def shard(tensor: Tensor, num_shards: int, rank: int, dim: int = 1) -> Tensor:
    """Returns the part of a tensor that one rank holds, as a view.

    Args:
        tensor: any tensor whose `dim` is the sequence, `[B, S, ...]` by default.
        num_shards: ranks P that share the sequence; must divide S.
        rank: which of them, 0 to P - 1.
        dim: the sequence dim of `tensor`.

    Returns:
        `[B, S / P, ...]`, tokens `rank * S / P` up to the next rank's first.

    Raises:
        ShapeError: `num_shards` does not divide the sequence.
    """
    length = tensor.shape[dim]
    if length % num_shards:
        raise ShapeError(
            f"{num_shards} ranks do not divide a sequence of {length} tokens (dim {dim} of shape "
            f"{tuple(tensor.shape)}). Pad it to {next_multiple(length, num_shards)} tokens."
        )
    return tensor.narrow(dim, rank * (length // num_shards), length // num_shards)


def mark_shard(value: Any) -> Any:
    """Returns a tensor marked as one rank's part of a batch, so that it is known where its
    description is missing.
    """
    if isinstance(value, Tensor):
        setattr(value, _SHARD_MARK, True)
    return value


def is_marked_shard(value: Any) -> bool:
    """Returns whether a value is a tensor from `mark_shard`, or a view of one; copies are not
    known.
    """
    return isinstance(value, Tensor) and (
        hasattr(value, _SHARD_MARK) or hasattr(_private_api.view_base(value), _SHARD_MARK)
    )


def unshard(shards: Sequence[Tensor], dim: int = 1) -> Tensor:
    """Returns the full tensor from all ranks' shards, in rank order: the inverse of `shard`."""
    return torch.cat(list(shards), dim=dim)


def pad_sequence_dim(tensor: Tensor, length: int, value: float | bool, dim: int = 1) -> Tensor:
    """Returns `tensor` with its sequence dim padded at the end to `length` tokens; itself when
    nothing is missing.
    """
    missing = length - tensor.shape[dim]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_full(shape, value)], dim=dim)


def pad_position_ids(position_ids: Tensor, length: int) -> Tensor:
    """Returns position ids `[..., S]` padded to `length`, each row counting on from its last
    position.
    """
    missing = length - position_ids.shape[-1]
    if missing == 0:
        return position_ids
    steps = torch.arange(1, missing + 1, dtype=position_ids.dtype, device=position_ids.device)
    return torch.cat([position_ids, position_ids[..., -1:] + steps], dim=-1)
