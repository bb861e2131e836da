"""The cases of `benchmarks.gpu`, and the process that runs one of them.

python -m benchmarks.gpu.cases NAME row.json [--dry]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.large import large_attention, large_loss, large_mlp
from benchmarks.gpu.models import FEATURE_SETS, PEERS, Training
from benchmarks.gpu.scale import Scale, measured
from benchmarks.gpu.shared_ranks import shared_ranks

Row = dict[str, Any]
Save = Callable[[Row], None]


@dataclass(frozen=True)
class Case:
    """A case.

    Args:
        run: takes the scale and what keeps a result so far, returns the row.
        limit: seconds that it may take once the process has started.
    """

    run: Callable[[Scale, Save], Row]
    limit: float


def ablation(features: tuple[str, ...], scale: Scale, save: Save) -> Row:
    """One step of four layers and the loss at 131,072 tokens: the second, because the first one
    allocates.
    """
    tokens = 128 * scale.unit
    training = Training(scale, layers=4, tokens=tokens, features=features)
    training.step(tokens)
    with measured(scale) as row:
        loss, norm = training.step(tokens)
    finding = f"loss {loss:.5f}, gradient norm {norm:.5f}"
    return row | {
        "tokens": tokens,
        "host_bytes": training.host_bytes,
        "finding": finding,
        "loss": loss,
        "norm": norm,
    }


def longest(features: tuple[str, ...], scale: Scale, save: Save) -> Row:
    """The longest sequence of two layers and the loss: doubled until it fails or time is up, then
    halved in between.
    """
    deadline = time.monotonic() + scale.limit
    most, shortest = 1024 * scale.unit, 32 * scale.unit
    fits: Row = {"tokens": 0, "finding": "nothing fits"}
    good, bad, seconds = 0, most + 1, 0.0
    while good < most and bad - good > shortest:
        trial = min(most, max(shortest, 2 * good) if bad > most else (good + bad) // 2)
        # A step's time grows with the square; the next trial must be over in time.
        if good and seconds * (trial / good) ** 2 * 1.2 > deadline - time.monotonic():
            fits["finding"] += f"; {trial:,} tokens not tried for lack of time"
            break
        row = _try_length(features, scale, trial)
        if "refused" in row:
            bad = trial
            fits["failure"] = f"{trial:,} tokens: {row['refused']}"
            continue
        good, seconds = trial, row["seconds"]
        fits = {**row, "tokens": trial, "finding": f"{seconds / 2:.2f} s for a layer"}
        save(fits)
    return fits


def _try_length(features: tuple[str, ...], scale: Scale, tokens: int) -> Row:
    training = None
    try:
        training = Training(scale, layers=2, tokens=tokens, features=features)
        with measured(scale) as row:
            loss, _ = training.step(tokens)
        return {**row, "loss": loss, "host_bytes": training.host_bytes}
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error).strip().splitlines()[0][:160]
    finally:
        if training is not None:
            training.close()
        # What failed is freed below.
        training = None
    # Outside of the handler, which holds the frames of what failed.
    if scale.device.type == "cuda":
        torch.cuda.empty_cache()
    return {"refused": text}


def layer_time(scale: Scale, save: Save) -> Row:
    """Time of a layer at 262,144 tokens: four layers against two, so that the loss is not in it."""
    tokens = 256 * scale.unit
    seconds = {}
    for layers in (2, 4):
        training = Training(scale, layers=layers, tokens=tokens, features=FEATURE_SETS["ours all"])
        training.step(tokens)
        with measured(scale) as row:
            training.step(tokens)
        seconds[layers] = row["seconds"]
        del training
    a_layer = (seconds[4] - seconds[2]) / 2
    return row | {
        "tokens": tokens,
        "layer_seconds": a_layer,
        "finding": f"{a_layer:.3f} s for a layer",
    }


def offload_overlap(scale: Scale, save: Save) -> Row:
    """A step with offload over one without, at 32,768 tokens and eight layers, alternating."""
    tokens = 32 * scale.unit
    contenders = {
        name: Training(scale, layers=8, tokens=tokens, features=FEATURE_SETS[name], head=False)
        for name in ("ours device", "ours all", "transformers device", "transformers offload")
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(6):
        for name, training in contenders.items():
            with measured(scale) as row:
                training.step(tokens)
            # The first one allocates.
            if turn:
                seconds[name].append(row["seconds"])
    best = {name: min(taken) for name, taken in seconds.items()}
    pairs = (
        ("ours", "ours all", "ours device"),
        ("transformers", "transformers offload", "transformers device"),
    )
    shares = {name: best[offload] / best[device] - 1 for name, offload, device in pairs}
    finding = "offload adds " + ", ".join(f"{share:.2%} ({name})" for name, share in shares.items())
    return {
        "tokens": tokens,
        "seconds": best["ours all"],
        "best": best,
        "added": shares,
        "finding": finding,
    }


def _plain(function: Callable[[Scale], Row]) -> Callable[[Scale, Save], Row]:
    return lambda scale, save: function(scale)


CASES: dict[str, Case] = {
    "large-mlp": Case(_plain(large_mlp), 120),
    "large-loss": Case(_plain(large_loss), 120),
    "large-attention": Case(_plain(large_attention), 240),
    **{
        f"ablation: {name}": Case(partial(ablation, features), 150)
        for name, features in FEATURE_SETS.items()
    },
    "longest: ours all": Case(partial(longest, FEATURE_SETS["ours all"]), 480),
    **{f"longest: {name}": Case(partial(longest, FEATURE_SETS[name]), 300) for name in PEERS},
    "layer-time": Case(layer_time, 240),
    "offload-overlap": Case(offload_overlap, 240),
    "shared-ranks": Case(_plain(shared_ranks), 120),
}


def main() -> None:
    """Runs one case and writes its row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=CASES)
    parser.add_argument("row", type=Path)
    parser.add_argument("--limit", type=float, default=600.0)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()

    def save(row: Row) -> None:
        options.row.write_text(json.dumps(row))

    if options.dry:
        torch.set_num_threads(1)
    scale = Scale.of(options.dry, options.limit)
    save(CASES[options.name].run(scale, save))


if __name__ == "__main__":
    main()
