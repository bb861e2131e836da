"""XTuner's collectives between the ranks of a sequence, and the loss of all of them.

`sp_group=None` always means the sequence group, never the world. No argument is changed.
Shapes: B = rows, S = tokens of the full sequence, P = ranks that share it, s = S / P, H = heads, D
= head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ulysses_accel.attention.heads import HeadSplit
from ulysses_accel.attention.ulysses.exchange import head_to_seq, seq_to_head
from ulysses_accel.compat.xtuner.groups import sequence_group
from ulysses_accel.distributed import collectives
from ulysses_accel.errors import ConfigError, ShapeError
from ulysses_accel.sequence.sharding import shard

GradScale = Literal["up", "down"]


def gather_for_sequence_parallel(
    input: Tensor, dim: int, sp_group: ProcessGroup | None = None
) -> Tensor:
    """Returns all ranks' shards concatenated, `[..., n, ...]` -> `[..., P * n, ...]`; without
    gradient.

    Args:
        input: this rank's shard.
        dim: the dim that grows.
        sp_group: the ranks.
    """
    group = sequence_group(sp_group)
    return (
        input if group is None else collectives.all_gather(input.detach(), group, dim % input.ndim)
    )


class _SplitGather(torch.autograd.Function):
    """[..., P * n, ...] -> [..., n, ...]; gradients are concatenated, and scaled."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, group: ProcessGroup, factor: float) -> Tensor:
        ctx.settings = dim, group, factor
        return shard(tensor, group.size(), group.rank(), dim).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        dim, group, factor = ctx.settings
        return collectives.all_gather(grad, group, dim) * factor, None, None, None


class _GatherSplit(torch.autograd.Function):
    """[..., n, ...] -> [..., P * n, ...]; each rank keeps its shard of its gradient, scaled."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, group: ProcessGroup, factor: float) -> Tensor:
        ctx.settings = dim, group, factor
        return collectives.all_gather(tensor, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        dim, group, factor = ctx.settings
        return shard(grad, group.size(), group.rank(), dim) * factor, None, None, None


def split_forward_gather_backward(
    input: Tensor,
    dim: int,
    sp_group: ProcessGroup | None = None,
    grad_scale: GradScale | None = None,
) -> Tensor:
    """Returns this rank's shard; in the backward pass the ranks' gradients are concatenated.

    Args:
        input: `[..., P * n, ...]`, the same on every rank.
        dim: the dim that is split.
        sp_group: the ranks.
        grad_scale: `up` multiplies the gradient by P, `down` divides it by P.

    Raises:
        ConfigError: another scale.
        ShapeError: the ranks do not divide the dim.
    """
    return _scaled(_SplitGather, input, dim, sp_group, grad_scale)


def gather_forward_split_backward(
    input: Tensor,
    dim: int,
    sp_group: ProcessGroup | None = None,
    grad_scale: GradScale | None = None,
) -> Tensor:
    """Returns all ranks' shards concatenated; in the backward pass each rank takes its shard of its
    gradient.

    That is the gradient where all ranks use the result alike; `ulysses_accel.all_gather` sums over
    all ranks instead.

    Args:
        input: `[..., n, ...]`, this rank's shard.
        dim: the dim that grows.
        sp_group: the ranks.
        grad_scale: `up` multiplies the gradient by P, `down` divides it by P.

    Raises:
        ConfigError: another scale.
    """
    return _scaled(_GatherSplit, input, dim, sp_group, grad_scale)


def _scaled(
    function: type[torch.autograd.Function],
    input: Tensor,
    dim: int,
    sp_group: ProcessGroup | None,
    scale: str | None,
) -> Tensor:
    if scale not in (None, "up", "down"):
        raise ConfigError(f"grad_scale={scale!r} is not known. Use 'up', 'down' or None.")
    group = sequence_group(sp_group)
    if group is None:
        return input
    factor = {"up": float(group.size()), "down": 1.0 / group.size()}.get(scale or "", 1.0)
    result: Tensor = function.apply(input, dim % input.ndim, group, factor)
    return result


def all_to_all(
    input: Tensor, sp_group: ProcessGroup | None = None, scatter_dim: int = 2, gather_dim: int = 1
) -> Tensor:
    """Returns one part of `scatter_dim` of all ranks' tensors, joined along `gather_dim`;
    differentiable.

    Args:
        input: by default `[B, s, H, D]`.
        sp_group: the ranks.
        scatter_dim: the dim that shrinks.
        gather_dim: the dim that grows.

    Returns:
        By default `[B, S, H / P, D]`.

    Raises:
        ShapeError: the ranks do not divide `scatter_dim`.
    """
    group = sequence_group(sp_group)
    if group is None:
        return input
    if input.shape[scatter_dim] % group.size():
        raise ShapeError(
            f"{group.size()} ranks do not divide dim {scatter_dim} of shape {tuple(input.shape)}. "
            "Use dispatch_modules or sequence_parallel_wrapper, which partition heads unevenly."
        )
    send = torch.stack(input.chunk(group.size(), scatter_dim))
    # P times [B, s, H/P, D] -> [B, S, H/P, D]
    return torch.cat(collectives.all_to_all(send, group).unbind(), gather_dim)


def pre_process_for_sequence_parallel_attn(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    scatter_dim: int = 2,
    gather_dim: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Exchanges tokens for heads before attention, in one collective; key/value heads are not
    repeated.

    Args:
        query_states: `[B, s, H, D]`; P divides H.
        key_states: `[B, s, K, D]`.
        value_states: `[B, s, K, D]`.
        scatter_dim: the heads' dim, 2.
        gather_dim: the tokens' dim, 1.

    Returns:
        `[B, S, H / P, D]`, and the key/value heads of these query heads.

    Raises:
        ConfigError: other dims.
        ShapeError: P does not divide the heads.
    """
    _check_dims(scatter_dim, gather_dim, (2, 1))
    group = sequence_group(None)
    if group is None:
        return query_states, key_states, value_states
    if not HeadSplit(group.size(), query_states.shape[2], key_states.shape[2]).is_even:
        raise ShapeError(
            f"{query_states.shape[2]} query and {key_states.shape[2]} key/value heads are not "
            f"partitioned evenly over {group.size()} ranks. Use sequence_parallel_wrapper or "
            "dispatch_modules, which partition them unevenly."
        )
    return _to_heads(query_states, key_states, value_states, group)


def _to_heads(
    query: Tensor, key: Tensor, value: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    # [B, s, H, D] -> [B, S, h, D]
    q, k, v = seq_to_head(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), group)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def post_process_for_sequence_parallel_attn(
    attn_output: Tensor, scatter_dim: int = 1, gather_dim: int = 2
) -> Tensor:
    """Exchanges heads for tokens after attention, `[B, S, H / P, D]` -> `[B, s, H, D]`.

    Args:
        attn_output: all tokens of this rank's heads.
        scatter_dim: the tokens' dim, 1.
        gather_dim: the heads' dim, 2.

    Raises:
        ConfigError: other dims.
    """
    _check_dims(scatter_dim, gather_dim, (1, 2))
    group = sequence_group(None)
    return attn_output if group is None else head_to_seq(attn_output.transpose(1, 2), group)


def _check_dims(scatter_dim: int, gather_dim: int, expected: tuple[int, int]) -> None:
    if (scatter_dim, gather_dim) != expected:
        raise ConfigError(
            f"scatter_dim={scatter_dim}, gather_dim={gather_dim} are not computed. Use "
            f"scatter_dim={expected[0]}, gather_dim={expected[1]}; all_to_all accepts any dims."
        )


def sequence_parallel_wrapper(local_attn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns attention on sharded sequences that calls a function of full ones.

    Args:
        local_attn: takes query `[B, S, h, D]`, key and value `[B, S, k, D]` and further arguments;
            returns `[B, S, h, D]`.

    Returns:
        The same function on `[B, s, H, D]`; with the further keyword `training=False` it is the
        function itself.
    """

    @functools.wraps(local_attn)
    def attention(
        query_states: Tensor, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        group = sequence_group(None) if kwargs.pop("training", True) else None
        if group is None:
            return local_attn(query_states, key_states, value_states, *args, **kwargs)
        split = HeadSplit(group.size(), query_states.shape[2], key_states.shape[2])
        out = local_attn(*_to_heads(query_states, key_states, value_states, group), *args, **kwargs)
        # [B, S, h, D] -> [B, s, H, D]
        return head_to_seq(out.transpose(1, 2), group, split)

    return attention


def reduce_sequence_parallel_loss(
    mean_loss: Tensor, loss_scale: Tensor | float, sp_group: ProcessGroup | None = None
) -> Tensor:
    """Returns the loss of the full sequence, from each rank's mean and its number of tokens.

    The gradient of each rank's mean is weighted by its tokens, so that the mean over all ranks of
    their gradients is the full sequence's. A dispatched model's loss is that of the full sequence
    already, and is not changed.

    Args:
        mean_loss: scalar; NaN where this rank has no counted token.
        loss_scale: scalar, tokens that count on this rank; not changed.
        sp_group: the ranks; the sequence group when None.

    Returns:
        Scalar, the same on every rank; 0 where no token counts.
    """
    group = sequence_group(sp_group)
    if group is None:
        return mean_loss
    # float64: a float32 sum of token counts is exact only up to 16.7 million tokens.
    weight = torch.as_tensor(loss_scale, device=mean_loss.device).detach().to(torch.float64)
    local_sum = torch.where(weight > 0, mean_loss.to(torch.float64) * weight, 0.0)
    totals = collectives.all_reduce(torch.stack([local_sum, weight]), group)
    mean = torch.where(
        totals[1] > 0, totals[0] / totals[1].clamp(min=torch.finfo(torch.float64).tiny), 0.0
    )
    return mean.to(mean_loss.dtype)
