"""One pass over a wrapped loader: refills, the position in them, and the knowledge of which
micro-step is the last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ulysses_accel.dataloader.loader_state import inner_state, loader_at
from ulysses_accel.dataloader.pipeline import Refiller
from ulysses_accel.dataloader.random_state import Replay, SeedAside, capture


@dataclass(frozen=True)
class Position:
    """Where a pass stands or is to start; see `LoaderState` for the fields."""

    batches: int = 0
    micro_step: int = 0
    random: dict[str, str] | None = None
    inner: dict[str, Any] | None = None
    warm: bool = False


@dataclass(frozen=True)
class _Refill:
    """The outcome of a refill: micro-steps, the agreed end (None), or an error that is to be raised
    in its turn.
    """

    steps: list[dict[str, Any]] | None = None
    is_last: bool = False
    error: Exception | None = None
    inner: dict[str, Any] | None = None


class EpochRun:
    """An iterator over the micro-steps of one epoch.

    Args:
        loader: the wrapped loader.
        refiller: turns batches into micro-steps.
        start: where to begin; with recorded random states or the wrapped loader's state to resume,
            without to start again.
        lookahead: draw a refill before the last micro-step of the one before it, to know whether it
            is the last of all; without, the loader's own `end_of_dataloader` says so.
    """

    def __init__(self, loader: Any, refiller: Refiller, start: Position, lookahead: bool) -> None:
        self.batches = start.batches
        self.micro_step = start.micro_step
        self.is_last = False
        self._loader, self._refiller, self._lookahead = loader, refiller, lookahead
        self._per_refill = 1 if refiller.same_batch else refiller.layout.num_shards
        self._source: Any = loader
        self._iterator: Iterator[Any] = iter(())
        self._drawn = start.batches
        self._to_drop = 0
        self._warm = start.warm
        self._replay: Replay | None = None
        self._seed_aside: SeedAside | None = None
        self._exhausted = False
        self.has_failed = False
        self._steps: deque[dict[str, Any]] = deque()
        self._current: _Refill | None = None
        self._ahead: _Refill | None = None
        self._random = start.random
        if start.random is None and start.inner is None:
            self._random = capture(loader)
        # A rank that can't even start (workers, files) says so in the first agreement, where the
        # others wait for it.
        self._broken: Exception | None = None
        try:
            self._open(start)
        except Exception as error:
            self._broken = error

    def _open(self, start: Position) -> None:
        self._refiller = self._refiller.resolved()
        if start.inner is not None:
            self._loader.load_state_dict(start.inner)
        else:
            self._replay = Replay(self._loader, start.random) if start.random is not None else None
            self._seed_aside = SeedAside(self._loader, start.warm)
            self._source, self._to_drop = loader_at(self._loader, start.batches)
        self._iterator = iter(self._source)

    def position(self) -> Position:
        """Returns where the next micro-step is: exact, whatever has been drawn ahead."""
        if self.micro_step and self._current is not None:
            inner = self._current.inner
        elif self._ahead is not None:
            inner = self._ahead.inner
        else:
            inner = inner_state(self._loader)
        return Position(
            self.batches, self.micro_step, None if inner else self._random, inner, self._warm
        )

    def __iter__(self) -> EpochRun:
        return self

    def __next__(self) -> dict[str, Any]:
        """Returns the next micro-step, on the host; `is_last` is up to date when it returns."""
        if self.has_failed:
            raise StopIteration
        if not self._steps:
            self._advance()
        step = self._steps.popleft()
        self.micro_step += 1
        if not self._steps:
            self.batches, self.micro_step = self.batches + 1, 0
            self.is_last = self._ends_here()
        return step

    def close(self) -> None:
        """Forgets an error that was to be raised with the next micro-step."""
        if self._ahead is not None:
            self._ahead = replace(self._ahead, error=None)

    def _advance(self) -> None:
        refill = self._ahead if self._ahead is not None else self._fetch()
        # An error holds the frames that it passed through, and those hold this object: neither it
        # nor a frame may keep the error.
        self._current, self._ahead = replace(refill, error=None), None
        error = refill.error
        del refill
        if error is not None:
            self.has_failed = True
            try:
                raise error
            finally:
                del error
        if self._current.steps is None:
            # Ends this pass: the caller's `for` sees it through `__next__`.
            raise StopIteration
        self._steps = deque(self._current.steps[self.micro_step :])

    def _ends_here(self) -> bool:
        if not self._lookahead:
            return self._current is not None and self._current.is_last
        self._ahead = self._fetch()
        return self._ahead.error is None and self._ahead.steps is None

    def _fetch(self) -> _Refill:
        inner = inner_state(self._loader)
        resumed = self.micro_step if self._drawn == self.batches else 0
        position = self._drawn * self._per_refill + resumed
        first = self._drawn == 0
        try:
            refilled = self._refiller.refill(self._draw, position, first)
        except Exception as error:
            return _Refill(error=error, inner=inner)
        self._drawn += 1
        if refilled is None:
            return _Refill(inner=inner)
        steps, is_last = refilled
        return _Refill(steps, is_last, inner=inner)

    def _draw(self) -> tuple[Any, bool]:
        if self._broken is not None:
            self._exhausted = True
            error, self._broken = self._broken, None
            try:
                raise error
            finally:
                del error
        if self._exhausted:
            raise StopIteration
        try:
            while self._to_drop:
                self._next()
                self._to_drop -= 1
            batch = self._next()
        except StopIteration:
            self._exhausted = True
            raise
        return batch, not self._lookahead and bool(self._source.end_of_dataloader)

    def _next(self) -> Any:
        try:
            return next(self._iterator)
        finally:
            for temporary in (self._replay, self._seed_aside):
                if temporary is not None:
                    temporary.stop()
