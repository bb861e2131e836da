"""How keys are sent around a ring and their gradients are returned, by a plan that all ranks
compute alike.

`Rotation` sends them from neighbour to neighbour; `GatheredKeys` sends each rank exactly the keys
that it sees, in one collective. A message holds keys and values together, `[k, 2, B, K, D]`: any
run of tokens is contiguous, so that it is sent, received and read without a copy. Shapes: B = rows,
K = key/value heads, R = ranks, k = tokens, D = head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ulysses_accel.attention.ring.accumulate import BlockSum, KeyBlock
from ulysses_accel.attention.ring.plan import RingPlan, total_length
from ulysses_accel.distributed.collectives import all_to_all

Exchange = Literal["p2p", "all_gather"]


def pack(key: Tensor, value: Tensor) -> Tensor:
    """Returns keys and values as one message, `[B, K, k, D]`, `[B, K, k, D]` -> `[k, 2, B, K,
    D]`.
    """
    message = key.new_empty(key.shape[2], 2, *key.shape[:2], key.shape[3])
    for view, tensor in zip(unpack(message), (key, value)):
        view.copy_(tensor)
    return message


def unpack(message: Tensor) -> tuple[Tensor, Tensor]:
    """Returns views of a message's keys and values, `[k, 2, B, K, D]` -> `[B, K, k, D]`, `[B, K, k,
    D]`.
    """
    key, value = message.permute(1, 2, 3, 0, 4).unbind(0)
    return key, value


class _DoubleBuffer:
    """Two buffers: for the message that is computed with, and for the one that is received."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._like, self._dtype = like, dtype
        self._buffers: list[Tensor | None] = [None, None]

    def take(self, number: int, length: int) -> Tensor:
        """Returns the buffer of message `number`, resized to that many tokens; message `number` - 2
        is overwritten.
        """
        buffer = self._buffers[number % 2]
        if buffer is None or buffer.shape[0] != length:
            self._buffers[number % 2] = buffer = None
            buffer = self._like.new_empty(length, *self._like.shape[1:], dtype=self._dtype)
            self._buffers[number % 2] = buffer
        return buffer


class Rotation:
    """The messages of one pass around the ring; those of a hop are posted in one batch, in the same
    order on every rank.
    """

    def __init__(self, group: ProcessGroup, plan: RingPlan) -> None:
        self.group, self.plan = group, plan
        members = dist.get_process_group_ranks(group)
        self.members = members
        self.below = members[(plan.rank - 1) % plan.size]
        self.above = members[(plan.rank + 1) % plan.size]

    def post(
        self, sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]]
    ) -> list[Any]:
        """Starts sends to, and receives from, global ranks; returns their handles."""
        operations = [dist.P2POp(dist.isend, tensor, peer, self.group) for tensor, peer in sends]
        operations += [
            dist.P2POp(dist.irecv, tensor, peer, self.group) for tensor, peer in receives
        ]
        return dist.batch_isend_irecv(operations) if operations else []

    def keys(self, local: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yields each hop with its keys `[k, 2, B, K, D]`, this rank's first, while the next hop's
        are received.
        """
        plan, buffers = self.plan, _DoubleBuffer(local, local.dtype)
        reader, message = (plan.rank - 1) % plan.size, local
        for hop in range(plan.size - 1):
            arriving = buffers.take(hop + 1, plan.carried_length(plan.rank, hop + 1))
            outgoing = message[: plan.carried_length(reader, hop + 1)]
            # [carried tokens, 2, B, K, D] down -> [carried tokens, 2, B, K, D] from above
            work = self.post([(outgoing, self.below)], [(arriving, self.above)])
            yield hop, message
            wait(work)
            message = arriving
        yield plan.size - 1, message


def wait(work: list[Any]) -> None:
    """Waits for all messages of one hop."""
    for handle in work:
        handle.wait()


class GradientReturn:
    """Sends the gradients of rotated keys along with them, and back to the ranks of the keys.

    Args:
        rotation: the ring.
        local: this rank's keys, `[k, 2, B, K, D]`.
        dtype: to accumulate in.
    """

    def __init__(self, rotation: Rotation, local: Tensor, dtype: torch.dtype) -> None:
        self.rotation, self.plan = rotation, rotation.plan
        self.buffers, self.late_buffer = (_DoubleBuffer(local, dtype) for _ in range(2))
        self.work: list[Any] = []
        self.arriving: Tensor | None = None
        self.late: Tensor | None = None

    def pass_on(self, total: BlockSum, hop: int) -> None:
        """Adds this rank's part to the sum of earlier ranks, and sends it on."""
        wait(self.work)
        plan, last = self.plan, hop + 1 == self.plan.size
        message = self.arriving
        if message is None:
            message = self.buffers.take(hop, plan.carried_length(plan.rank, hop))
            total.copy_to(unpack(message))
        else:
            total.add_to(unpack(message))
        below, above = (plan.rank - 1) % plan.size, (plan.rank + 1) % plan.size
        if last:
            # The rank below the last one has the keys: it gets the gradients of all that the last
            # rank received.
            length = plan.carried_length(plan.rank, hop)
            arriving_length = plan.carried_length(above, hop)
        else:
            length = plan.carried_length(below, hop + 1)
            arriving_length = plan.carried_length(plan.rank, hop + 1)
        self.arriving = self.buffers.take(hop + 1, arriving_length)
        # [carried tokens, 2, B, K, D] down -> [carried tokens, 2, B, K, D] from above
        sends = [(message[:length], self.rotation.below)]
        receives = [(self.arriving, self.rotation.above)]
        if plan.drops_late_half and not last:
            self._late_half(message, hop, sends, receives)
        self.work = self.rotation.post(sends, receives)

    def _late_half(
        self,
        message: Tensor,
        hop: int,
        sends: list[tuple[Tensor, int]],
        receives: list[tuple[Tensor, int]],
    ) -> None:
        """Adds the transfer of a late half's gradient from rank 0, the last that sees it, directly
        to the rank of its keys.
        """
        half = self.plan.shard_length // 2
        if self.plan.rank == 0:
            sends.append((message[half:], self.rotation.members[hop]))
        elif self.plan.rank == hop:
            self.late = self.late_buffer.take(0, half)
            receives.append((self.late, self.rotation.members[0]))

    def finish(self, local: tuple[Tensor, ...]) -> None:
        """Adds the returned gradients to this rank's `[B, K, k, D]` of keys and values."""
        wait(self.work)
        for message, is_late in ((self.arriving, False), (self.late, True)):
            if message is not None:
                start = self.plan.shard_length // 2 if is_late else 0
                for total, part in zip(local, unpack(message)):
                    total[:, :, start : start + message.shape[0]].add_(part)


class GatheredKeys:
    """The keys of other ranks that this rank sees, exchanged in one collective, and the return of
    their gradients.

    Args:
        local: this rank's keys, `[k, 2, B, K, D]`.
        plan: tells which keys each rank sees.
        group: the R ranks.
    """

    def __init__(self, local: Tensor, plan: RingPlan, group: ProcessGroup) -> None:
        self.plan, self.group = plan, group
        self.sent = [total_length(ranges) for ranges in plan.outgoing]
        self.received = [total_length(ranges) for ranges in plan.incoming]
        parts = [local[start:stop] for ranges in plan.outgoing for start, stop in ranges]
        # [k, 2, B, K, D] -> [tokens seen elsewhere, 2, B, K, D] -> [tokens seen here, 2, B, K, D]
        self.keys = all_to_all(
            torch.cat(parts) if parts else local[:0], group, self.sent, self.received
        )

    def blocks(self, source: int) -> list[KeyBlock]:
        """Returns the keys of another rank that this rank sees, a block for each run of tokens."""
        return [
            KeyBlock(start, *unpack(message)) for start, message in self._runs(self.keys, source)
        ]

    def empty_gradients(self, dtype: torch.dtype) -> Tensor:
        """Returns an uninitialised tensor for the gradients of all keys, `[tokens seen here, 2, B,
        K, D]`.
        """
        return torch.empty_like(self.keys, dtype=dtype)

    def write(self, gradients: Tensor, source: int, totals: list[BlockSum]) -> None:
        """Copies the gradients of another rank's blocks into `gradients`."""
        for (_, message), total in zip(self._runs(gradients, source), totals):
            total.copy_to(unpack(message))

    def return_gradients(self, gradients: Tensor, local: tuple[Tensor, ...]) -> None:
        """Returns gradients to the ranks of their keys, and adds the received ones to this rank's
        `[B, K, k, D]` of keys and values.
        """
        # [tokens seen here, 2, B, K, D] -> [tokens seen elsewhere, 2, B, K, D]
        received = all_to_all(gradients, self.group, self.received, self.sent)
        offset = 0
        for start, stop in (bounds for ranges in self.plan.outgoing for bounds in ranges):
            for total, part in zip(local, unpack(received[offset : offset + stop - start])):
                total[:, :, start:stop].add_(part)
            offset += stop - start

    def _runs(self, tensor: Tensor, source: int) -> Iterator[tuple[int, Tensor]]:
        """Yields the first token, and the rows of `tensor`, of each run of a rank's tokens."""
        offset = sum(self.received[:source])
        for start, stop in self.plan.incoming[source]:
            yield start, tensor[offset : offset + stop - start]
            offset += stop - start
