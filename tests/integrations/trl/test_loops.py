"""What the trainers that generate do between two generations, in a loop of one's own; and that they
are refused.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import trl
from accelerate.state import AcceleratorState
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from trl import DistillationConfig, GRPOConfig, RLOOConfig

import ulysses_accel
from tests.helpers.engine_jobs import error_of
from tests.helpers.models import VOCAB, build
from tests.helpers.parity_jobs import EXACT, Engine, compare, full_gradients, zero_gradients
from tests.helpers.ranks import run_ranks
from tests.helpers.support import Support
from tests.helpers.trl_jobs import texts, tokenizer
from tests.integrations.trainer.test_peft import adapted
from ulysses_accel.errors import BatchError
from ulysses_accel.memory.apply import apply_memory
from ulysses_accel.sequence.description import DESCRIPTION_KEY

LENGTH, PROMPT = 19, 7
CLIP, KL = 0.2, 0.05


def completions() -> dict[str, Tensor]:
    """Returns four completions of a prompt, as a trainer has them once they are generated."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (4, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 15:] = mask[3, 12:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :PROMPT] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def grpo_loss(log_probs: Tensor, old: Tensor, counts: Tensor) -> Tensor:
    """Returns GRPO's clipped loss with its penalty, from log-probabilities `[B, S]` that are 0
    outside of completions.

    Args:
        log_probs: the policy's.
        old: those that the completions were generated with.
        counts: `[B, S]`, 1 for tokens of completions.
    """
    advantages = torch.tensor([1.5, -0.5, 0.25, -1.25], dtype=log_probs.dtype)[:, None]
    ratio = torch.exp(log_probs - old)
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    difference = old - log_probs
    losses = -torch.min(ratio * advantages, clipped * advantages) + KL * (
        difference.exp() - difference - 1
    )
    return ((losses * counts).sum(-1) / counts.sum(-1)).mean()


def policies(kind: str) -> tuple[Any, Any]:
    """Returns the policy and the one that generated."""
    return (
        (adapted(), build("llama", seed=3))
        if kind == "lora"
        else (build("llama"), build("llama", seed=3))
    )


def plain_steps(kind: str) -> tuple[float, dict[str, Tensor]]:
    """Returns one process's loss and gradients, from whole logits."""
    batch = completions()
    labels = torch.nn.functional.pad(batch.pop("labels"), (0, 1), value=-100)[:, 1:]
    counts = (labels != -100).to(torch.float64)

    def scores(model: Any) -> Tensor:
        whole = model(**batch, use_cache=False).logits.log_softmax(-1)
        return whole.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * counts

    policy, old = policies(kind)
    loss = grpo_loss(scores(policy), scores(old).detach(), counts)
    loss.backward()
    return float(loss.detach()), {
        name: p.grad for name, p in policy.named_parameters() if p.grad is not None
    }


def sharded_steps(
    engine: Engine, kind: str, sizes: dict[str, int], expected: Any
) -> tuple[float, float]:
    """Returns how far the loss and the gradients are from one process's."""
    accelerator = engine.accelerator(**sizes)
    policy, old = policies(kind)
    for model in (policy, old):
        apply_memory(
            model,
            ulysses_accel.MemoryConfig(tiled_loss=True, tiled_loss_tokens=3),
            shares_sequence=True,
        )
    samples: Any = [completions()]
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.0)
    policy, _, batches = accelerator.prepare(
        policy, optimizer, DataLoader(samples, batch_size=None)
    )
    old = accelerator.prepare_model(old, evaluation_mode=True)
    (batch,) = batches
    description, group = batch[DESCRIPTION_KEY], accelerator.sequence_parallel.group

    def scores(model: Any) -> Tensor:
        found = model(**batch, return_log_probs=True)
        assert found.loss is None
        assert "logits" not in found
        assert found.log_probs.shape == batch["input_ids"].shape
        assert found.log_probs.shape[1] < LENGTH
        return ulysses_accel.gather_sequence(found.log_probs, description, group)

    counts = ulysses_accel.gather_sequence(
        (batch["shift_labels"] != -100).to(torch.float64), description, group
    )
    with torch.no_grad():
        generated = scores(old)
    zero_gradients(policy)
    loss = grpo_loss(scores(policy), generated, counts)
    accelerator.backward(loss)
    grads = {
        name.removeprefix("module."): p.grad
        for name, p in policy.named_parameters()
        if p.grad is not None
    }
    grads = grads if kind == "lora" else full_gradients(policy)
    difference = compare(float(loss.detach()), grads, *expected)
    return difference.loss, difference.grad


JOBS: dict[str, tuple[Engine, str, dict[str, int]]] = {
    "sp": (Engine(), "whole", {"sp_size": 2}),
    "cp": (Engine(), "whole", {"sp_size": 1, "cp_size": 2}),
    "sp, lora": (Engine(), "lora", {"sp_size": 2}),
    "sp, FSDP2": (Engine("fsdp2"), "whole", {"sp_size": 2}),
}


def all_jobs(expected: dict[str, Any]) -> dict[str, tuple[float, float]]:
    return {
        name: sharded_steps(engine, kind, sizes, expected[kind])
        for name, (engine, kind, sizes) in JOBS.items()
    }


def test_log_probabilities_of_a_grpo_loop(support: Support) -> None:
    expected = {kind: plain_steps(kind) for kind in ("whole", "lora")}
    for found in run_ranks(all_jobs, 2, expected, init=False):
        assert len(found) == len(JOBS)
        for name, errors in found.items():
            assert max(errors) <= EXACT, (name, errors)
    for name in JOBS:
        mode, _, engine = name.partition(", ")
        code = "log_probs = model(**batch, return_log_probs=True).log_probs  # MemoryConfig(tiled_loss=True)"
        row = "log-probabilities of a GRPO loop"
        support("loss", row, mode, code=code, engine="FSDP2" if engine == "FSDP2" else "DDP")


GENERATING = {
    "GRPOTrainer": GRPOConfig,
    "RLOOTrainer": RLOOConfig,
    "DistillationTrainer": DistillationConfig,
}


def refusals(folder: str) -> dict[str, str]:
    """Returns what building each trainer that generates says; with a ring alone TRL's own configs
    let it pass.
    """
    found = {}
    data = Dataset.from_dict({"prompt": texts(4)})
    for name, config in GENERATING.items():
        AcceleratorState._reset_state(True)
        parallel = ulysses_accel.ParallelismConfig(sp_size=1, cp_size=2)
        arguments = config(
            folder, parallelism_config=parallel, use_cpu=True, bf16=False, report_to="none"
        )
        options = {"args": arguments, "train_dataset": data, "processing_class": tokenizer()}
        key = "teacher_model" if name == "DistillationTrainer" else "reward_funcs"
        options[key] = (
            build("llama", seed=3) if key == "teacher_model" else lambda completions, **_: [0.0]
        )
        found[name] = error_of(getattr(trl, name), build("llama"), **options)
    return found


def test_trainers_that_generate_are_refused(tmp_path: Any, support: Support) -> None:
    for errors in run_ranks(refusals, 2, str(tmp_path), init=False):
        for name, error in errors.items():
            assert error.startswith(
                f"ConfigError: {name} with sp_size=1, cp_size=2 is not supported"
            ), error
            assert "return_log_probs" in error
            support.refused("trainer", f"TRL {name}", "cp", "it makes batches by itself")
    for name, config in GENERATING.items():
        with pytest.raises(ValueError, match=f"{name} does not support sequence-dim parallelism"):
            config(
                str(tmp_path),
                parallelism_config=ulysses_accel.ParallelismConfig(sp_size=2),
                use_cpu=True,
            )
        support.refused("trainer", f"TRL {name}", "sp", "TRL's own config does")


@pytest.mark.parametrize("given", ["labels", "nothing"])
def test_log_probabilities_need_shifted_labels(given: str) -> None:
    model = build("llama")
    apply_memory(model, ulysses_accel.MemoryConfig(tiled_loss=True))
    batch = completions()
    if given == "nothing":
        del batch["labels"]
    with pytest.raises(
        BatchError,
        match=r"needs shift_labels, .* \(labels: " + ("none" if given == "nothing" else r"\[4"),
    ):
        model(**batch, return_log_probs=True)
