"""Two checkouts of this project side by side: the time of `prepare`, of a training step and of the
loader.

    git worktree add ../before de11047
    python -m benchmarks.revisions ../before

Both run in forked ranks of one process tree, in turn, so that what else the machine does falls on
both alike. Times are of rank 0, in milliseconds; the ratio is this checkout's to the other's, round
by round.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader, Dataset

from benchmarks import report
from benchmarks.ranks import run_ranks

HERE = Path(__file__).resolve().parent.parent
MEASURES = ("first prepare", "prepare", "step", "epoch of the loader")
HEADINGS = ("", "other (ms)", "here (ms)", "ratio, median", "quartiles")
TOKENS, BATCHES, PREPARES, STEPS, WARM_UP = 512, 64, 8, 24, 4


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Random tokens with labels; sample i is the same in every process."""

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 512, (TOKENS,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids.clone()}


def tiny_llama() -> Any:
    """Returns the model whose preparation and steps are timed."""
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return transformers.LlamaForCausalLM(config)


def measure(_rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """Runs everything with the package of one checkout.

    Args:
        _rank: of this process.
        world_size: ranks that share each sequence.
        options: `checkout`, the folder that the package is imported from.

    Returns:
        Seconds by the names in `MEASURES`.
    """
    sys.path.insert(0, options["checkout"])
    import ulysses_accel

    loaded = Path(ulysses_accel.__file__).resolve()
    assert loaded.is_relative_to(Path(options["checkout"]).resolve()), loaded
    torch.manual_seed(0)
    prepares = [_prepare(ulysses_accel, world_size)[0] for _ in range(PREPARES)]
    gc.collect()
    _, accelerator, model = _prepare(ulysses_accel, world_size)
    loader = accelerator.prepare(DataLoader(Tokens(), batch_size=1, shuffle=True))
    return {
        "first prepare": prepares[0],
        "prepare": statistics.median(prepares[1:]),
        "step": _steps(accelerator, model, loader),
        "epoch of the loader": _timed(lambda: sum(1 for _ in loader)),
    }


def _prepare(package: Any, world_size: int) -> tuple[float, Any, Any]:
    AcceleratorState._reset_state(True)
    config = package.ParallelismConfig(sp_size=world_size)
    accelerator = Accelerator(cpu=True, parallelism_config=config)
    model = tiny_llama()
    prepared: list[Any] = []
    seconds = _timed(lambda: prepared.append(accelerator.prepare(model)))
    return seconds, accelerator, prepared[0]


def _steps(accelerator: Any, model: Any, loader: Any) -> float:
    """Returns the median time of a forward, backward and optimizer step."""
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=1e-3))
    seconds: list[float] = []
    for index, batch in enumerate(loader):
        if index == WARM_UP + STEPS:
            break

        def step(batch: Any = batch) -> None:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()

        seconds.append(_timed(step))
    return statistics.median(seconds[WARM_UP:])


def _timed(function: Callable[[], object]) -> float:
    """Returns the seconds of a call that all ranks begin together."""
    dist.barrier()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(other: str, rounds: int, world_size: int) -> list[dict[str, Any]]:
    """Returns for each measure the times of both checkouts in every round.

    Args:
        other: folder of the other checkout.
        rounds: how often each is run; which goes first alternates.
        world_size: ranks that share each sequence.
    """
    times: dict[str, list[dict[str, float]]] = {"other": [], "here": []}
    folders = {"other": str(Path(other).resolve()), "here": str(HERE)}
    for index in range(rounds):
        order = ("other", "here") if index % 2 == 0 else ("here", "other")
        for side in order:
            results = run_ranks(measure, world_size, {"checkout": folders[side]}, timeout=300.0)
            times[side].append(results[0])
    rows = []
    for name in MEASURES:
        pair = {side: [result[name] for result in results] for side, results in times.items()}
        rows.append({"measure": name, **pair})
    return rows


def line_of(row: dict[str, Any]) -> list[str]:
    """Returns a row of the table."""
    ratios = [here / other for here, other in zip(row["here"], row["other"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return [
        row["measure"],
        f"{statistics.median(row['other']) * 1e3:.1f}",
        f"{statistics.median(row['here']) * 1e3:.1f}",
        f"{middle:.2f}",
        f"{low:.2f} to {high:.2f}",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table, and writes the raw times where a file is named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.revisions", description=__doc__)
    parser.add_argument("other", help="folder of the checkout to compare with")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file for the raw times")
    options = parser.parse_args(arguments)
    rows = compare(options.other, options.rounds, options.ranks)
    print(report.table(HEADINGS, [line_of(row) for row in rows]))
    if options.output is not None:
        options.output.write_text(
            json.dumps({"versions": report.versions(), "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
