"""Where a training job stands: its metrics, its checkpoints, and how it goes on from one."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from tqdm.auto import tqdm


class Job:
    """Where the job stands, what it reports, and how it is saved."""

    def __init__(self, args: Any, accelerator: Accelerator, num_steps: int) -> None:
        self.args, self.accelerator, self.num_steps = args, accelerator, num_steps
        self.output = Path(args.output)
        self.metrics = self.output / "metrics.jsonl"
        # What the order of the batches depends on: a job that goes on with another value would
        # repeat or skip data.
        self.same = {
            key: getattr(args, key)
            for key in ("data", "seed", "sequence_length", "batch_size", "packed")
        }
        self.same["processes"] = [accelerator.num_processes, accelerator.parallelism_config.sp_size]
        self.state: dict[str, Any] = {
            "step": 0,
            "epoch": 0,
            "batch": 0,
            "held_out_before": math.nan,
        }
        self.bar = tqdm(total=num_steps, disable=not accelerator.is_main_process, unit="step")
        self.started = time.perf_counter()
        self.losses: list[torch.Tensor] = []
        self.num_labels: list[torch.Tensor] = []
        if accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            if not args.resume:
                self.metrics.write_text("")

    def add_batch(self, loss: torch.Tensor, num_labels: torch.Tensor) -> None:
        self.losses.append(loss.detach().float())
        self.num_labels.append(num_labels)

    def end_step(self, grad_norm: Any) -> None:
        self.state["step"] += 1
        loss = self.accelerator.reduce(torch.stack(self.losses).mean(), "mean").item()
        num_tokens = int(self.accelerator.reduce(torch.stack(self.num_labels).sum(), "sum").item())
        self.losses, self.num_labels = [], []
        seconds, self.started = time.perf_counter() - self.started, time.perf_counter()
        record = {
            "step": self.state["step"],
            "loss": loss,
            "num_tokens": num_tokens,
            "tokens_per_second": num_tokens / seconds,
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "peak_bytes": peak_bytes(),
        }
        if self.accelerator.is_main_process:
            with self.metrics.open("a") as file:
                file.write(json.dumps(record) + "\n")
        peak = f"{record['peak_bytes'] / 2**30:.2f} GiB"
        self.bar.set_postfix(
            {"loss": f"{loss:.3f}", "tokens/s": f"{num_tokens / seconds:,.0f}", "peak": peak}
        )
        self.bar.update()
        if self.args.save_every and self.state["step"] % self.args.save_every == 0:
            self.save_checkpoint()

    def save_checkpoint(self) -> None:
        folder = self.output / f"checkpoint-{self.state['step']}"
        self.accelerator.save_state(str(folder))
        self.accelerator.wait_for_everyone()
        # Written last: a checkpoint without its position is an unfinished one.
        if self.accelerator.is_main_process:
            (folder / "position.json").write_text(json.dumps({**self.state, "same": self.same}))

    def load_checkpoint(self) -> None:
        folders = [file.parent for file in self.output.glob("checkpoint-*/position.json")]
        if not folders:
            raise SystemExit(
                f"--resume: no finished checkpoint in {self.output}. Start without --resume."
            )
        folder = max(folders, key=lambda folder: int(folder.name.split("-")[-1]))
        position = json.loads((folder / "position.json").read_text())
        if (saved := position.pop("same")) != self.same:
            raise SystemExit(
                f"--resume: {folder} was made with {saved}, this job has {self.same}. Use the same "
                "values."
            )
        self.accelerator.load_state(str(folder))
        self.state = position
        self.bar.update(position["step"])
        if self.accelerator.is_main_process:
            kept = self.metrics.read_text().splitlines()[: position["step"]]
            self.metrics.write_text("".join(f"{line}\n" for line in kept))

    def finish(self, held_out_after: float) -> None:
        self.save_checkpoint()
        self.bar.close()
        before = self.state["held_out_before"]
        summary = {
            "held_out_before": before,
            "held_out_after": held_out_after,
            "peak_bytes": peak_bytes(),
        }
        if self.accelerator.is_main_process:
            (self.output / "summary.json").write_text(json.dumps(summary))
            plot(self.metrics, self.output / "loss.png")
        self.accelerator.print(
            f"held-out loss: {before:.4f} before, {held_out_after:.4f} after {self.num_steps} steps"
        )
        self.accelerator.print(
            f"peak memory of rank 0: {peak_bytes() / 2**30:.2f} GiB; results in {self.output}"
        )


def peak_bytes() -> int:
    """Returns this process's peak memory: torch's allocations on CUDA, otherwise all that the
    process held in RAM.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def plot(metrics: Path, picture: Path) -> None:
    """Draws the loss of every step."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    # A figure made without pyplot needs no display.
    figure = Figure(figsize=(8, 4.5), layout="tight")
    axes = figure.subplots()
    axes.plot([record["step"] for record in records], [record["loss"] for record in records])
    axes.set(
        xlabel="optimizer step", ylabel="training loss (nats per token)", title="Training loss"
    )
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
