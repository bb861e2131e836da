"""How keys travel around a ring and their gradients come home, by a plan that all ranks share.

`Rotation` passes them on neighbour by neighbour; `GatheredKeys` brings each rank exactly what it
sees in one collective. A message is key and value together, `[k, 2, B, K, D]`: any run of tokens
lies in one piece, so that what some rank needs is sent, received and read without a copy. Shapes: B
= rows, K = key/value heads, R = ranks, k = tokens, D = head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ulysses_accel.attention.ring.accumulate import KeyBlock, Total
from ulysses_accel.attention.ring.plan import RingPlan, total_length
from ulysses_accel.distributed.collectives import all_to_all

Exchange = Literal["p2p", "all_gather"]


def packed(key: Tensor, value: Tensor) -> Tensor:
    """Returns keys and values as one message, `[B, K, k, D]`, `[B, K, k, D]` -> `[k, 2, B, K,
    D]`.
    """
    message = key.new_empty(key.shape[2], 2, *key.shape[:2], key.shape[3])
    for place, tensor in zip(halves_of(message), (key, value)):
        place.copy_(tensor)
    return message


def halves_of(message: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the views of a message's keys and values, `[k, 2, B, K, D]` -> `[B, K, k, D]`, `[B,
    K, k, D]`.
    """
    key, value = message.permute(1, 2, 3, 0, 4).unbind(0)
    return key, value


class _TwoBuffers:
    """Room for the message at work and the one under way, in turn."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._like, self._dtype = like, dtype
        self._buffers: list[Tensor | None] = [None, None]

    def take(self, number: int, length: int) -> Tensor:
        """Returns room for message `number` of that many tokens, where the last but one was."""
        buffer = self._buffers[number % 2]
        if buffer is None or buffer.shape[0] != length:
            self._buffers[number % 2] = buffer = None
            buffer = self._like.new_empty(length, *self._like.shape[1:], dtype=self._dtype)
            self._buffers[number % 2] = buffer
        return buffer


class Rotation:
    """The messages of one pass around the ring; all of a hop's go in one batch, in the same order
    on every rank.
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
        """Starts sends and receives with global ranks; returns what to wait for."""
        operations = [dist.P2POp(dist.isend, tensor, peer, self.group) for tensor, peer in sends]
        operations += [
            dist.P2POp(dist.irecv, tensor, peer, self.group) for tensor, peer in receives
        ]
        return dist.batch_isend_irecv(operations) if operations else []

    def keys(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yields each hop with its keys `[k, 2, B, K, D]`, this rank's own first; the next hop's
        are under way then.
        """
        plan, buffers = self.plan, _TwoBuffers(own, own.dtype)
        reader, message = (plan.rank - 1) % plan.size, own
        for hop in range(plan.size - 1):
            arriving = buffers.take(hop + 1, plan.carried_length(plan.rank, hop + 1))
            outgoing = message[: plan.carried_length(reader, hop + 1)]
            work = self.post([(outgoing, self.below)], [(arriving, self.above)])
            yield hop, message
            wait(work)
            message = arriving
        yield plan.size - 1, message


def wait(work: list[Any]) -> None:
    """Waits for all messages of one hop."""
    for handle in work:
        handle.wait()


class GradientsHome:
    """Carries the gradients of travelling keys to the ranks that the keys came from.

    Args:
        rotation: the ring.
        own: this rank's keys, `[k, 2, B, K, D]`.
        dtype: to add up in.
    """

    def __init__(self, rotation: Rotation, own: Tensor, dtype: torch.dtype) -> None:
        self.rotation, self.plan = rotation, rotation.plan
        self.buffers, self.late_buffer = (_TwoBuffers(own, dtype) for _ in range(2))
        self.work: list[Any] = []
        self.arriving: Tensor | None = None
        self.late: Tensor | None = None

    def pass_on(self, total: Total, hop: int) -> None:
        """Adds this reader's part to what earlier readers found and sends the sum on."""
        wait(self.work)
        plan, last = self.plan, hop + 1 == self.plan.size
        message = self.arriving
        if message is None:
            message = self.buffers.take(hop, plan.carried_length(plan.rank, hop))
            total.copy_to(halves_of(message))
        else:
            total.add_to(halves_of(message))
        below, above = (plan.rank - 1) % plan.size, (plan.rank + 1) % plan.size
        # The last reader's neighbour below is home: it gets all that the last reader was brought.
        length = (
            plan.carried_length(plan.rank, hop) if last else plan.carried_length(below, hop + 1)
        )
        self.arriving = self.buffers.take(
            hop + 1,
            plan.carried_length(above, hop) if last else plan.carried_length(plan.rank, hop + 1),
        )
        sends, receives = (
            [(message[:length], self.rotation.below)],
            [(self.arriving, self.rotation.above)],
        )
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
        """Adds the transfer of a late half's gradient, which ends its way at rank 0, straight to
        its home.
        """
        half = self.plan.shard_length // 2
        if self.plan.rank == 0:
            sends.append((message[half:], self.rotation.members[hop]))
        elif self.plan.rank == hop:
            self.late = self.late_buffer.take(0, half)
            receives.append((self.late, self.rotation.members[0]))

    def finish(self, own: tuple[Tensor, ...]) -> None:
        """Adds what came home to this rank's gradients `[B, K, k, D]` of keys and values."""
        wait(self.work)
        for message, is_late in ((self.arriving, False), (self.late, True)):
            if message is not None:
                start = self.plan.shard_length // 2 if is_late else 0
                for place, part in zip(own, halves_of(message)):
                    place[:, :, start : start + message.shape[0]].add_(part)


class GatheredKeys:
    """What each rank sees of the others' keys, brought by one collective, and the way back of its
    gradients.

    Args:
        own: this rank's keys, `[k, 2, B, K, D]`.
        plan: says who sees what.
        group: the R ranks.
    """

    def __init__(self, own: Tensor, plan: RingPlan, group: ProcessGroup) -> None:
        self.plan, self.group = plan, group
        self.sent = [total_length(ranges) for ranges in plan.outgoing]
        self.received = [total_length(ranges) for ranges in plan.incoming]
        parts = [own[start:stop] for ranges in plan.outgoing for start, stop in ranges]
        # [k, 2, B, K, D] -> [tokens seen elsewhere, 2, B, K, D] -> [tokens seen here, 2, B, K, D]
        self.keys = all_to_all(
            torch.cat(parts) if parts else own[:0], group, self.sent, self.received
        )

    def blocks(self, source: int) -> list[KeyBlock]:
        """Returns what this rank sees of another rank's keys, each run of tokens by itself."""
        return [
            KeyBlock(start, *halves_of(message)) for start, message in self._of(self.keys, source)
        ]

    def room(self, dtype: torch.dtype) -> Tensor:
        """Returns room for the gradients of all keys, `[tokens seen here, 2, B, K, D]`."""
        return torch.empty_like(self.keys, dtype=dtype)

    def put(self, gradients: Tensor, source: int, totals: list[Total]) -> None:
        """Copies the gradients of another rank's blocks to their place in `gradients`."""
        for (_, message), total in zip(self._of(gradients, source), totals):
            total.copy_to(halves_of(message))

    def send_home(self, gradients: Tensor, own: tuple[Tensor, ...]) -> None:
        """Adds what other ranks found to this rank's gradients `[B, K, k, D]` of keys and
        values.
        """
        # [tokens seen here, 2, B, K, D] -> [tokens seen elsewhere, 2, B, K, D]
        found = all_to_all(gradients, self.group, self.received, self.sent)
        offset = 0
        for start, stop in (bounds for ranges in self.plan.outgoing for bounds in ranges):
            for place, part in zip(own, halves_of(found[offset : offset + stop - start])):
                place[:, :, start:stop].add_(part)
            offset += stop - start

    def _of(self, tensor: Tensor, source: int) -> Iterator[tuple[int, Tensor]]:
        """Yields the first token and the place in `tensor` of each run of a rank's tokens."""
        offset = sum(self.received[:source])
        for start, stop in self.plan.incoming[source]:
            yield start, tensor[offset : offset + stop - start]
            offset += stop - start
