"""Which sizes of the mesh axes fit a number of processes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping

from accelerate.state import AcceleratorState

from ulysses_accel.config_fields import AXES

Sizes = Mapping[str, int]
MAX_SUGGESTIONS = 6


def divisors(number: int) -> list[int]:
    """Returns the divisors of a positive number, the smallest first."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def legal_factorizations(world_size: int, sizes: Sizes, free: frozenset[str]) -> list[dict[str, int]]:
    """Lists a few sizes whose product is the number of processes, those nearest to the wish first.

    Args:
        world_size: the number of processes.
        sizes: the size of every axis that was wished for.
        free: the axes that nobody set; these are changed before the others.

    Returns:
        At most `MAX_SUGGESTIONS` complete assignments, never empty for a positive number of processes.
    """
    found: list[dict[str, int]] = []
    for candidate in _candidates(world_size, sizes, free):
        if candidate not in found:
            found.append(candidate)
        if len(found) == MAX_SUGGESTIONS:
            break
    return found


def describe_sizes(sizes: Sizes) -> str:
    """Writes the axes above 1 as constructor arguments, such as `dp_shard_size=2, sp_size=4`."""
    return ", ".join(f"{axis}_size={size}" for axis, size in sizes.items() if size > 1) or "every size 1"


def _candidates(world_size: int, sizes: Sizes, free: frozenset[str]) -> Iterator[dict[str, int]]:
    ones = dict.fromkeys(AXES, 1)
    # One axis changed: the free ones first, then the wished ones, data parallelism before the model's own axes.
    for axis in sorted(AXES, key=lambda name: name not in free):
        others = math.prod(size for name, size in sizes.items() if name != axis)
        if world_size % others == 0:
            yield {**ones, **sizes, axis: world_size // others}
    # The model's axes kept, all data parallelism on one axis.
    kept = {axis: sizes[axis] for axis in ("cp", "sp", "tp")}
    rest, remainder = divmod(world_size, math.prod(kept.values()))
    if remainder == 0:
        yield {**ones, **kept, "dp_shard": rest}
        yield {**ones, **kept, "dp_replicate": rest}
    # A degree that does not divide the world: the nearest degrees that do.
    axis = max(kept, key=lambda name: kept[name])
    for degree in sorted(divisors(world_size), key=lambda d: (abs(d - kept[axis]), d)):
        yield {**ones, "dp_replicate": world_size // degree, axis: degree}


def warn_of_earlier_accelerator(cp_size: int, sp_size: int) -> None:
    """Says that an accelerator without a config exists already: stock code ignores the config of any later one.

    Args:
        cp_size: of the config that comes too late.
        sp_size: likewise.
    """
    shared = AcceleratorState._shared_state
    if cp_size * sp_size > 1 and "parallelism_config" in shared and shared["parallelism_config"] is None:
        warnings.warn(
            f"sp_size={sp_size} and cp_size={cp_size} come too late: an Accelerator was made in this process without a "
            f"parallelism_config, and accelerate ignores that of later ones. Make this one first.",
            stacklevel=4,
        )
