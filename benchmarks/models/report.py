"""What the walk over all architectures found, as verdicts, counts, and the table in
`docs/models.md`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import FOLDER, shorten, table, update_readme, versions

MODES = ((2, 1), (1, 2), (2, 2))
EXACT = 1e-12
LOOSE = 1e-9
# Of the whole work: padding to a length that the ranks divide makes it a little more than 1.
REPLICATED = 1.35
# The worst first; what only one rank says counts as a hang, because its peers would wait for it.
_ORDER = ("hang", "crash", "wrong", "replicated", "refused", "exact to 1e-9", "exact")
NOT_RUN = "not run"
DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
_HEADINGS = (
    "model type",
    "head",
    "verdict",
    "worst error",
    "also mixes tokens in",
    "why, and what to do",
)

Rows = dict[str, dict[str, Any]]


def verdict_of(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the worst that any kind of batch came to, with what it rests on."""
    kinds = {
        kind: _verdict_of_kind([report.get(kind, {}) for report in reports]) for kind in reports[0]
    }
    worst = min(kinds, key=lambda kind: _ORDER.index(kinds[kind]["verdict"]))
    verdict = kinds[worst]["verdict"]
    errors = [row["error"] for row in kinds.values() if isinstance(row.get("error"), float)]
    same = [kind for kind in kinds if kinds[kind]["verdict"] == verdict]
    return {
        "verdict": verdict,
        "why": kinds[worst].get("why", ""),
        # A refusal of some kinds of batches only says less than one of the model.
        "only": [] if len(same) == len(kinds) else same,
        "worst_error": max(errors, default=None),
        "kinds": kinds,
    }


def _verdict_of_kind(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    statuses = {row.get("status", "hang") for row in ranks}
    told = list(dict.fromkeys(str(row.get("error", row.get("status"))) for row in ranks))
    if len(statuses) > 1 or (statuses == {"refused"} and len(told) > 1):
        return {"verdict": "hang", "why": "the ranks differ: " + " / ".join(told)}
    if statuses & {"hang", "crash", "refused"}:
        return {"verdict": statuses.pop(), "why": f"{told[0]} ({ranks[0].get('where', '')})"}
    error = max(row["error"] for row in ranks)
    shares = [row["share"] for row in ranks]
    found = {"error": error, "shares": shares, "against": ranks[0]["against"]}
    if not error <= LOOSE:
        return {**found, "verdict": "wrong", "why": f"error {error:.1e} in {ranks[0]['worst']}"}
    if sum(shares) > REPLICATED:
        return {
            **found,
            "verdict": "replicated",
            "why": f"shares of the linear layers' rows: {shares}",
        }
    return {**found, "verdict": "exact" if error <= EXACT else "exact to 1e-9"}


def overall(row: dict[str, Any]) -> tuple[str, str]:
    """Returns an architecture's verdict over all modes, and why."""
    modes = row["modes"].values()
    if not modes:
        return NOT_RUN, row["note"]
    worst = min(modes, key=lambda mode: _ORDER.index(mode["verdict"]))
    only = f"({', '.join(worst['only'])} batches) " if worst["only"] and worst["why"] else ""
    return worst["verdict"], only + worst["why"]


def is_eligible(row: dict[str, Any]) -> bool:
    """Whether a row counts for the share of exact ones: it runs, and mixes tokens only where it can
    be replaced.
    """
    return bool(row["modes"]) and row["routes"] is True and not row["mixes_in"]


def publish_models(rows: Rows, *, write: bool) -> None:
    """Prints the counts and a line for each architecture that is not exact; with `write`, keeps all
    of it.
    """
    counts = table(("rows", "verdict", "count"), counts_of(rows))
    taken = ", ".join(f"{key} {value}" for key, value in versions().items())
    lines = lines_of(rows)
    print(
        f"{counts}\n\n{table(_HEADINGS, [line for line in lines if not line[2].startswith('exact')])}\n\n{taken}"
    )
    if not write:
        return
    (FOLDER / "results").mkdir(exist_ok=True)
    kept = [{"name": name, "verdict": overall(row)[0], **row} for name, row in rows.items()]
    listed = ",\n".join(json.dumps(row) for row in kept)
    text = f'{{"versions": {json.dumps(versions())}, "rows": [\n{listed}\n]}}\n'
    (FOLDER / "results" / "models-cpu.json").write_text(text)
    update_readme("models", f"{counts}\n\nEach row: `docs/models.md`. Measured with {taken}.\n")
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(document(counts, table(_HEADINGS, lines), taken))


def document(counts: str, rows: str, taken: str) -> str:
    """Returns the page: what was done, the counts, then a row for each architecture."""
    return f"""# Architectures

Written by `python -m benchmarks.models`; do not edit. Measured with {taken}.

Every architecture of the installed transformers with a language model's loss, shrunk to 2 to 6 layers of 32 channels,
without weights or downloads, through a stock `Accelerator` at (sp, cp) = (2, 1) and (1, 2), and at (2, 2) where these
are exact. Batches: plain; packed documents where the model takes positions; padding on the left, within a row and on
the right; a length that the ranks do not divide. Encoder-decoders get labels of another length than their input;
image-text models get text only; `rope` rows scale the rotary positions of a causal model.

- *exact*: loss and every gradient within a relative error of 1e-12 (or 1e-9, where said) of one process in float64,
  each rank doing its share of the linear layers' work. An encoder whose input is no tokens runs whole on every rank;
  there the decoder's share is what is measured.
- *refused*: by name, with the same error on every rank, when the model is prepared; kinds of batches in front of the
  reason mean that only these are refused.
- *not run*: one process does not run the shrunk model on a batch without images, or it can't be shrunk.
- *also mixes tokens in*: found by running the model with an attention in which each token sees itself only. Modules
  named there let tokens see each other by other means (state spaces, convolutions, statistics of the sequence,
  attention that does not go through transformers' functions, masks chosen by content). Sharding attention can't make
  those exact.

{counts}

{rows}
"""


def counts_of(rows: Rows) -> list[list[str]]:
    """Returns the lines of the counts: all rows, each head, then the share that is exact of those
    that could be.
    """
    verdicts = {name: overall(row)[0] for name, row in rows.items()}
    lines = [
        [f"all {len(rows)}", verdict, str(count)]
        for verdict, count in sorted(Counter(verdicts.values()).items())
    ]
    groups = {"**attention routed, tokens mixed nowhere else**": list(rows)}
    for head in dict.fromkeys(row["head"] for row in rows.values()):
        groups[f"the same, {head}"] = [name for name in rows if rows[name]["head"] == head]
    for title, names in groups.items():
        able = [name for name in names if is_eligible(rows[name])]
        exact = [name for name in able if verdicts[name].startswith("exact")]
        share = f" ({len(exact) / len(able):.0%})" if able else ""
        lines.append([title, "exact", f"{len(exact)} of {len(able)}{share}"])
    errors = [_worst_error(rows[name]) for name in rows if verdicts[name].startswith("exact")]
    if errors:
        lines.append(
            [
                "largest error of the exact rows",
                f"{max(errors):.1e}",
                f"median {median(errors):.1e}",
            ]
        )
    return lines


def lines_of(rows: Rows) -> list[list[str]]:
    """Returns a line of the table for each row: by type, then by head."""
    lines = []
    for row in sorted(
        rows.values(), key=lambda row: (row["type"].lower(), row["head"], row["variant"])
    ):
        verdict, why = overall(row)
        error = f"{_worst_error(row):.1e}" if verdict.startswith("exact") else ""
        name = f"{row['type']} {row['variant']}".strip()
        lines.append(
            [name, row["head"], verdict, error, _mixes(row), shorten(_reason(verdict, why), 330)]
        )
    return lines


def _mixes(row: dict[str, Any]) -> str:
    if row["routes"] is None:
        return "unknown"
    return ", ".join([*(() if row["routes"] else ("no attention routed",)), *row["mixes_in"]])


def _worst_error(row: dict[str, Any]) -> float:
    return max(float(mode["worst_error"]) for mode in row["modes"].values())


def _reason(verdict: str, why: str) -> str:
    """A refusal's findings, without its heading and its place in the code."""
    if verdict != "refused":
        return why
    head, found, rest = re.sub(r" \(\w+\.py:\d+\)$", "", why).partition("\n- ")
    return (
        rest.replace("\n- ", " Also: ") if found else re.sub(r"^(\(.*?\) )?\w+Error: ", r"\1", head)
    )
