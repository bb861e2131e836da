"""What the tests of trainers share: a Trainer of any engine, what it did, and how far that is from
one process.

A job is run twice by the same code: on one process by a stock Trainer, and on ranks with our config
and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets  # noqa: F401  imported before the fork, so that ranks start warm
import deepspeed  # noqa: F401
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import ulysses_accel
from tests.helpers.models import VOCAB, build
from tests.helpers.parity_jobs import full_parameters

FIRST_ID = 3
Samples = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Mode:
    """How many processes there are along each axis, and on which engine."""

    sp: int = 1
    cp: int = 1
    dp: int = 1
    engine: str = "DDP"

    def __str__(self) -> str:
        axes = {"dp": self.dp, "cp": self.cp, "sp": self.sp}
        return "-".join(
            [f"{axis}{size}" for axis, size in axes.items() if size > 1] + [self.engine]
        )

    @property
    def world_size(self) -> int:
        return self.sp * self.cp * self.dp

    def arguments(
        self, folder: str, batch_size: int, memory_config: Any = None, **options: Any
    ) -> TrainingArguments:
        """Returns a job's arguments; `batch_size` is that of all processes together."""
        for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
            os.environ.pop(name, None)
        options = {"eval_strategy": "no", "save_strategy": "no", "logging_steps": 1, **options}
        if self.sp * self.cp > 1:
            axis = "dp_shard_size" if self.engine == "FSDP2" else "dp_replicate_size"
            sizes: dict[str, Any] = {"sp_size": self.sp, "cp_size": self.cp, axis: self.dp}
            options["parallelism_config"] = ulysses_accel.ParallelismConfig(
                **sizes, memory_config=memory_config
            )
        options.update(_engine(self.engine))
        return TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch_size // self.dp,
            per_device_eval_batch_size=batch_size // self.dp,
            report_to="none",
            disable_tqdm=True,
            **options,
        )


ONE = Mode()


def _engine(name: str) -> dict[str, Any]:
    if name == "FSDP2":
        wrap = {"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}
        return {"use_cpu": True, "fsdp": "full_shard auto_wrap", "fsdp_config": wrap}
    if not name.startswith("ZeRO"):
        return {"use_cpu": True}
    return {
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": int(name[-1])},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    }


class Recorder(Trainer):
    """A stock Trainer that remembers each micro-step's loss as it was computed, which logs
    round.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.losses: list[float] = []
        self.tokens: set[int] = set()
        super().__init__(*args, **kwargs)
        queries = ("q_proj", "c_attn", "query")
        layer = next(
            module for name, module in self.model.named_modules() if name.endswith(queries)
        )
        layer.register_forward_pre_hook(self._count)

    def _count(self, _module: Any, args: tuple[Tensor, ...]) -> None:
        self.tokens.add(args[0].shape[1])

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        return loss


def samples(count: int, lengths: Sequence[int] = (16,), seed: int = 0) -> Samples:
    """Returns samples of random tokens whose first ones have no label; sample i begins with
    `FIRST_ID + i`.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        ids = torch.randint(FIRST_ID, VOCAB, (lengths[index % len(lengths)],), generator=generator)
        ids[0] = FIRST_ID + index
        labels = ids.clone()
        labels[: 1 + index % 3] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def pad(batch: Samples) -> dict[str, Tensor]:
    """Collates samples of any lengths, padded at the right."""
    width = max(len(sample["input_ids"]) for sample in batch)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    rows: dict[str, list[Tensor]] = {name: [] for name in fill}
    for sample in batch:
        sample = {**sample, "attention_mask": torch.ones_like(sample["input_ids"])}
        for name, value in fill.items():
            missing = width - len(sample["input_ids"])
            rows[name].append(torch.nn.functional.pad(sample[name], (0, missing), value=value))
    return {name: torch.stack(row) for name, row in rows.items()}


def run_of(trainer: Recorder) -> dict[str, Any]:
    """Returns what a Trainer did, as ranks hand it back: losses, logs, parameters, and the lengths
    that it saw.
    """
    names = ("loss", "grad_norm", "learning_rate", "epoch")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": trainer.losses,
        "logs": [{name: float(entry[name]) for name in names} for entry in logs],
        "parameters": {
            name: value.clone() for name, value in full_parameters(trainer.model_wrapped).items()
        },
        "tokens": sorted(trainer.tokens),
        "steps": trainer.state.global_step,
        "epoch": float(trainer.state.epoch or 0),
        "random": torch.get_rng_state(),
    }


def train(
    mode: Mode,
    folder: str,
    batch_size: int,
    data: Samples,
    dtype: Any = torch.float64,
    **options: Any,
) -> Any:
    """Trains a tiny model to the end."""
    arguments = mode.arguments(folder, batch_size, **options)
    trainer = Recorder(build("llama", dtype), arguments, pad, data)
    trainer.train()
    return run_of(trainer)
