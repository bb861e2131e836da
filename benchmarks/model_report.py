"""What the walk over all architectures found, as verdicts, counts and a table."""

from __future__ import annotations

import re
from collections import Counter
from statistics import median
from typing import Any

from benchmarks.report import publish, shorten

MODES = ((2, 1), (1, 2), (2, 2))
EXACT = 1e-12
LOOSE = 1e-9
# Of the whole work: padding to a length that the ranks divide makes it a little more than 1.
REPLICATED = 1.35
# Refusals of models that mix tokens outside of the attention that they call, or choose by content what it sees.
_ELSEWHERE = re.compile(r"layers are (?!chunked)|makes from its own tokens|Cross-attention and key caches")
_ORDER = ("hang", "crash", "wrong", "replicated", "refused", "no reference", "exact <= 1e-9", "exact")


def verdict_of(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the worst that any kind of batch came to, with what it rests on."""
    kinds = {kind: _verdict_of_kind([report.get(kind, {}) for report in reports]) for kind in reports[0]}
    worst = min(kinds, key=lambda kind: _ORDER.index(kinds[kind]["verdict"]))
    errors = [row["error"] for row in kinds.values() if isinstance(row.get("error"), float)]
    return {
        "verdict": kinds[worst]["verdict"],
        "why": kinds[worst].get("why", ""),
        "worst_error": max(errors, default=None),
        "kinds": kinds,
    }


def _verdict_of_kind(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    statuses = {row.get("status", "hang") for row in ranks}
    if len(statuses) > 1:
        told = [str(row.get("error", row.get("status"))) for row in ranks if row]
        return {"verdict": "hang", "why": "the ranks differ: " + " / ".join(told)}
    if statuses & {"hang", "crash", "refused"}:
        return {"verdict": statuses.pop(), "why": f"{ranks[0].get('error')} ({ranks[0].get('where', '')})"}
    if statuses == {"ran without a reference"}:
        return {"verdict": "no reference"}
    error = max(row["error"] for row in ranks)
    shares = [row["share"] for row in ranks]
    found = {"error": error, "shares": shares, "against": ranks[0]["against"]}
    if not error <= LOOSE:
        return {**found, "verdict": "wrong", "why": f"error {error:.1e} in {ranks[0]['worst']}"}
    if sum(shares) > REPLICATED:
        return {**found, "verdict": "replicated", "why": f"shares of the linear layers' tokens: {shares}"}
    return {**found, "verdict": "exact" if error <= EXACT else "exact <= 1e-9"}


def overall(row: dict[str, Any]) -> tuple[str, str]:
    """Returns an architecture's verdict over all modes, and why."""
    modes = row["modes"].values()
    if not modes:
        return "cannot be shrunk", row["note"]
    worst = min(modes, key=lambda mode: _ORDER.index(mode["verdict"]))
    verdict = worst["verdict"]
    if verdict == "no reference":
        return "cannot be shrunk", row["note"]
    if verdict == "refused" and row["routes"] is False:
        return "refused: no AttentionInterface", worst["why"]
    return verdict, worst["why"]


def publish_models(done: dict[str, dict[str, Any]], *, write: bool) -> None:
    """Prints counts and a line for each architecture that is not exact; keeps all of it."""
    verdicts = {name: overall(row) for name, row in done.items()}
    counts = Counter(verdict for verdict, _ in verdicts.values())
    routed = [name for name, row in done.items() if row["routes"] and verdicts[name][0] != "cannot be shrunk"]
    exact = [name for name in routed if verdicts[name][0].startswith("exact")]
    lines = [[f"**all {len(done)}**", verdict, str(count)] for verdict, count in sorted(counts.items())]
    lines.append(["**attention through AttentionInterface**", "exact", f"{len(exact)}/{len(routed)}"])
    only = [name for name in routed if not _ELSEWHERE.search(verdicts[name][1])]
    lines.append(["**the same, and tokens mixed nowhere else**", "exact", f"{len(exact)}/{len(only)}"])
    alone = [name for name in exact if done[name]["modes"]["2x1"]["kinds"]["packed"]["against"] != "batch"]
    lines.append(["**packed documents as if alone, which one process does not keep apart**", "exact", ", ".join(alone)])
    worst = [_worst_error(done[name]) for name in exact]
    if worst:
        lines.append(["**largest error of the exact ones**", f"{max(worst):.1e}", f"median {median(worst):.1e}"])
    for name, (verdict, why) in verdicts.items():
        if not verdict.startswith("exact"):
            lines.append([name, verdict, shorten(_findings(why), 260)])
    rows = [{"name": name, "verdict": verdicts[name][0], **row} for name, row in done.items()]
    publish("models", ("architecture", "verdict", "count, or why"), lines, rows, write=write)


def _worst_error(row: dict[str, Any]) -> float:
    return max(float(mode["worst_error"]) for mode in row["modes"].values())


def _findings(why: str) -> str:
    """A refusal's findings without its heading."""
    head, found, rest = why.partition("\n- ")
    return rest if found else head
