"""Host memory for tensors that are offloaded from the device between forward and backward.

One slab holds all tensors of a forward pass: its size is exactly their number times their bytes.
(torch's own pinned allocator rounds each block up to a power of two, which can double it.) Copies
run on a separate stream.
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
    """One allocation, divided into equal slots for tensors of one size at a time."""

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
    """Memory for one tensor in the slab; it is free again when the slot is garbage-collected.

    Args:
        memory: `[bytes]`, uint8.
        block: the allocation that it is part of.
    """

    memory: Tensor
    block: object

    def view(self, like: Tensor | torch.Size, dtype: torch.dtype) -> Tensor:
        """Returns the slot's memory as a tensor of that shape and dtype."""
        shape = like.shape if isinstance(like, Tensor) else like
        return self.memory[: shape.numel() * dtype.itemsize].view(dtype).view(shape)


class HostSlab:
    """Slots of host memory, which each forward pass uses again.

    Args:
        num_slots: tensors that one forward pass offloads.
        is_pinned: whether the memory is page-locked, so that copies overlap with the computation.
    """

    def __init__(self, num_slots: int, is_pinned: bool = False) -> None:
        self.num_slots, self.is_pinned = num_slots, is_pinned
        self._blocks: list[_Block] = []

    @property
    def num_bytes(self) -> int:
        """Bytes that are allocated."""
        return sum(block.memory.numel() for block in self._blocks)

    @property
    def num_bytes_used(self) -> int:
        """Bytes of the slots in use."""
        return sum(block.slot_bytes * (block.num_slots - len(block.free)) for block in self._blocks)

    def take(self, num_bytes: int) -> Slot:
        """Returns a free slot of at least that size, from a new block where there is none.

        Args:
            num_bytes: of the tensor.
        """
        block = self._block_for(num_bytes)
        block.served_bytes = num_bytes
        index = block.free.pop()
        slot = Slot(block.memory[index * block.slot_bytes : (index + 1) * block.slot_bytes], block)
        weakref.finalize(slot, block.free.append, index)
        return slot

    def _block_for(self, num_bytes: int) -> _Block:
        for block in self._blocks:
            if block.free and block.served_bytes == num_bytes:
                return block
        # Never a larger slot of a block in use: the tensors that it was allocated for need it.
        idle = [block for block in self._blocks if block.is_idle and block.slot_bytes >= num_bytes]
        if idle:
            return min(idle, key=lambda block: block.slot_bytes)
        return self._allocate(num_bytes)

    def _allocate(self, num_bytes: int) -> _Block:
        # Idle blocks are too small for the sequences that come now.
        self._blocks = [block for block in self._blocks if not block.is_idle]
        memory = torch.empty(self.num_slots * num_bytes, dtype=torch.uint8)
        block = _Block(memory, num_bytes, num_bytes, list(range(self.num_slots)))
        if self.is_pinned:
            _pin(block)
        self._blocks.append(block)
        return block

    def clear(self) -> None:
        """Frees all blocks; the memory of a slot in use is freed with the slot."""
        self._blocks.clear()


def _pin(block: _Block) -> None:
    runtime, memory = torch.cuda.cudart(), block.memory
    error = runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(error) != 0:
        raise MemoryError(
            f"{memory.numel()} bytes of host memory could not be pinned (CUDA error {int(error)}). "
            "Raise the limit of locked memory (ulimit -l), or use fewer tokens, every_n_layers=2 "
            "or offload=False."
        )
    weakref.finalize(block, runtime.cudaHostUnregister, memory.data_ptr())


class Arrival(Protocol):
    """A copy to the device that has been started."""

    def wait(self) -> Tensor:
        """Returns the tensor; operations that follow wait for the copy."""
        ...


class Mover(Protocol):
    """Copies between a device and the host."""

    def to_host(self, tensor: Tensor, slot: Slot) -> None:
        """Starts to copy a tensor into a slot; the caller may free the tensor at once."""
        ...

    def to_device(self, slot: Slot, like: TensorShape) -> Arrival:
        """Starts to copy a slot's tensor to the device."""
        ...


@dataclass(frozen=True)
class TensorShape:
    """Shape, dtype and device of a tensor that is not there any more.

    Args:
        shape: sizes of its dims.
        dtype: of its elements.
        device: that it was on.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> TensorShape:
        """Returns those of a tensor."""
        return cls(tensor.shape, tensor.dtype, tensor.device)

    @property
    def num_bytes(self) -> int:
        """Bytes of such a tensor."""
        return self.shape.numel() * self.dtype.itemsize

    def empty(self) -> Tensor:
        """Returns an uninitialised tensor."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


@dataclass
class _Arrived:
    tensor: Tensor

    def wait(self) -> Tensor:
        return self.tensor


class HostMover:
    """Copies tensors that are on the host already, for training on the CPU; without delay."""

    def to_host(self, tensor: Tensor, slot: Slot) -> None:
        """Copies a tensor into a slot."""
        slot.view(tensor, tensor.dtype).copy_(tensor)

    def to_device(self, slot: Slot, like: TensorShape) -> Arrival:
        """Copies a slot's tensor."""
        return _Arrived(like.empty().copy_(slot.view(like.shape, like.dtype)))


@dataclass
class _CudaArrival:
    tensor: Tensor
    event: Any

    def wait(self) -> Tensor:
        torch.cuda.current_stream(self.tensor.device).wait_event(self.event)
        return self.tensor


class CudaMover:
    """Copies on a separate CUDA stream, overlapping with the computation.

    Args:
        device: the GPU.
        max_inflight: copies to the host that may be unfinished; the computation waits for the
            oldest beyond that, so that offloaded tensors don't pile up on the device.
    """

    def __init__(self, device: torch.device, max_inflight: int = 2) -> None:
        self.device, self.max_inflight = device, max_inflight
        self.stream = torch.cuda.Stream(device)
        self._leaving: deque[Any] = deque()

    def to_host(self, tensor: Tensor, slot: Slot) -> None:
        """Starts the copy after everything that is queued on the current stream."""
        current = torch.cuda.current_stream(self.device)
        while len(self._leaving) >= self.max_inflight:
            current.wait_event(self._leaving.popleft())
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            slot.view(tensor, tensor.dtype).copy_(tensor, non_blocking=True)
            self._leaving.append(self.stream.record_event())
        # CUDA's caching allocator must not reuse the tensor's memory before the copy has read it.
        tensor.record_stream(self.stream)

    def to_device(self, slot: Slot, like: TensorShape) -> Arrival:
        """Starts the copy; on the same stream as the copies to the host, so after the one that
        filled the slot.
        """
        tensor = like.empty()
        # Operations queued on the current stream may still read the new tensor's memory.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            tensor.copy_(slot.view(like.shape, like.dtype), non_blocking=True)
            event = self.stream.record_event()
        return _CudaArrival(tensor, event)


def mover_for(device: torch.device, max_inflight: int = 2) -> Mover:
    """Returns the mover of a device.

    Args:
        device: that tensors are offloaded from.
        max_inflight: copies to the host that may be unfinished.
    """
    return CudaMover(device, max_inflight) if device.type == "cuda" else HostMover()
