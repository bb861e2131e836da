"""The random and autocast state of a forward, under which its backward computes parts of it again.

Autograd runs the backward pass outside of autocast, and after other random numbers were drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExecutionState:
    """The random and autocast state at one moment.

    Args:
        device: of the computation.
        autocast: for each device type in use, whether autocast is enabled, and its dtype.
        autocast_cache: whether autocast keeps the weights that it cast.
        cpu_generator: state of the CPU's generator; None where random numbers are not to be
            repeated.
        device_generator: state of the device's generator, on CUDA.
    """

    device: torch.device
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    autocast_cache: bool
    cpu_generator: Tensor | None
    device_generator: Tensor | None

    @classmethod
    def capture(cls, device: torch.device, *, random: bool = True) -> ExecutionState:
        """Returns the present state.

        Args:
            device: of the computation.
            random: whether to capture the generators, too.
        """
        device_types = ("cpu",) if device.type == "cpu" else ("cpu", device.type)
        on_cuda = random and device.type == "cuda"
        return cls(
            device,
            tuple(
                (name, torch.is_autocast_enabled(name), torch.get_autocast_dtype(name))
                for name in device_types
            ),
            torch.is_autocast_cache_enabled(),
            torch.get_rng_state() if random else None,
            torch.cuda.get_rng_state(device) if on_cuda else None,
        )

    @contextmanager
    def same_autocast(self) -> Iterator[None]:
        """Computes under the captured autocast state."""
        with ExitStack() as stack:
            for name, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(name, dtype, enabled, self.autocast_cache))
            yield

    @contextmanager
    def same_random_numbers(self) -> Iterator[None]:
        """Draws the captured state's random numbers, if it was captured with them; the generators
        continue afterwards as if nothing had been drawn.
        """
        if self.cpu_generator is None:
            yield
            return
        devices = [] if self.device_generator is None else [self.device]
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self.cpu_generator)
            if self.device_generator is not None:
                torch.cuda.set_rng_state(self.device_generator, self.device)
            yield


def linear_dtype(tensor: Tensor) -> torch.dtype:
    """Returns the dtype that `torch.nn.functional.linear` computes in: autocast's where it is
    enabled, which leaves float64 alone.
    """
    device_type = tensor.device.type
    if torch.is_autocast_enabled(device_type) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return tensor.dtype
