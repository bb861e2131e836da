"""The slab is exactly as large as what it holds, and tensors come back as they left, however late
the copies run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from ulysses_accel.memory.checkpoint.host_slab import (
    Arrival,
    HostMover,
    HostSlab,
    Slot,
    TensorShape,
)


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)


@dataclass
class LateMover:
    """Copies as a side stream does, as late as it may: in order, and none before somebody waits for
    it.
    """

    queue: deque[Callable[[], None]] = field(default_factory=deque)

    def to_host(self, tensor: Tensor, slot: Slot) -> None:
        self.queue.append(lambda: _copy(slot.view(tensor, tensor.dtype), tensor))

    def to_device(self, slot: Slot, like: TensorShape) -> Arrival:
        tensor = like.empty()
        self.queue.append(lambda: _copy(tensor, slot.view(like.shape, like.dtype)))
        return LateArrival(self, tensor)


@dataclass
class LateArrival:
    mover: LateMover
    tensor: Tensor

    def wait(self) -> Tensor:
        while self.mover.queue:
            self.mover.queue.popleft()()
        return self.tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mover", [HostMover(), LateMover()])
def test_tensors_come_back_to_the_bit(dtype: torch.dtype, mover: HostMover | LateMover) -> None:
    slab = HostSlab(3)
    tensors = [torch.randn(2, 5, 7).to(dtype) for _ in range(3)]
    slots = [slab.take(tensor.nbytes) for tensor in tensors]
    for tensor, slot in zip(tensors, slots, strict=True):
        mover.to_host(tensor, slot)
    arrivals = [
        mover.to_device(slot, TensorShape.of(tensor))
        for tensor, slot in zip(tensors, slots, strict=True)
    ]
    for tensor, arrival in zip(reversed(tensors), reversed(arrivals), strict=True):
        assert torch.equal(arrival.wait(), tensor)


def test_a_forward_pass_takes_exactly_its_bytes_and_the_next_one_uses_them_again() -> None:
    slab = HostSlab(4)
    for _ in range(3):
        slots = [slab.take(300) for _ in range(4)]
        assert (slab.num_bytes, slab.num_bytes_used) == (1200, 1200)
        del slots
        assert (slab.num_bytes, slab.num_bytes_used) == (1200, 0)


def test_two_forward_passes_at_once_take_twice_the_bytes() -> None:
    slab = HostSlab(2)
    slots = [slab.take(100) for _ in range(4)]
    assert slab.num_bytes == slab.num_bytes_used == 400
    addresses = {slot.memory.data_ptr() for slot in slots}
    assert len(addresses) == 4


def test_a_longer_sequence_replaces_the_memory_and_a_shorter_one_fits() -> None:
    slab = HostSlab(2)
    first = [slab.take(100), slab.take(100)]
    del first
    longer = [slab.take(160), slab.take(160)]
    assert slab.num_bytes == 320
    del longer
    shorter = slab.take(40)
    assert slab.num_bytes == 320
    assert shorter.view(torch.Size([10]), torch.float32).shape == (10,)


def test_a_slot_outlives_the_slab_that_let_go_of_it() -> None:
    slab = HostSlab(1)
    slot = slab.take(8)
    slot.view(torch.Size([2]), torch.float32).fill_(3.0)
    slab.clear()
    assert slab.num_bytes == 0
    assert slot.view(torch.Size([2]), torch.float32).tolist() == [3.0, 3.0]


def test_sizes_do_not_take_each_others_places() -> None:
    slab = HostSlab(2)
    held = [slab.take(size) for _ in range(2) for size in (100, 8)]
    assert slab.num_bytes == slab.num_bytes_used == 2 * 108
    del held
    assert slab.num_bytes_used == 0
