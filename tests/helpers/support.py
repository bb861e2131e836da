"""The table of what works with what, `docs/support.md`: filled in by the tests that prove its rows.

A test takes the fixture `support` and says what it proves; the claim counts when the test passes.
`make support` runs those tests and writes the table. A run of the whole suite compares the
committed table with what it has just proved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

AREAS = {
    "trainer": "Trainers",
    "loss": "Losses",
    "batch": "Batches",
    "model": "Models",
    "system": "Systems",
}
MODES = ("sp", "cp", "cp × sp", "dp × sp", "tp", "tp × sp", "tp × cp", "ep", "ep × sp")
ENGINES = ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3")

_HEAD = """# What works with what

Written by `make support` from the results of the tests, which compare each row with one process: its loss and
gradients, or for trainers its loss curve. A cell names the engines that the tests ran it on; "refused" means that every
process raises the same error, with the reason; "–" means that no test says anything. The modes are the axes of
`ParallelismConfig` that are above 1: `sp` Ulysses, `cp` ring, `dp` data parallel groups, `tp` tensor parallel with the
sequence sharded, `ep` experts. Every model of transformers by itself is in [models.md](models.md).
"""


@dataclass(frozen=True)
class Claim:
    """One thing that a test proves.

    Args:
        area: a key of `AREAS`.
        subject: the row.
        mode: the column.
        engine: that it ran on; "" for a refusal.
        code: one line that a user writes; "" for a refusal.
        reason: why it is refused; "" where it works.
    """

    area: str
    subject: str
    mode: str
    engine: str
    code: str
    reason: str

    def __post_init__(self) -> None:
        known = (
            self.area in AREAS
            and self.mode in MODES
            and (self.engine in ENGINES or bool(self.reason))
        )
        assert known, f"{self}: area is one of {list(AREAS)}, mode of {MODES}, engine of {ENGINES}"
        assert self.reason or (self.code and "\n" not in self.code), (
            f"{self}: one line of code is needed"
        )


@dataclass
class Support:
    """What the fixture gives to a test."""

    claims: list[Claim] = field(default_factory=list)

    def __call__(
        self, area: str, subject: str, mode: str, *, code: str, engine: str = "DDP"
    ) -> None:
        """Claims that something is exact."""
        self.claims.append(Claim(area, subject, mode, engine, code, ""))

    def refused(self, area: str, subject: str, mode: str, reason: str) -> None:
        """Claims that something is refused by name on every process."""
        self.claims.append(Claim(area, subject, mode, "", "", reason))


def render(claims: Iterable[Claim]) -> str:
    """Returns the table's text."""
    known = set(claims)
    parts = [_HEAD]
    for area, title in AREAS.items():
        own = [claim for claim in known if claim.area == area]
        if own:
            parts.append(f"\n## {title}\n\n{_table(own)}")
    return "".join(parts)


def _table(claims: list[Claim]) -> str:
    modes = [mode for mode in MODES if any(claim.mode == mode for claim in claims)]
    lines = [f"| | {' | '.join(modes)} | in code |", "|" + "---|" * (len(modes) + 2)]
    for subject in sorted({claim.subject for claim in claims}, key=str.lower):
        own = [claim for claim in claims if claim.subject == subject]
        codes = sorted({claim.code for claim in own if claim.code})
        cells = [_cell([claim for claim in own if claim.mode == mode]) for mode in modes]
        shown = "<br>".join(f"`{code}`" for code in codes).replace("|", "\\|")
        lines.append(f"| {subject} | {' | '.join(cells)} | {shown} |")
    return "\n".join(lines) + "\n"


def _cell(claims: list[Claim]) -> str:
    reasons = sorted({claim.reason for claim in claims if claim.reason})
    engines = [engine for engine in ENGINES if any(claim.engine == engine for claim in claims)]
    assert not (reasons and engines), f"{claims}: both refused and exact"
    if reasons:
        return f"refused: {'; '.join(reasons)}"
    return ", ".join(engines) or "–"


def difference(committed: str, proved: str, line_of: Callable[[str], str] = str.strip) -> list[str]:
    """Returns the lines of two tables that only one has."""
    old, new = ([line_of(line) for line in text.splitlines()] for text in (committed, proved))
    return [f"- {line}" for line in old if line not in new] + [
        f"+ {line}" for line in new if line not in old
    ]
