"""Parity of every causal language model of the installed transformers, sharded over real ranks, with one process.

Each architecture is shrunk (`model_zoo.py`), runs once on one process and then through a stock `Accelerator` on forked
gloo ranks, in float64: loss, every gradient, and each rank's share of the tokens that go through linear layers. What a
model computes in float32 by itself is computed in float64 in both runs, so that rounding does not hide an error.

    python -m benchmarks.models [--only llama gemma3_text] [--chunk 12] [--no-write]
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks.model_report import LOOSE, MODES, publish_models, verdict_of
from benchmarks.model_zoo import build, causal_types, tiny_config
from benchmarks.ranks import RanksFailedError, run_ranks

KINDS = ("plain", "packed", "padded", "odd")
LENGTH, ODD_LENGTH = 32, 29
DOCUMENTS = ((11, 1, 20), (5, 27))
# Waiting for a peer that failed alone is pointless, and so is the rest of its chunk.
PEER_SECONDS = 15.0
CASE_SECONDS = 25.0

Batch = dict[str, Tensor]


@dataclass
class Reference:
    """One process's result.

    Args:
        loss: of the batch.
        grads: by parameter name; parameters without a gradient are left out.
        linear_tokens: rows that went through linear layers.
    """

    loss: float
    grads: dict[str, Tensor]
    linear_tokens: int


@dataclass
class Case:
    """One architecture, ready to be sharded.

    Args:
        name: transformers' model type.
        model: tiny, in float64; ranks inherit it by fork.
        references: for each kind of batch the results that count as right; none where one process fails.
        note: why there is no model or no reference.
    """

    name: str
    model: nn.Module | None = None
    references: dict[str, dict[str, Reference]] = field(default_factory=dict)
    note: str = ""


class InDouble(TorchFunctionMode):
    """Computes in float64 what a model asks to be computed in float32."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls the function with float64 in place of float32."""
        function: Any = Tensor.double if func is Tensor.float else func
        wide = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return function(*(torch.float64 if value is torch.float32 else value for value in args), **wide)


def cross_entropy(
    logits: Tensor, labels: Tensor | None, vocab_size: int, shift_labels: Tensor | None = None, **_: Any
) -> Tensor:
    """transformers' causal loss, without its cast to float32."""
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
    return F.cross_entropy(logits.reshape(-1, vocab_size), shift_labels.reshape(-1))


def batch(kind: str) -> Batch:
    """A batch of two rows; the first label of every document does not count, since its token has no predecessor."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(8, 60, (2, ODD_LENGTH if kind == "odd" else LENGTH), generator=generator)
    made = {"input_ids": tokens, "labels": tokens.clone()}
    if kind == "packed":
        made["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS])
        made["labels"] = tokens.masked_fill(made["position_ids"] == 0, -100)
    if kind == "padded":
        made["attention_mask"] = torch.ones_like(tokens)
        made["attention_mask"][1, 20:] = 0
        made["labels"] = tokens.masked_fill(made["attention_mask"] == 0, -100)
    return made


def one_process(model: nn.Module, kind: str) -> dict[str, Reference]:
    """Returns the batch's right results: of the batch as it is, and of packed documents one at a time."""
    references = {"batch": reference(model, [batch(kind)])}
    if kind == "packed":
        tokens = batch(kind)["input_ids"]
        documents = [part for row, sizes in zip(tokens, DOCUMENTS, strict=True) for part in row.split(list(sizes))]
        alone = [{"input_ids": part[None], "labels": part[None].clone()} for part in documents if len(part) > 1]
        references["documents alone"] = reference(model, alone)
    return references


def reference(model: nn.Module, batches: Sequence[Batch]) -> Reference:
    """Runs batches, whose losses are weighted by their tokens, and returns loss and gradients."""
    model.zero_grad()
    counts = [int((part["labels"][:, 1:] != -100).sum()) for part in batches]
    total = torch.zeros(())
    with linear_tokens(model) as counted, InDouble():
        for part, count in zip(batches, counts, strict=True):
            total = total + model(**part, use_cache=False).loss * count / sum(counts)
        total.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if not total.isfinite():
        raise ValueError(f"one process computes a loss of {float(total.detach())}")
    return Reference(float(total.detach()), grads, counted[0])


@contextmanager
def linear_tokens(model: nn.Module) -> Any:
    """Counts the rows that go through linear layers."""
    from transformers.pytorch_utils import Conv1D

    counted = [0]

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        counted[0] += args[0].numel() // args[0].shape[-1]

    handles = [m.register_forward_pre_hook(count) for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))]
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()


def prepare_case(name: str) -> Case:
    """Builds an architecture and its references; of the configurations that may do, the first that one process runs."""
    case = Case(name)
    for key_value_heads in (2, 4):
        try:
            case.model = build(tiny_config(name, key_value_heads))
            case.model.loss_function = cross_entropy  # type: ignore[assignment]
            case.references = {kind: one_process(case.model, kind) for kind in KINDS}
            case.note = ""
            return case
        except Exception as error:
            case.note = f"{type(error).__name__}: {error}"[:300]
    return case


def work(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """One rank: every case of the chunk, each result in a file, until the ranks no longer agree that they go on."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    from ulysses_accel import ParallelismConfig

    sp_size, cp_size = options["mode"]
    accelerator = Accelerator(
        cpu=True,
        parallelism_config=ParallelismConfig(sp_size=sp_size, cp_size=cp_size),
        # Experts that no token of a rank chose have no gradient there.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    folder = Path(options["folder"])
    for case in options["cases"]:
        result = run_case(accelerator, case)
        part = folder / f"{case.name}.{rank}.part"
        part.write_text(json.dumps(result))
        part.rename(folder / f"{case.name}.{rank}.json")
        if not _peers_finished(folder, case.name, world_size):
            break
    return {}


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
    try:
        model = accelerator.prepare_model(case.model)
    except Exception as error:
        return {"prepare": _raised(error)}
    results = {}
    for kind in KINDS:
        try:
            results[kind] = run_kind(accelerator, model, case, kind)
        except Exception as error:
            results[kind] = _raised(error)
            if results[kind]["status"] == "crash" and not case.references.get(kind):
                results[kind]["status"] = "ran without a reference"
    return results


def run_kind(accelerator: Any, model: nn.Module, case: Case, kind: str) -> dict[str, Any]:
    """Runs one batch on this rank, and compares it with the nearest of the right results."""
    assert case.model is not None
    loader = accelerator.prepare_data_loader(
        torch.utils.data.DataLoader([0], batch_size=1, collate_fn=lambda _: batch(kind))  # type: ignore[arg-type]
    )
    case.model.zero_grad()
    with linear_tokens(case.model) as counted, InDouble():
        for local in loader:
            loss = model(**local).loss
            accelerator.backward(loss)
    own = {name: p.grad for name, p in case.model.named_parameters() if p.grad is not None}
    compared = {
        name: {"share": counted[0] / right.linear_tokens, **compare(float(loss.detach()), own, right)}
        for name, right in case.references.get(kind, {}).items()
    }
    if not compared:
        return {"status": "ran without a reference"}
    # The batch as one process takes it comes first; some models do not look for documents in it.
    right = [name for name in compared if compared[name]["error"] <= LOOSE]
    against = right[0] if right else min(compared, key=lambda name: compared[name]["error"])
    return {"status": "ran", "against": against, **compared[against]}


def compare(loss: float, own: dict[str, Tensor], right: Reference) -> dict[str, Any]:
    """Returns the relative errors of the loss and of the worst gradient.

    A gradient that is zero but for rounding (a key's bias, say) is measured by the whole gradient's norm.
    """
    total = float(torch.stack([grad.norm() for grad in right.grads.values()]).norm())
    errors = {}
    for name, grad in right.grads.items():
        size = float(grad.norm())
        found = own.get(name, torch.zeros(()))
        errors[name] = float((found - grad).norm()) / (size if size > 1e-10 * total else total)
    errors |= {name: float(grad.norm()) / total for name, grad in own.items() if name not in right.grads}
    worst = max(errors, key=lambda name: errors[name])
    loss_error = abs(loss - right.loss) / abs(right.loss)
    return {"error": max(loss_error, errors[worst]), "loss": loss_error, "gradient": errors[worst], "worst": worst}


def _raised(error: Exception) -> dict[str, Any]:
    from ulysses_accel.errors import UlyssesAccelError

    status = "refused" if isinstance(error, UlyssesAccelError) else "crash"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if "transformers" in frame.filename or "ulysses_accel" in frame.filename]
    place = (theirs or frames)[-1]
    where = f"{Path(place.filename).name}:{place.lineno}"
    return {"status": status, "error": f"{type(error).__name__}: {error}", "where": where}


def run_mode(cases: list[Case], mode: tuple[int, int]) -> dict[str, list[dict[str, Any]]]:
    """Returns for each case what every rank reports; ranks that hang are killed, and the rest goes on without them."""
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
        results.update({case.name: [report or {} for report in reports[case.name]] for case in done})
        left = [case for case in left if case not in done]
        if left:
            stuck = left.pop(0)
            hang = {"prepare": {"status": "hang", "error": failure or "a rank failed alone"}}
            results[stuck.name] = [report or hang for report in reports[stuck.name]]
    return results


def _read_reports(folder: Path, name: str, size: int) -> list[dict[str, Any] | None]:
    files = [folder / f"{name}.{rank}.json" for rank in range(size)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


def run_chunk(names: Sequence[str], done: dict[str, dict[str, Any]]) -> None:
    """Adds to `done` what becomes of some architectures in every mode; only exact ones run on four ranks."""
    cases = [prepare_case(name) for name in names]
    for case in cases:
        name = causal_types()[case.name]
        done[case.name] = {"class": name, "note": case.note, "routes": routes_attention(case.model), "modes": {}}
    for mode in MODES:
        able = [case for case in cases if case.model is not None]
        if mode == (2, 2):
            able = [case for case in able if _exact_so_far(done[case.name]["modes"])]
        for name, reports in run_mode(able, mode).items():
            done[name]["modes"][f"{mode[0]}x{mode[1]}"] = verdict_of(reports)
    for name in names:
        print(name, {mode: row["verdict"] for mode, row in done[name]["modes"].items()}, done[name]["note"], flush=True)


def routes_attention(model: nn.Module | None) -> bool:
    """Whether a model calls its attention through transformers' registry of attention functions."""
    if model is None or not model._can_set_attn_implementation():  # type: ignore[operator]
        return False
    files = {type(module).__module__ for module in model.modules()}
    own = [sys.modules[name] for name in files if name.startswith("transformers.models")]
    return any("ALL_ATTENTION_FUNCTIONS" in inspect.getsource(file) for file in own)


def _exact_so_far(modes: dict[str, Any]) -> bool:
    return all(row["verdict"].startswith("exact") for row in modes.values())


def main() -> None:
    """Walks all architectures and publishes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="model types, all by default")
    parser.add_argument("--chunk", type=int, default=12, help="architectures in one fork")
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    import transformers

    transformers.logging.set_verbosity_error()
    names = options.only or list(causal_types())
    done: dict[str, dict[str, Any]] = {}
    for start in range(0, len(names), options.chunk):
        run_chunk(names[start : start + options.chunk], done)
        gc.collect()
    publish_models(done, write=not options.no_write and not options.only)


if __name__ == "__main__":
    main()
