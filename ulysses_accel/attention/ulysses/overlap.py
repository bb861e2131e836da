"""Exchanges that overlap with computation in forward and backward, and tensors that are filled in
parts.

An exchange is two autograd nodes, one that starts it and one that waits for it; their backwards
wait for the adjoint and start it. Autograd runs nodes in the reverse order of their creation, so
that backward overlaps as forward does. Shapes: B = rows, N = heads, s = tokens of one rank, D =
head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ulysses_accel.attention.heads import Range


@dataclass
class AsyncExchange:
    """One all-to-all of flat messages and, in the backward pass, its adjoint; at most one of them
    is in progress.
    """

    group: ProcessGroup
    send_sizes: list[int]
    receive_sizes: list[int]
    # What is sent, what is received, and the handle; the sent tensor stays alive until it is sent.
    in_progress: list[tuple[Tensor, Tensor, Any]] = field(default_factory=list)

    def start(self, send: Tensor, send_sizes: list[int], receive_sizes: list[int]) -> Tensor:
        received = send.new_empty(sum(receive_sizes))
        # Detached, so that an exchange that is not waited for (a recompute that stops early) keeps
        # no graph alive.
        send, filled = send.detach(), received.detach()
        # Without sizes, backends take their cheaper path for equal parts.
        even = len({*send_sizes, *receive_sizes}) == 1
        work = dist.all_to_all_single(
            filled,
            send,
            None if even else receive_sizes,
            None if even else send_sizes,
            group=self.group,
            async_op=True,
        )
        self.in_progress.append((send, filled, work))
        return received

    def wait(self) -> Tensor:
        _, received, work = self.in_progress.pop()
        work.wait()
        return received


class StartExchange(torch.autograd.Function):
    """Starts an exchange; its result is not valid before `WaitForExchange`. The backward waits for
    the adjoint.
    """

    @staticmethod
    def forward(ctx: Any, send: Tensor, exchange: AsyncExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.start(send, exchange.send_sizes, exchange.receive_sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.wait(), None


class WaitForExchange(torch.autograd.Function):
    """Waits for an exchange. The backward starts the adjoint, and returns the gradient that is
    being sent.
    """

    @staticmethod
    def forward(ctx: Any, pending: Tensor, exchange: AsyncExchange) -> Tensor:
        ctx.exchange = exchange
        exchange.wait()
        return pending.view_as(pending)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        ctx.exchange.start(grad, ctx.exchange.receive_sizes, ctx.exchange.send_sizes)
        return grad, None


@dataclass
class SharedOutput:
    """A tensor `[B, s, N, D]` that several autograd nodes fill, each with some of the heads."""

    shape: tuple[int, ...]
    buffer: Tensor | None = None

    def part(self, heads: Range, like: Tensor) -> Tensor:
        """Returns the view of some heads, `[B, s, n, D]`."""
        if self.buffer is None:
            self.buffer = like.new_empty(self.shape)
        return self.buffer[:, :, slice(*heads)]

    def join(self, ranges: Sequence[Range], parts: Sequence[Tensor]) -> Tensor:
        """Returns the full tensor, `[B, s, N, D]`; parts that are not views of it are copied."""
        for heads, part in zip(ranges, parts, strict=True):
            view = self.part(heads, part)
            if view.data_ptr() != part.data_ptr():
                view.copy_(part)
        full, self.buffer = self.buffer, None
        assert full is not None
        return full


class SplitByHeads(torch.autograd.Function):
    """[B, s, N, D] -> views [B, s, n, D] of ranges of heads that cover all."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranges: Sequence[Range]) -> tuple[Tensor, ...]:
        ctx.ranges, ctx.shape = ranges, tuple(tensor.shape)
        return tuple(tensor[:, :, slice(*heads)] for heads in ranges)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return SharedOutput(ctx.shape).join(ctx.ranges, grads), None


class JoinByHeads(torch.autograd.Function):
    """Parts [B, s, n, D] of ranges of heads that cover all -> [B, s, N, D]."""

    @staticmethod
    def forward(ctx: Any, whole: SharedOutput, ranges: Sequence[Range], *parts: Tensor) -> Tensor:
        ctx.ranges = ranges
        return whole.join(ranges, parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad[:, :, slice(*heads)] for heads in ctx.ranges)
