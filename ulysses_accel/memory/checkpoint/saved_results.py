"""What one run of a checkpointed layer keeps besides its input: attention's results, and what
exchanges delivered.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor

from ulysses_accel.attention.saved_results import Part, Results, answering
from ulysses_accel.errors import UlyssesAccelError
from ulysses_accel.memory.checkpoint.storage import Source


class Keeper:
    """The results that one run of a layer keeps.

    Args:
        parts: which kinds are kept; the others are computed again.
        put_away: makes of a tensor what holds it until the recompute.
    """

    def __init__(self, parts: frozenset[Part], put_away: Callable[[Tensor], Source]) -> None:
        self._parts, self._put_away = parts, put_away
        self._kept: list[tuple[Source, ...]] = []

    def fetch(self) -> None:
        """Starts to bring back what is on the host."""
        for sources in self._kept:
            for source in sources:
                source.fetch()

    def recording(self) -> AbstractContextManager[None]:
        """Puts results away while a layer's forward runs."""

        def record(part: Part, compute: Callable[[], Results]) -> Results:
            results = compute()
            if part in self._parts:
                self._kept.append(tuple(self._put_away(result) for result in results))
            return results

        return answering(record)

    def replaying(self) -> AbstractContextManager[None]:
        """Hands results out again, in the order in which they were put away."""
        left = iter(self._kept)

        def replay(part: Part, compute: Callable[[], Results]) -> Results:
            if part not in self._parts:
                return compute()
            sources = next(left, None)
            if sources is None:
                raise UlyssesAccelError(
                    f"a checkpointed layer kept {len(self._kept)} results of attention in the "
                    "forward pass and asks "
                    f"for more when it is computed again. Switch save_attention off for this model."
                )
            # A tensor of its own each time: autograd makes it the output of the Function that hands
            # it back.
            return tuple(source.load().detach() for source in sources)

        return answering(replay)
