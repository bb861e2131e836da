"""Differentiable collectives on a group's own ranks: all-to-all, all-gather, reduce-scatter,
all-reduce.

Each is linear, and its backward is its exact adjoint (<A x, y> = <x, A^T y>). The all-to-all is a
functional custom op, so that `torch.compile` keeps the dependence of its result on its input.
Nothing here uses the deprecated `torch.distributed.nn`, or functional-autograd collectives, whose
first call costs seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ulysses_accel import _private_api
from ulysses_accel.errors import ShapeError

# torch 2.13 renamed both and warns about the old names, which older releases only have.
gather_into: Callable[..., Any] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)
_scatter_into: Callable[..., Any] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)


@torch.library.custom_op("ulysses_accel::all_to_all", mutates_args=())
def _all_to_all_op(
    send: Tensor, send_sizes: list[int], receive_sizes: list[int], group_name: str
) -> Tensor:
    # A custom op takes no process group as argument; torch keeps them all by name.
    group = _private_api.process_group(group_name)
    received = send.new_empty((sum(receive_sizes), *send.shape[1:]))
    # The sizes are left out where all are equal: the even exchange is the cheaper call on every
    # backend.
    even = len(set(send_sizes)) == 1 and send_sizes == receive_sizes
    dist.all_to_all_single(
        received,
        send.contiguous(),
        None if even else receive_sizes,
        None if even else send_sizes,
        group=group,
    )
    return received


@_all_to_all_op.register_fake
def _(send: Tensor, send_sizes: list[int], receive_sizes: list[int], group_name: str) -> Tensor:
    return send.new_empty((sum(receive_sizes), *send.shape[1:]))


def _all_to_all_setup(
    ctx: Any, inputs: tuple[Tensor, list[int], list[int], str], output: Tensor
) -> None:
    _, ctx.send_sizes, ctx.receive_sizes, ctx.group_name = inputs


def _all_to_all_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return _all_to_all_op(grad, ctx.receive_sizes, ctx.send_sizes, ctx.group_name), None, None, None


_all_to_all_op.register_autograd(_all_to_all_backward, setup_context=_all_to_all_setup)


def all_to_all(
    send: Tensor,
    group: ProcessGroup,
    send_sizes: Sequence[int] | None = None,
    receive_sizes: Sequence[int] | None = None,
) -> Tensor:
    """Sends the parts of `send` along dim 0 to the ranks of `group`, one part each, and returns
    what they sent here.

    Args:
        send: `[n, ...]`, the part for rank 0 first.
        group: the P ranks that exchange.
        send_sizes: rows for each rank, summing to n; equal parts when absent.
        receive_sizes: rows from each rank; equal to `send_sizes` when absent.

    Returns:
        `[sum(receive_sizes), ...]`, the part from rank 0 first.

    Raises:
        ShapeError: the rows can't be split as asked.
    """
    size = group.size()
    if send_sizes is None:
        if send.shape[0] % size:
            raise ShapeError(
                f"{send.shape[0]} rows (shape {tuple(send.shape)}) can't be split evenly over "
                f"{size} ranks. "
                f"Give send_sizes and receive_sizes."
            )
        send_sizes = [send.shape[0] // size] * size
    if receive_sizes is None:
        receive_sizes = send_sizes
    if sum(send_sizes) != send.shape[0] or len(send_sizes) != size or len(receive_sizes) != size:
        raise ShapeError(
            f"send_sizes={list(send_sizes)} and receive_sizes={list(receive_sizes)} do not split "
            f"{send.shape[0]} rows "
            f"over {size} ranks. Give one size for each rank, summing to {send.shape[0]}."
        )
    result: Tensor = _all_to_all_op(send, list(send_sizes), list(receive_sizes), group.group_name)
    return result


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = tensor.new_empty((group.size() * tensor.shape[0], *tensor.shape[1:]))
        gather_into(gathered, tensor.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Again a function of autograd's, whose own backward is the exchange: so in all three.
        return _apply(_ReduceScatter, grad, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _apply(_AllGather, grad, ctx.group), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_reduce(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _apply(_AllReduce, grad, ctx.group), None


def _reduce_scatter(tensor: Tensor, group: ProcessGroup) -> Tensor:
    part = tensor.new_empty((tensor.shape[0] // group.size(), *tensor.shape[1:]))
    _scatter_into(part, tensor.contiguous(), group=group)
    return part


def _all_reduce(tensor: Tensor, group: ProcessGroup) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def all_gather(tensor: Tensor, group: ProcessGroup, dim: int = 0) -> Tensor:
    """Returns all ranks' tensors joined along `dim` in rank order; the gradient of each rank's part
    is summed.

    Args:
        tensor: the same shape on every rank, `[..., n, ...]`.
        group: the P ranks; need not hold global rank 0.
        dim: the dim that grows.

    Returns:
        `[..., P * n, ...]`.
    """
    if tensor.ndim == 0:
        return _apply(_AllGather, tensor.unsqueeze(0), group)
    if dim == 0:
        return _apply(_AllGather, tensor, group)
    return _apply(_AllGather, tensor.transpose(0, dim), group).transpose(0, dim)


def reduce_scatter(tensor: Tensor, group: ProcessGroup, dim: int = 0) -> Tensor:
    """Returns this rank's part along `dim` of the sum of all ranks' tensors: the adjoint of
    `all_gather`.

    Args:
        tensor: the same shape on every rank, `[..., P * n, ...]`.
        group: the P ranks.
        dim: the dim that shrinks.

    Returns:
        `[..., n, ...]`.

    Raises:
        ShapeError: the dim can't be split evenly.
    """
    if tensor.shape[dim] % group.size():
        raise ShapeError(
            f"dim {dim} of shape {tuple(tensor.shape)} can't be split over {group.size()} ranks. "
            "Pad it to a multiple."
        )
    if dim == 0:
        return _apply(_ReduceScatter, tensor, group)
    return _apply(_ReduceScatter, tensor.transpose(0, dim), group).transpose(0, dim)


def all_reduce(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Returns the sum of all ranks' tensors; its gradient is the sum of all ranks' gradients."""
    return _apply(_AllReduce, tensor, group)


def _apply(function: type[torch.autograd.Function], tensor: Tensor, group: ProcessGroup) -> Tensor:
    result: Tensor = function.apply(tensor, group)
    return result
