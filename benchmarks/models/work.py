"""One rank of the walk: every architecture of a chunk through a stock `Accelerator`, compared with
one process.
"""

from __future__ import annotations

import json
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.models.batches import Batch, Form, make_batch
from benchmarks.models.heads import Architecture
from benchmarks.models.reference import (
    InDouble,
    Reference,
    State,
    compare,
    counted_rows,
    share_of_work,
)
from benchmarks.models.report import LOOSE
from benchmarks.models.structure import Structure

# Waiting for a peer that failed alone is pointless, and so is the rest of its chunk.
PEER_SECONDS = 60.0


@dataclass
class Case:
    """One architecture, ready to be sharded.

    Args:
        architecture: which one.
        model: tiny, in float64; ranks inherit it by fork.
        form: of batches that it takes.
        features: its encoder's input, where that is no tokens.
        references: for each kind of batch the results that count as right; empty where one process
            fails.
        structure: where it mixes tokens.
        note: why there is no model or no reference.
    """

    architecture: Architecture
    model: nn.Module | None = None
    form: Form = "causal"
    features: Batch = field(default_factory=dict)
    references: dict[str, dict[str, Reference]] = field(default_factory=dict)
    structure: Structure | None = None
    note: str = ""

    @property
    def name(self) -> str:
        """The row's name."""
        return self.architecture.name


def work(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """One rank: every case of the chunk, each result in a file, until the ranks no longer agree
    that they go on.
    """
    folder = Path(options["folder"])
    for case in options["cases"]:
        result = run_case(make_accelerator(*options["mode"]), case)
        part = folder / f"{case.name}.{rank}.part"
        part.write_text(json.dumps(result))
        part.rename(folder / f"{case.name}.{rank}.json")
        if not _peers_finished(folder, case.name, world_size):
            break
    return {}


def make_accelerator(sp_size: int, cp_size: int) -> Any:
    """Returns a stock accelerator with our config: a new one for each case, as models differ in
    what they ask for.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs

    from ulysses_accel import ParallelismConfig

    AcceleratorState._reset_state(True)
    return Accelerator(
        cpu=True,
        parallelism_config=ParallelismConfig(sp_size=sp_size, cp_size=cp_size),
        # Experts that no token of a rank chose have no gradient there.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def _peers_finished(folder: Path, name: str, world_size: int) -> bool:
    deadline = time.monotonic() + PEER_SECONDS
    while time.monotonic() < deadline:
        if all((folder / f"{name}.{rank}.json").exists() for rank in range(world_size)):
            return True
        time.sleep(0.003)
    return False


def run_case(accelerator: Any, case: Case) -> dict[str, Any]:
    """Returns for each kind of batch the errors, or what was raised instead."""
    assert case.model is not None
    state = State(case.model)
    try:
        model = accelerator.prepare_model(case.model)
    except Exception as error:
        return {"prepare": _raised(error)}
    results = {}
    for kind in case.references:
        state.restore()
        try:
            results[kind] = run_kind(accelerator, model, case, kind)
        except Exception as error:
            results[kind] = _raised(error)
    return results


def run_kind(accelerator: Any, model: nn.Module, case: Case, kind: str) -> dict[str, Any]:
    """Runs one batch on this rank, and compares it with the nearest of the right results."""
    assert case.model is not None
    batch = make_batch(case.form, kind, case.model, case.features)
    # Together: a loader makes its batches for the models that it is prepared with.
    _, loader = accelerator.prepare(
        model,
        torch.utils.data.DataLoader([0], batch_size=1, collate_fn=lambda _: batch),  # type: ignore[arg-type]
    )
    case.model.zero_grad()
    with counted_rows(case.model) as rows, InDouble():
        for local in loader:
            loss = model(**local).loss
            accelerator.backward(loss)
    own = {name: p.grad for name, p in case.model.named_parameters() if p.grad is not None}
    compared = {
        name: {
            "share": share_of_work(rows, right, case.form),
            **compare(float(loss.detach()), own, right),
        }
        for name, right in case.references[kind].items()
    }
    # The batch as one process takes it comes first; some models do not look for documents in it.
    right = [name for name in compared if compared[name]["error"] <= LOOSE]
    against = right[0] if right else min(compared, key=lambda name: compared[name]["error"])
    return {"status": "ran", "against": against, **compared[against]}


def _raised(error: Exception) -> dict[str, Any]:
    from ulysses_accel.errors import UlyssesAccelError

    status = "refused" if isinstance(error, UlyssesAccelError) else "crash"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [
        frame
        for frame in frames
        if "transformers" in frame.filename or "ulysses_accel" in frame.filename
    ]
    place = (theirs or frames)[-1]
    where = f"{Path(place.filename).name}:{place.lineno}"
    return {"status": status, "error": f"{type(error).__name__}: {error}", "where": where}
