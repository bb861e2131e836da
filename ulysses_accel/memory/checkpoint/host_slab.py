"""Host memory for tensors that leave the device until the backward pass wants them back.

One slab holds a whole forward pass: its size is exactly the number of tensors times their bytes.
(The framework's own pinned allocator rounds each block up to a power of two, which can double it.)
Copies run on a stream of their own.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(eq=False)
class _Block:
    """One allocation of equal slots, which serves tensors of one size at a time."""

    memory: Tensor
    slot_bytes: int
    served_bytes: int
    free: list[int] = field(default_factory=list)

    @property
    def num_slots(self) -> int:
        return self.memory.numel() // self.slot_bytes

    @property
    def is_idle(self) -> bool:
        return len(self.free) == self.num_slots


@dataclass(eq=False)
class Slot:
    """A place in the slab; it goes back to the slab when nobody holds it any more.

    Args:
        memory: its bytes.
        block: the allocation that they are part of.
    """

    memory: Tensor
    block: object

    def view(self, like: Tensor | torch.Size, dtype: torch.dtype) -> Tensor:
        """Returns the slot's memory as a tensor of that shape."""
        shape = like.shape if isinstance(like, Tensor) else like
        return self.memory[: shape.numel() * dtype.itemsize].view(dtype).view(shape)


class HostSlab:
    """Slots of host memory, allocated for one forward pass at a time and used again by the next.

    Args:
        num_slots: tensors that one forward pass puts away.
        is_pinned: whether the memory is registered with the GPU's driver, so that copies run beside
            the computation.
    """

    def __init__(self, num_slots: int, is_pinned: bool = False) -> None:
        self.num_slots, self.is_pinned = num_slots, is_pinned
        self._blocks: list[_Block] = []

    @property
    def num_bytes(self) -> int:
        """Bytes that are allocated now."""
        return sum(block.memory.numel() for block in self._blocks)

    @property
    def num_bytes_used(self) -> int:
        """Bytes of the slots that are taken now."""
        return sum(block.slot_bytes * (block.num_slots - len(block.free)) for block in self._blocks)

    def take(self, num_bytes: int) -> Slot:
        """Returns a free slot of at least that size, from a new block where no block has one."""
        serving = [
            block for block in self._blocks if block.free and block.served_bytes == num_bytes
        ]
        idle = [block for block in self._blocks if block.is_idle and block.slot_bytes >= num_bytes]
        # Never a larger slot of a block in use: the tensors it was made for would have to go
        # elsewhere.
        block = (
            serving or sorted(idle, key=lambda found: found.slot_bytes) or [self._grow(num_bytes)]
        )[0]
        block.served_bytes = num_bytes
        index = block.free.pop()
        slot = Slot(block.memory[index * block.slot_bytes : (index + 1) * block.slot_bytes], block)
        weakref.finalize(slot, block.free.append, index)
        return slot

    def _grow(self, num_bytes: int) -> _Block:
        # A block that nobody uses was too small: longer sequences came.
        self._blocks = [block for block in self._blocks if not block.is_idle]
        memory = torch.empty(self.num_slots * num_bytes, dtype=torch.uint8)
        block = _Block(memory, num_bytes, num_bytes, list(range(self.num_slots)))
        if self.is_pinned:
            _pin(block)
        self._blocks.append(block)
        return block

    def clear(self) -> None:
        """Lets go of all blocks; memory of slots that are still held is freed with them."""
        self._blocks.clear()


def _pin(block: _Block) -> None:
    runtime, memory = torch.cuda.cudart(), block.memory
    error = runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(error) != 0:
        raise MemoryError(
            f"{memory.numel()} bytes of host memory could not be pinned (CUDA error {int(error)}). "
            "Raise the limit of "
            f"locked memory (ulimit -l), or use fewer tokens, every_n_layers=2 or offload=False."
        )
    weakref.finalize(block, runtime.cudaHostUnregister, memory.data_ptr())


class Arrival(Protocol):
    """A tensor on its way back to the device."""

    def wait(self) -> Tensor:
        """Returns the tensor, ready for the operations that follow."""
        ...


class Mover(Protocol):
    """Copies between a device and the host."""

    def to_host(self, tensor: Tensor, slot: Slot) -> None:
        """Starts to copy a tensor into a slot; the caller may let go of the tensor at once."""
        ...

    def to_device(self, slot: Slot, like: TensorShape) -> Arrival:
        """Starts to copy a slot's tensor back."""
        ...


@dataclass(frozen=True)
class TensorShape:
    """What it takes to make a tensor like another one.

    Args:
        shape: its sizes.
        dtype: its element type.
        device: where it lives.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> TensorShape:
        """Returns a tensor's."""
        return cls(tensor.shape, tensor.dtype, tensor.device)

    @property
    def num_bytes(self) -> int:
        """Bytes of such a tensor."""
        return self.shape.numel() * self.dtype.itemsize

    def empty(self) -> Tensor:
        """Returns a new tensor without values."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


@dataclass
class _Arrived:
    tensor: Tensor

    def wait(self) -> Tensor:
        return self.tensor


class HostMover:
    """Copies of tensors that live on the host: done at once, in the same order as a device's."""

    def to_host(self, tensor: Tensor, slot: Slot) -> None:
        """Copies."""
        slot.view(tensor, tensor.dtype).copy_(tensor)

    def to_device(self, slot: Slot, like: TensorShape) -> Arrival:
        """Copies."""
        return _Arrived(like.empty().copy_(slot.view(like.shape, like.dtype)))


@dataclass
class _CudaArrival:
    tensor: Tensor
    event: Any

    def wait(self) -> Tensor:
        torch.cuda.current_stream(self.tensor.device).wait_event(self.event)
        return self.tensor


class CudaMover:
    """Copies on a stream of their own, beside the computation.

    Args:
        device: the GPU.
        max_inflight: copies to the host that may be under way; the computation waits for the oldest
            beyond that, so that tensors that are put away don't pile up on the device.
    """

    def __init__(self, device: torch.device, max_inflight: int = 2) -> None:
        self.device, self.max_inflight = device, max_inflight
        self.stream = torch.cuda.Stream(device)
        self._leaving: deque[Any] = deque()

    def to_host(self, tensor: Tensor, slot: Slot) -> None:
        """Starts the copy behind all that the current stream has been given."""
        current = torch.cuda.current_stream(self.device)
        while len(self._leaving) >= self.max_inflight:
            current.wait_event(self._leaving.popleft())
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            slot.view(tensor, tensor.dtype).copy_(tensor, non_blocking=True)
            self._leaving.append(self.stream.record_event())
        # The allocator must not hand out the tensor's memory before the copy has read it.
        tensor.record_stream(self.stream)

    def to_device(self, slot: Slot, like: TensorShape) -> Arrival:
        """Starts the copy; on the same stream as the copies to the host, so behind the one that
        filled the slot.
        """
        tensor = like.empty()
        # The new tensor's memory may still be read by what the current stream was given before.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            tensor.copy_(slot.view(like.shape, like.dtype), non_blocking=True)
            event = self.stream.record_event()
        return _CudaArrival(tensor, event)


def mover_for(device: torch.device, max_inflight: int = 2) -> Mover:
    """Returns what copies between a device and the host."""
    return CudaMover(device, max_inflight) if device.type == "cuda" else HostMover()
