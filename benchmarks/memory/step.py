"""A whole forward and backward of a small Llama with its loss: what holds less is switched on one
feature at a time.

The ablation of the Arctic Long Sequence Training paper: its baseline checkpoints layers too. Every
burst is a fresh fork; bursts alternate, and ratios are taken within a round.
"""

from __future__ import annotations

import importlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks import contenders
from benchmarks.memory.measure import Descend, ratio
from benchmarks.memory.models import has_deepspeed, install, llama_config, on_host
from benchmarks.ranks import RanksFailedError, run_ranks
from benchmarks.report import shorten
from ulysses_accel.memory import track_allocations

HIDDEN, LAYERS, HEADS, KEY_HEADS, VOCABULARY = 128, 4, 4, 2, 4096
TIMEOUT = 240.0
DEEPSPEED_LOSS = "DeepSpeed TiledFusedLogitsLoss"


@dataclass(frozen=True)
class Contender:
    """What takes part.

    Args:
        features: names in `models.FEATURES`, in the order of installation; or `DEEPSPEED_LOSS`.
        ranks: processes that share the sequence.
    """

    features: tuple[str, ...]
    ranks: int = 1


CONTENDERS = {
    "transformers, checkpoint": Contender(("checkpoint",)),
    "transformers, offload": Contender(("offload",)),
    "transformers, offload + DeepSpeed TiledMLP, TiledFusedLogitsLoss": Contender(
        ("offload", "DeepSpeed TiledMLP", DEEPSPEED_LOSS)
    ),
    "baseline + our tiled loss": Contender(("checkpoint", "our loss")),
    "+ Ulysses": Contender(("checkpoint", "our loss"), 2),
    "+ Ulysses + our TiledMLP": Contender(("checkpoint", "our loss", "our TiledMLP"), 2),
    "+ Ulysses + our offload, no TiledMLP": Contender(("our offload", "our loss"), 2),
    "+ Ulysses + our TiledMLP, offload": Contender(("our offload", "our loss", "our TiledMLP"), 2),
    "all: + norms": Contender(("our offload", "our loss", "our TiledMLP", "our norms"), 2),
    "all, one rank": Contender(("our offload", "our loss", "our TiledMLP", "our norms")),
}
BASELINE = next(iter(CONTENDERS))


def available() -> dict[str, Contender]:
    """Those whose packages are installed."""
    return {
        name: contender
        for name, contender in CONTENDERS.items()
        if has_deepspeed() or not any("DeepSpeed" in feature for feature in contender.features)
    }


def preload() -> None:
    """Imports what the ranks need before they are forked."""
    contenders.preload()
    for module in (
        "accelerate",
        "transformers.models.llama.modeling_llama",
        "ulysses_accel.integrations.attach",
    ):
        importlib.import_module(module)
    if has_deepspeed():
        importlib.import_module("deepspeed.runtime.sequence_parallel.ulysses_sp")


def build_model(tokens: int) -> Any:
    """The Llama, with the same weights everywhere."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = llama_config(HIDDEN, LAYERS, HEADS, KEY_HEADS, VOCABULARY, tokens)
    return LlamaForCausalLM(config).train()


def _ids(tokens: int) -> Tensor:
    return torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(1))


def _deepspeed_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The decoder, then DeepSpeed's loss, with the mean of equal tiles."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    def of_tile(head: nn.Linear, rows: Tensor, goals: Tensor) -> Tensor:
        return F.cross_entropy(head(rows).float(), goals, reduction="sum")

    labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    hidden = model.model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"]
    ).last_hidden_state
    shards = math.ceil(labels.numel() * VOCABULARY / (labels.numel() * HIDDEN))
    arguments = (
        of_tile,
        model.lm_head,
        hidden,
        labels,
        None,
        shards,
        [model.lm_head.weight],
        "sum",
    )
    loss: Tensor = TiledFusedLogitsLoss.apply(*arguments)
    return loss / (labels.numel() - 1)


def _trainer(contender: Contender, tokens: int) -> tuple[Callable[[], float], Any, Any]:
    """Returns a forward and backward that gives the loss, the model, and what was installed
    in it.
    """
    plain = build_model(tokens).bfloat16()
    features = tuple(name for name in contender.features if name != DEEPSPEED_LOSS)
    installed = install(plain, features)
    ids = _ids(tokens)
    item = {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(tokens)}
    model, backward = plain, torch.autograd.backward
    batch = {name: value[None] for name, value in item.items()}
    if contender.ranks > 1:
        model, batch, backward = _shared(plain, item, contender.ranks)

    def step() -> float:
        plain.zero_grad()
        loss = (
            _deepspeed_loss(model, batch)
            if DEEPSPEED_LOSS in contender.features
            else model(**batch).loss
        )
        backward(loss)
        return float(loss.detach())

    return step, plain, installed


def _shared(
    plain: nn.Module, item: dict[str, Tensor], ranks: int
) -> tuple[Any, dict[str, Tensor], Any]:
    """Through a stock Accelerator with our ParallelismConfig."""
    from accelerate import Accelerator

    from ulysses_accel import ParallelismConfig

    accelerator = Accelerator(cpu=True, parallelism_config=ParallelismConfig(sp_size=ranks))
    loader = DataLoader([item], batch_size=1)  # type: ignore[arg-type, var-annotated]
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.0)
    model, _, loader = accelerator.prepare(plain, optimizer, loader)
    model.train()
    return model, next(iter(loader)), accelerator.backward


def burst(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """One fresh process: a first step, then counted or timed ones."""
    contender, tokens = CONTENDERS[options["name"]], options["tokens"]
    step, model, installed = _trainer(contender, tokens)
    result: dict[str, Any] = {"loss": step()}
    norms = [p.grad.double().norm() for p in model.parameters() if p.grad is not None]
    result["gradient_norm"] = float(torch.stack(norms).norm())
    if options["count"]:
        unit = tokens // world_size * HIDDEN * 2
        model.zero_grad()
        with track_allocations(unit_bytes=unit) as tracker, Descend(), on_host(installed, tracker):
            step()
        result |= {
            "peak_bytes": tracker.peak_bytes,
            "forward_peak_u": tracker.peak_by_phase["forward"] / unit,
            "backward_peak_u": tracker.peak_by_phase["backward"] / unit,
            "saved_u": tracker.peak_saved_bytes / unit,
            "copied_u": tracker.copied_bytes / unit,
            "matmul_flops": tracker.matmul_flops,
            "attention_forward_calls": tracker.attention_forward_calls,
            "attention_backward_calls": tracker.attention_backward_calls,
        }
    seconds = []
    for _ in range(options["steps"]):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    return result | {"seconds": min(seconds)}


def reference(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """The loss and the gradient's norm in float64, of the weights that everybody has in
    bfloat16.
    """
    model = build_model(options["tokens"]).bfloat16().double()
    ids = _ids(options["tokens"])[None]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return {"loss": float(loss.detach()), "gradient_norm": float(torch.stack(norms).norm())}


def step_rows(tokens: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """One row for each contender."""
    expected = run_ranks(reference, 1, {"tokens": tokens}, timeout=TIMEOUT)[0]
    rows: dict[str, dict[str, Any]] = {
        name: {"implementation": name, "ranks": contender.ranks}
        for name, contender in available().items()
    }
    clocks: list[dict[str, float]] = []
    for turn in range(rounds):
        clocks.append({})
        for name, row in rows.items():
            if "refused" in row:
                continue
            options = {"name": name, "tokens": tokens, "steps": steps, "count": turn == 0}
            try:
                ranks = run_ranks(burst, row["ranks"], options, timeout=TIMEOUT)
            except RanksFailedError as error:
                row["refused"] = shorten(str(error).strip().splitlines()[-1])
                continue
            clocks[-1][name] = sum(result["seconds"] for result in ranks)
            if turn == 0:
                _describe(row, ranks, expected)
    for name, row in rows.items():
        if "refused" not in row:
            row["time_ratio"] = ratio(clocks, name, BASELINE)
    return list(rows.values())


def _describe(row: dict[str, Any], ranks: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Counts of the rank that needs most; ranks return the same loss."""
    row |= max(ranks, key=lambda result: result["peak_bytes"])
    row["matmul_flops"] = sum(result["matmul_flops"] for result in ranks)
    for name in ("loss", "gradient_norm"):
        row[f"{name}_error"] = abs(row[name] / expected[name] - 1)
