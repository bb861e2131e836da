"""Where a layer's input is stored between forward and backward: on the device or on the host."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ulysses_accel import _private_api
from ulysses_accel.errors import UlyssesAccelError
from ulysses_accel.memory.checkpoint.host_slab import Arrival, HostSlab, Mover, Slot, TensorShape


class Source(Protocol):
    """A stored tensor."""

    def fetch(self) -> None:
        """Starts to copy it to the device, if it is not there."""
        return

    def load(self) -> Tensor:
        """Returns it, detached."""
        ...


class OnDevice(Source):
    """A tensor that stays on the device."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor.detach(), _private_api.tensor_version(tensor)

    def load(self) -> Tensor:
        """Returns it.

        Raises:
            UlyssesAccelError: it was modified in place since.
        """
        if _private_api.tensor_version(self._tensor) != self._version:
            raise UlyssesAccelError(
                f"the input {list(self._tensor.shape)} of a checkpointed layer was modified in "
                "place after the layer ran, so it can't be computed again. Use offload=True, which "
                "copies it, or change that operation."
            )
        return self._tensor


class OnHost(Source):
    """A tensor that was offloaded to the host.

    Args:
        tensor: to be copied; not held.
        slab: holds the copy.
        mover: copies it.
    """

    def __init__(self, tensor: Tensor, slab: HostSlab, mover: Mover) -> None:
        self._like, self._mover = TensorShape.of(tensor), mover
        self._slot: Slot = slab.take(self._like.num_bytes)
        self._arrival: Arrival | None = None
        mover.to_host(tensor.detach(), self._slot)

    def fetch(self) -> None:
        """Starts to copy it to the device."""
        if self._arrival is None:
            self._arrival = self._mover.to_device(self._slot, self._like)

    def load(self) -> Tensor:
        """Returns it; the only reference to the copy on the device is the caller's."""
        self.fetch()
        assert self._arrival is not None
        tensor = self._arrival.wait()
        self._arrival = None
        return tensor
