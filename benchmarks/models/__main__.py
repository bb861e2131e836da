"""Parity of every architecture of the installed transformers with a language model's loss, sharded
over real ranks.

Each architecture (`heads.py`) is shrunk (`zoo.py`), runs once on one process (`reference.py`), and
then through a stock `Accelerator` on forked gloo ranks (`work.py`), in float64: loss, every
gradient, and each rank's share of the rows that go through linear layers. What a model computes in
float32 by itself is computed in float64 in both runs, so that rounding does not hide an error. The
table goes to `docs/models.md`.

    python -m benchmarks.models [--only llama masked.bert] [--heads masked] [--no-write]
    python -m benchmarks.models --part 1/4 --out FOLDER      (a quarter of the walk)
    python -m benchmarks.models --merge --out FOLDER         (then, with all four)
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.models.batches import (
    Batch,
    documents_alone,
    feature_candidates,
    form_of,
    kinds_of,
    make_batch,
)
from benchmarks.models.heads import HEADS, Architecture, choose
from benchmarks.models.reference import Reference, State, reference
from benchmarks.models.report import MODES, publish_models, verdict_of
from benchmarks.models.structure import structure_of
from benchmarks.models.work import Case, work
from benchmarks.models.zoo import build, tiny_config
from benchmarks.ranks import RanksFailedError, run_ranks

CASE_SECONDS = 60.0
Rows = dict[str, dict[str, Any]]


def prepare_case(architecture: Architecture) -> Case:
    """Builds an architecture and its references; of the configurations that may do, the first that
    one process runs.
    """
    case = Case(architecture)
    for key_value_heads in (2, 4):
        case.references = {}
        try:
            model = case.model = build(architecture, tiny_config(architecture, key_value_heads))
            case.form = form_of(architecture, model)
            case.features = find_features(model) if case.form == "features" else {}
            case.references = {kind: one_process(case, kind) for kind in kinds_of(case.form, model)}
            case.structure = structure_of(model, case.form, case.features)
            case.note = ""
            return case
        except Exception as error:
            case.note = f"{type(error).__name__}: {error}"[:300]
    return case


def find_features(model: nn.Module) -> Batch:
    """Returns the first input that a model's encoder takes, where it takes no tokens.

    Raises:
        ValueError: it takes none of those that were tried; the message is the last one's.
    """
    told = "no candidates"
    for features in feature_candidates(model):
        try:
            reference(model, "features", [make_batch("features", "plain", model, features)])
            return features
        except Exception as error:
            told = f"{tuple(next(iter(features.values())).shape)}: {error}"
    raise ValueError(f"no input of the encoder was found; {told}")


def one_process(case: Case, kind: str) -> dict[str, Reference]:
    """Returns a batch's right results: of the batch as it is, and of packed documents one at a
    time.
    """
    assert case.model is not None
    batch = make_batch(case.form, kind, case.model, case.features)
    state = State(case.model)
    references = {"batch": reference(case.model, case.form, [batch])}
    state.restore()
    if kind == "packed":
        references["documents alone"] = reference(
            case.model, case.form, documents_alone(case.form, batch)
        )
        state.restore()
    return references


def run_mode(cases: list[Case], mode: tuple[int, int]) -> dict[str, list[dict[str, Any]]]:
    """Returns for each case what every rank reports; ranks that hang are killed, and the rest goes
    on without them.
    """
    results: dict[str, list[dict[str, Any]]] = {}
    left = list(cases)
    size = mode[0] * mode[1]
    while left:
        with tempfile.TemporaryDirectory() as folder:
            options = {"mode": mode, "cases": left, "folder": folder}
            failure = ""
            try:
                run_ranks(work, size, options, timeout=20 + CASE_SECONDS * len(left) / 4)
            except RanksFailedError as error:
                failure = str(error)[-400:]
            reports = {case.name: _read_reports(Path(folder), case.name, size) for case in left}
        done = [case for case in left if all(reports[case.name])]
        results.update(
            {case.name: [report or {} for report in reports[case.name]] for case in done}
        )
        left = [case for case in left if case not in done]
        if left:
            stuck = left.pop(0)
            hang = {"prepare": {"status": "hang", "error": failure or "a rank failed alone"}}
            results[stuck.name] = [report or hang for report in reports[stuck.name]]
    return results


def _read_reports(folder: Path, name: str, size: int) -> list[dict[str, Any] | None]:
    files = [folder / f"{name}.{rank}.json" for rank in range(size)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


def run_chunk(architectures: Sequence[Architecture]) -> Rows:
    """Returns what becomes of some architectures in every mode; only exact ones run on four
    ranks.
    """
    cases = [prepare_case(architecture) for architecture in architectures]
    rows = {case.name: _row(case) for case in cases}
    for mode in MODES:
        able = [case for case in cases if case.references]
        if mode == (2, 2):
            able = [case for case in able if _exact_so_far(rows[case.name]["modes"])]
        for name, reports in run_mode(able, mode).items():
            rows[name]["modes"][f"{mode[0]}x{mode[1]}"] = verdict_of(reports)
    for name, row in rows.items():
        print(
            name,
            {mode: found["verdict"] for mode, found in row["modes"].items()},
            row["note"],
            flush=True,
        )
    return rows


def _row(case: Case) -> dict[str, Any]:
    one, structure = case.architecture, case.structure
    return {
        "head": one.head,
        "type": one.model_type,
        "variant": one.variant,
        "class": one.class_name,
        "note": case.note,
        "form": case.form,
        "routes": structure.routes if structure else None,
        "mixes_in": list(structure.mixes_in) if structure else [],
        "modes": {},
    }


def _exact_so_far(modes: dict[str, Any]) -> bool:
    return all(row["verdict"].startswith("exact") for row in modes.values())


def walk(architectures: Sequence[Architecture], chunk: int) -> Rows:
    """Returns the rows of all architectures, `chunk` of them in one fork."""
    rows: Rows = {}
    for start in range(0, len(architectures), chunk):
        rows.update(run_chunk(architectures[start : start + chunk]))
        gc.collect()
    return rows


def merge(folder: Path) -> Rows:
    """Returns the rows of all parts in a folder, in the walk's order.

    Raises:
        ValueError: a part is missing.
    """
    parts = [json.loads(file.read_text()) for file in sorted(folder.glob("models-cpu.part-*.json"))]
    count = parts[0]["parts"] if parts else 0
    missing = set(range(1, count + 1)) - {part["part"] for part in parts}
    if not parts or missing:
        raise ValueError(
            f"{folder} holds {len(parts)} of {count} parts; run --part for {sorted(missing)} first."
        )
    found = {name: row for part in parts for name, row in part["rows"].items()}
    return {one.name: found[one.name] for one in choose(None, None) if one.name in found}


def main() -> None:
    """Walks all architectures, or a part of them, and publishes the table."""
    options = _options()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    import transformers

    transformers.logging.set_verbosity_error()
    if options.merge:
        publish_models(merge(options.out), write=not options.no_write)
        return
    chosen = choose(options.only, options.heads)
    part, parts = (int(number) for number in options.part.split("/"))
    began = time.monotonic()
    rows = walk(chosen[part - 1 :: parts], options.chunk)
    print(f"{len(rows)} rows in {time.monotonic() - began:.0f} s")
    if parts > 1:
        options.out.mkdir(parents=True, exist_ok=True)
        kept = {"part": part, "parts": parts, "rows": rows}
        (options.out / f"models-cpu.part-{part}.json").write_text(json.dumps(kept))
        return
    publish_models(rows, write=not (options.no_write or options.only or options.heads))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", help="rows' names or model types, all by default")
    parser.add_argument("--heads", nargs="*", choices=[*HEADS, "rope"], help="all by default")
    parser.add_argument("--chunk", type=int, default=12, help="architectures in one fork")
    parser.add_argument(
        "--part", default="1/1", help="i/n: every n-th architecture, from the i-th on"
    )
    parser.add_argument("--out", type=Path, help="folder of the parts, for --part and --merge")
    parser.add_argument(
        "--merge", action="store_true", help="publish the parts in --out instead of walking"
    )
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    if options.out is None and (options.merge or options.part != "1/1"):
        parser.error("--part and --merge need --out, the folder of the parts.")
    return options


if __name__ == "__main__":
    main()
