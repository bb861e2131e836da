"""A whole training step of a small Llama: ours through a stock Accelerator, beside DeepSpeed's
sequence parallelism.

    python -m benchmarks.step

Stock accelerate with DeepSpeed comes up with one process on CPU ranks, so the peer is driven as
accelerate drives it on GPUs: `UlyssesSPAttentionHF.register_with_transformers`,
`deepspeed.initialize(mpu=...)`, `UlyssesSPDataLoaderAdapter`, and the documented all_gather loss.
Both patch or hold process-wide state, so every burst of steps is a fresh fork; bursts alternate,
and ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from benchmarks import contenders, report
from benchmarks.counters import OperationCounter
from benchmarks.ranks import RanksFailedError, run_ranks

Batch = dict[str, torch.Tensor]

TOKENS, VOCABULARY = 2048, 512
WARMUP_STEPS = 1
TOLERANCE = 1e-4
RATIOS = ("seconds_ratio_1", "seconds_ratio_2", "cpu_seconds_ratio_1")
BASE = "DeepSpeed SP, ZeRO-{stage}"


@dataclass
class Trainer:
    """One contender in one process: takes a step and returns its loss, and tells the norm of the
    last gradient.
    """

    step: Callable[[], float]
    gradient_norm: Callable[[], float]


Build = Callable[[int, int, int], Trainer]


class Tokens(Dataset[Batch]):
    """Random documents of equal length; item `i` is the same on every rank."""

    def __init__(self, count: int, length: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(VOCABULARY, (count, length), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Batch:
        ids = self.ids[index]
        return {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(len(ids))}


def build_model() -> Any:
    """The Llama of the benchmark, with the same weights everywhere."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=VOCABULARY,
            max_position_embeddings=TOKENS,
            attn_implementation="sdpa",
            use_cache=False,
        )
    ).train()


def build_optimizer(model: Any) -> torch.optim.Optimizer:
    """AdamW, for everybody."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def deepspeed_config(stage: int) -> dict[str, Any]:
    """One sample per sequence group and step; buckets sized to the model instead of the 2 GB
    default.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 5_000_000,
            "allgather_bucket_size": 5_000_000,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000,
    }


def norm_of(parameters: Iterable[torch.nn.Parameter]) -> float:
    """The norm of the gradients that the parameters hold."""
    return float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


def single_process(rank: int, world_size: int, count: int) -> Trainer:
    """Plain training: the losses that everybody must reproduce."""
    model = build_model()
    optimizer = build_optimizer(model)
    batches = iter(DataLoader(Tokens(count, TOKENS), batch_size=1))

    def step() -> float:
        optimizer.zero_grad()
        loss = model(**next(batches)).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Trainer(step, lambda: norm_of(model.parameters()))


def deepspeed_peer(rank: int, world_size: int, count: int, *, stage: int) -> Trainer:
    """The documented recipe of accelerate and DeepSpeed for sequence parallelism."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import (
        UlyssesSPAttentionHF,
        UlyssesSPDataLoaderAdapter,
    )
    from deepspeed.utils import groups

    deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False)
    model = build_model()
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation="sdpa",
        sequence_parallel_size=world_size,
        micro_batch_size=1,
        seq_length_is_variable=True,
        disable_in_eval=True,
    )
    config = deepspeed_config(stage) | {"sequence_parallel_size": world_size}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=build_optimizer(model), config=config, mpu=mpu
    )
    group = groups._get_sequence_parallel_group()
    own = torch.utils.data.Subset(Tokens(count, TOKENS), range(rank, count, world_size))
    batches = UlyssesSPDataLoaderAdapter(
        DataLoader(own, batch_size=1), rank, group, world_size, "cpu"
    )

    def step() -> float:
        batch = next(batches)
        outputs = engine(**batch)
        loss = documented_loss(model, outputs.logits, batch["shift_labels"], group)
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return Trainer(step, engine.get_global_grad_norm)


def documented_loss(
    model: Any, logits: torch.Tensor, shift_labels: torch.Tensor, group: Any
) -> torch.Tensor:
    """accelerate's documented aggregation: gather the ranks' losses and token counts, weight the
    mean.
    """
    from torch.distributed.nn.functional import all_gather

    loss = model.loss_function(
        logits=logits, labels=None, shift_labels=shift_labels, vocab_size=VOCABULARY
    )
    losses = all_gather(loss, group=group)
    counts = all_gather((shift_labels != -100).view(-1).sum(), group=group)
    total = sum(loss * count for loss, count in zip(losses, counts) if count > 0)
    return total / max(sum(counts), 1)


def ours(rank: int, world_size: int, count: int, *, stage: int | None) -> Trainer:
    """A stock Accelerator with our ParallelismConfig: on DDP, or on DeepSpeed ZeRO."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    from ulysses_accel import ParallelismConfig

    settings: dict[str, Any] = {"parallelism_config": ParallelismConfig(sp_size=world_size)}
    if stage is None:
        settings["cpu"] = True
    else:
        settings["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=deepspeed_config(stage))
    accelerator = Accelerator(**settings)
    plain = build_model()
    loader = DataLoader(Tokens(count, TOKENS), batch_size=1)
    model, optimizer, loader = accelerator.prepare(plain, build_optimizer(plain), loader)
    model.train()
    batches = iter(loader)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(**next(batches)).loss
        accelerator.backward(loss)
        optimizer.step()
        return float(loss.detach())

    return Trainer(
        step, model.get_global_grad_norm if stage else lambda: norm_of(model.parameters())
    )


def available() -> dict[str, Build]:
    """What can run here, by name; the peers first."""
    found: dict[str, Build] = {
        BASE.format(stage=stage): partial(deepspeed_peer, stage=stage) for stage in (1, 2)
    }
    if contenders.installed("ulysses_accel.integrations.attach"):
        for name, stage in (("ours, DDP", None), ("ours, ZeRO-1", 1), ("ours, ZeRO-2", 2)):
            found[name] = partial(ours, stage=stage)
    return found


def burst(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """Fresh process: warm up, time some steps, then (in one round only) count one cycle of the
    peer's loader.
    """
    torch.manual_seed(0)
    build = single_process if world_size == 1 else available()[options["name"]]
    wanted = WARMUP_STEPS + options["steps"] + 2 * world_size
    trainer = build(rank, world_size, wanted - wanted % world_size)
    losses = [trainer.step()]
    result: dict[str, Any] = {"gradient_norm": float(trainer.gradient_norm())}
    losses += [trainer.step() for _ in range(WARMUP_STEPS - 1)]
    seconds, cpu_seconds = [], []
    for _ in range(options["steps"]):
        dist.barrier()
        start, cpu_start = time.perf_counter(), time.process_time()
        losses.append(trainer.step())
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    if options["count"]:
        result["counts"] = count_steps(trainer, world_size)
    return result | {"seconds": seconds, "cpu_seconds": cpu_seconds, "losses": losses}


def count_steps(trainer: Trainer, steps: int) -> dict[str, Any]:
    """Exact counts per step, averaged over as many steps as one refill of DeepSpeed's loader
    lasts.
    """
    with OperationCounter() as counter:
        for _ in range(steps):
            trainer.step()
        counts = counter.take()
    return {
        "collectives": counts.collectives / steps,
        "bytes_sent": counts.bytes_sent / steps,
        "bytes_copied": counts.bytes_copied / steps,
        "peak_bytes": counts.peak_bytes,
        "operations": counts.operations,
    }


def run_world(
    world_size: int, rounds: int, steps: int, expected: dict[str, Any]
) -> list[dict[str, Any]]:
    """All contenders at one number of ranks, alternating; counts come from the first round."""
    names = list(available())
    clocks: dict[str, dict[str, list[float]]] = {
        name: {"seconds": [], "cpu_seconds": []} for name in names
    }
    rows: dict[str, dict[str, Any]] = {
        name: {"world_size": world_size, "implementation": name} for name in names
    }
    for turn, name in itertools.product(range(rounds), names):
        if "refused" in rows[name]:
            continue
        options = {"name": name, "steps": steps, "count": turn == 0}
        try:
            ranks = run_ranks(burst, world_size, options, timeout=120)
        except RanksFailedError as error:
            rows[name]["refused"] = str(error).strip().splitlines()[-1]
            continue
        for clock, value in fastest(ranks).items():
            clocks[name][clock].append(value)
        rows[name] |= _verdict(ranks, expected)
    return [rows[name] | _timing(clocks, name) for name in names]


def _verdict(ranks: Sequence[dict[str, Any]], expected: dict[str, Any]) -> dict[str, Any]:
    """First-step loss and gradient against one process; later losses are kept in the JSON only."""
    errors = [
        max(abs(rank["losses"][i] - e) for rank in ranks) for i, e in enumerate(expected["losses"])
    ]
    verdict: dict[str, Any] = {
        "loss_errors": errors,
        "gradient_ratio": ranks[0]["gradient_norm"] / expected["gradient_norm"],
    }
    if "counts" in ranks[0]:
        keys = ("collectives", "bytes_sent", "bytes_copied", "peak_bytes")
        verdict |= {key: max(rank["counts"][key] for rank in ranks) for key in keys}
        verdict["operations"] = ranks[0]["counts"]["operations"]
    return verdict


def fastest(ranks: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The burst's fastest step, as other work on the machine only adds: wall time of its slowest
    rank, CPU of all.
    """
    return {
        "seconds": min(max(times) for times in zip(*(rank["seconds"] for rank in ranks))),
        "cpu_seconds": min(sum(times) for times in zip(*(rank["cpu_seconds"] for rank in ranks))),
    }


def _timing(clocks: dict[str, dict[str, list[float]]], name: str) -> dict[str, Any]:
    """Median over rounds of the step time, and of its ratios to the peer on ZeRO-1 and ZeRO-2
    within a round.
    """
    timing: dict[str, Any] = {"rounds": len(clocks[name]["seconds"])}
    for clock, mine in clocks[name].items():
        if mine:
            timing[clock] = statistics.median(mine)
        for stage in (1, 2):
            ratios = [
                m / theirs for m, theirs in zip(mine, clocks[BASE.format(stage=stage)][clock])
            ]
            if ratios:
                timing[f"{clock}_ratio_{stage}"] = statistics.median(ratios)
    return timing


HEADINGS = (
    "ranks",
    "implementation",
    "collectives / step",
    "sent / step (MiB)",
    "written / step (MiB)",
    "peak live (MiB)",
    "first loss error",
    "gradient / one process",
    "step (ms)",
    "time / DeepSpeed Z1",
    "time / DeepSpeed Z2",
    "CPU / DeepSpeed Z1",
)


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table, in the order of `HEADINGS`."""
    head = [str(row["world_size"]), row["implementation"]]
    if "refused" in row:
        return [*head, f"failed: {report.shorten(row['refused'])}", *[""] * 9]
    mebi = 2.0**-20
    error, ratio = row["loss_errors"][0], row["gradient_ratio"]
    return [
        *head,
        f"{row['collectives']:.1f}",
        *(report.number(row[key], mebi, 2) for key in ("bytes_sent", "bytes_copied", "peak_bytes")),
        report.verdict(f"{error:.1e}", error <= TOLERANCE),
        report.verdict(f"{ratio:.4f}", abs(ratio - 1) <= TOLERANCE),
        report.number(row["seconds"], 1e3, 0),
        *(report.number(row.get(key), 1, 2) for key in RATIOS),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write it to `results/` and to the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps per burst")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)
    contenders.preload()
    single = run_ranks(burst, 1, {"steps": options.steps, "count": True}, timeout=120)
    rows = [{"world_size": 1, "implementation": "one process", **_verdict(single, single[0])}]
    rows[0] |= fastest(single)
    for world_size in options.ranks:
        rows += run_world(world_size, options.rounds, options.steps, single[0])
    report.publish("step", HEADINGS, [cells(row) for row in rows], rows, write=not options.no_write)


if __name__ == "__main__":
    main()
