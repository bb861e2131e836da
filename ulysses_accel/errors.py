"""The exceptions of this package: one base class, one subclass for each thing a user can correct.

Every message says the fact with its values, where the value came from, and what to change.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UlyssesAccelError(RuntimeError):
    """Base class of every error that this package raises on purpose."""


class ConfigError(UlyssesAccelError, ValueError):
    """A setting is not legal, or two settings contradict each other."""


class MeshError(ConfigError):
    """The sizes of the mesh axes do not fit the number of processes."""


class BatchError(UlyssesAccelError, ValueError):
    """A batch can't be sharded over the sequence."""


class ShapeError(UlyssesAccelError, ValueError):
    """A tensor's shape does not fit the operation it is passed to."""


class RankDisagreementError(UlyssesAccelError):
    """Ranks that must do the same thing were about to do different things."""


class UnsupportedModelError(UlyssesAccelError, ValueError):
    """A model has a part that can't be computed exactly on a sharded sequence."""


class CheckpointError(UlyssesAccelError, ValueError):
    """Saved state does not fit the job that loads it."""


def closest(name: str, legal: Iterable[str]) -> str:
    """Returns ` Did you mean 'x'?` for the nearest legal name, or the list of legal names.

    Args:
        name: what the user wrote.
        legal: every name that is allowed in its place.

    Returns:
        A sentence that starts with a space, to follow the fact.
    """
    names = sorted(legal)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f" Did you mean '{near[0]}'?"
    return f" Legal names: {', '.join(names)}."
