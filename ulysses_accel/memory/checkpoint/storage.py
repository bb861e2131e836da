"""Where a tensor of the forward pass is until the backward pass wants it: on the device, or on the
host.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ulysses_accel import _private_api
from ulysses_accel.errors import UlyssesAccelError
from ulysses_accel.memory.checkpoint.host_slab import Arrival, HostSlab, Mover, Slot, TensorShape


class Source(Protocol):
    """A tensor that is kept somewhere."""

    def fetch(self) -> None:
        """Starts to bring it back, where it is not on the device."""
        return

    def load(self) -> Tensor:
        """Returns it, without gradient."""
        ...


class OnDevice(Source):
    """An input that stays where it is."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor.detach(), _private_api.tensor_version(tensor)

    def load(self) -> Tensor:
        """Returns it.

        Raises:
            UlyssesAccelError: something wrote to it since.
        """
        if _private_api.tensor_version(self._tensor) != self._version:
            raise UlyssesAccelError(
                f"the input {list(self._tensor.shape)} of a checkpointed layer was modified in "
                "place after the layer "
                "ran, so it can't be computed again. Use offload=True, which copies it, or change "
                "that operation."
            )
        return self._tensor


class OnHost(Source):
    """An input that was put away.

    Args:
        tensor: the input; not held.
        slab: where to.
        mover: who copies.
    """

    def __init__(self, tensor: Tensor, slab: HostSlab, mover: Mover) -> None:
        self._like, self._mover = TensorShape.of(tensor), mover
        self._slot: Slot = slab.take(self._like.num_bytes)
        self._arrival: Arrival | None = None
        mover.to_host(tensor.detach(), self._slot)

    def fetch(self) -> None:
        """Starts to bring it back."""
        if self._arrival is None:
            self._arrival = self._mover.to_device(self._slot, self._like)

    def load(self) -> Tensor:
        """Returns it, and lets go of the copy on the device."""
        self.fetch()
        assert self._arrival is not None
        tensor = self._arrival.wait()
        self._arrival = None
        return tensor
