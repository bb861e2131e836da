"""What keeps a model from being computed exactly on a sharded sequence, as values that can be
listed and printed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FindingKind = Literal[
    "adapters", "attention", "heads", "layers", "loss", "mask", "memory", "positions", "statistics"
]


@dataclass(frozen=True)
class Finding:
    """One part of a model that attention over shards would not compute exactly.

    Args:
        kind: which matter it belongs to.
        where: the module, by its name in the model; or `forward`, `config`, `sp_size`.
        fact: a sentence with the values.
        remedy: a sentence with what to change.
    """

    kind: FindingKind
    where: str
    fact: str
    remedy: str = "Use sp_size=1 and cp_size=1."

    def __str__(self) -> str:
        return f"{self.fact} {self.remedy}"
