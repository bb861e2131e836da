"""The random state that decides the order of an epoch: recorded when the epoch begins, replayed
when it is resumed.

A sampler takes its permutation from its generator, or from torch's global one, when its first
index is drawn. On resume the recorded state is in force until the first batch is drawn; then
the caller's random state, which a checkpoint has restored to the middle of the epoch, is put back.
Numbers that a dataset draws for itself (augmentation) are not replayed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ulysses_accel import _private_api
from ulysses_accel.errors import CheckpointError

_PATHS = (
    "generator",
    "synchronized_generator",
    "sampler.generator",
    "batch_sampler.generator",
    "batch_sampler.sampler.generator",
    "batch_sampler.batch_sampler.generator",
    "batch_sampler.batch_sampler.sampler.generator",
    "dataset.generator",
)


def capture(loader: Any) -> dict[str, str]:
    """Returns the states of torch's global CPU generator and of the loader's, as
    hexadecimal text.
    """
    states = {"torch": _hex(torch.get_rng_state())}
    for path, generator in _generators(loader):
        states[path] = _hex(generator.get_state())
    return states


def check_states(loader: Any, states: dict[str, str]) -> None:
    """Checks that recorded random states can be replayed on a loader; changes nothing.

    Raises:
        CheckpointError: the loader lacks a generator that was recorded, or a state is none.
    """
    for path in states.keys() - dict(_generators(loader)).keys() - {"torch"}:
        # A sampler that derives its generator from seed and epoch makes it when it is first used.
        if not hasattr(_walk(loader, path.rpartition(".")[0]), "initial_seed"):
            raise CheckpointError(
                f"the loader's state holds a random generator at '{path}', but the loader has none "
                "there. "
                "Build the data loader as in the run that saved the state."
            )
    for path, text in states.items():
        try:
            torch.Generator().set_state(_unhex(text))
        except (RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the loader's state holds no valid random state at '{path}': {error}."
            ) from error


class Replay:
    """Puts recorded random states in force, until `stop` restores the caller's.

    Args:
        loader: whose generators are set.
        states: from `capture`, checked by `check_states`.
    """

    def __init__(self, loader: Any, states: dict[str, str]) -> None:
        recorded = _unhex(states["torch"])
        mine = torch.get_rng_state()
        # A caller who is where the epoch began goes on from there, as the first run did.
        self._mine = None if torch.equal(mine, recorded) else mine
        for path, generator in _generators(loader):
            if path in states:
                generator.set_state(_unhex(states[path]))
        torch.set_rng_state(recorded)

    def stop(self) -> None:
        """Gives torch's global generator back to the caller; the first call counts."""
        if self._mine is not None:
            torch.set_rng_state(self._mine)
            self._mine = None


def keeps_workers(loader: Any) -> bool:
    """Returns whether the loader's workers live on from one epoch to the next."""
    return bool(getattr(loader, "persistent_workers", False)) and bool(
        getattr(loader, "num_workers", 0)
    )


class SeedAside:
    """Lets a loader take the seed of new workers from elsewhere, until `stop`.

    A loader draws one number for its workers when it starts them. With workers that live on it does
    so in the first epoch only; a resumed job starts them in a later one, and must not take a number
    that the sampler would have got.

    Args:
        loader: the wrapped loader.
        warm: whether the job that saved the state had the workers already.
    """

    def __init__(self, loader: Any, warm: bool) -> None:
        self._base = getattr(loader, "base_dataloader", loader)
        self._active = warm and _private_api.live_iterator(self._base) is None
        self._generator = getattr(self._base, "generator", None)
        if self._active:
            self._base.generator = torch.Generator()

    def stop(self) -> None:
        """Restores the loader's generator; the first call counts."""
        if self._active:
            self._base.generator = self._generator
            self._active = False


def _generators(loader: Any) -> Iterator[tuple[str, torch.Generator]]:
    seen: set[int] = set()
    for path in _PATHS:
        generator = _walk(loader, path)
        if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
            continue
        if id(generator) not in seen:
            seen.add(id(generator))
            yield path, generator


def _walk(value: Any, path: str) -> Any:
    for name in path.split(".") if path else ():
        value = getattr(value, name, None)
    return value


def _hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _unhex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
