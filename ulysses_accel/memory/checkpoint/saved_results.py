"""What one run of a checkpointed layer saves besides its input: attention's results, and the
outputs of its exchanges.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor

from ulysses_accel.attention.saved_results import Part, Results, answering
from ulysses_accel.errors import UlyssesAccelError
from ulysses_accel.memory.checkpoint.storage import Source


class SavedResults:
    """The results that one run of a layer saves.

    Args:
        parts: which kinds are saved; the others are computed again.
        store: takes a tensor, and returns what holds it until the recompute.
    """

    def __init__(self, parts: frozenset[Part], store: Callable[[Tensor], Source]) -> None:
        self._parts, self._store = parts, store
        self._saved: list[tuple[Source, ...]] = []

    def fetch(self) -> None:
        """Starts to copy to the device what is on the host."""
        for sources in self._saved:
            for source in sources:
                source.fetch()

    def recording(self) -> AbstractContextManager[None]:
        """Saves results while a layer's forward runs."""

        def record(part: Part, compute: Callable[[], Results]) -> Results:
            results = compute()
            if part in self._parts:
                self._saved.append(tuple(self._store(result) for result in results))
            return results

        return answering(record)

    def replaying(self) -> AbstractContextManager[None]:
        """Returns the saved results, in the order of the forward, while the layer runs again."""
        remaining = iter(self._saved)

        def replay(part: Part, compute: Callable[[], Results]) -> Results:
            if part not in self._parts:
                return compute()
            sources = next(remaining, None)
            if sources is None:
                raise UlyssesAccelError(
                    f"a checkpointed layer saved {len(self._saved)} results of attention in the "
                    "forward pass and needs more when it is computed again. Switch save_attention "
                    "off for this model."
                )
            # A new tensor each time: autograd sets the grad_fn of what a Function returns.
            return tuple(source.load().detach() for source in sources)

        return answering(replay)
