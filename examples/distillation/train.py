"""Distills a teacher into a smaller student on texts too long for one device; both are sharded over
the sequence.

    torchrun --nproc_per_node 2 examples/distillation/train.py --sp-size 2   # on CPU or GPU

The teacher is trained for some steps first, because nothing is downloaded; `--teacher PATH` takes a
trained one. Teacher and student share an accelerator and its batches, and may have different heads.
Each rank compares the logits of its local tokens, `aggregate_loss` returns the mean over all ranks'
counted tokens of it; no logits travel.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from ulysses_accel import ParallelismConfig, aggregate_loss

sys.path.append(str(Path(__file__).parents[1] / "alst"))

from data import collate, load_documents, make_rows, split_documents


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(
        parallelism_config=ParallelismConfig(sp_size=args.sp_size, cp_size=args.cp_size)
    )
    set_seed(args.seed)
    loader, eval_loader = (accelerator.prepare(loader) for loader in make_loaders(args))
    teacher = train_teacher(accelerator, loader, args)
    # Frozen, so that no engine wraps it; its attention is sharded like the student's.
    teacher = accelerator.prepare_model(teacher.requires_grad_(False).eval(), evaluation_mode=True)
    student = make_model(args, hidden_size=64, num_heads=2)
    student, optimizer = accelerator.prepare(
        student, torch.optim.AdamW(student.parameters(), lr=args.learning_rate)
    )
    before = divergence(accelerator, student, teacher, eval_loader, args.temperature)
    student.train()
    for step, batch in zip(range(1, args.steps + 1), endless(loader)):
        output = student(**batch)
        distilled = distillation_loss(accelerator, output.logits, teacher, batch, args.temperature)
        loss = args.weight * distilled + (1 - args.weight) * output.loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            accelerator.print(
                f"step {step}: distillation {distilled.item():.4f}, loss of labels "
                f"{output.loss.item():.4f}"
            )
    after = divergence(accelerator, student, teacher, eval_loader, args.temperature)
    accelerator.print(
        f"held-out divergence from the teacher: {before:.4f} before, {after:.4f} after"
    )
    accelerator.end_training()


def distillation_loss(
    accelerator: Accelerator,
    logits: Tensor,
    teacher: Any,
    batch: dict[str, Any],
    temperature: float,
) -> Tensor:
    """Returns the mean over all ranks' counted tokens of the student's divergence from the teacher.

    Args:
        accelerator: both are prepared by.
        logits: the student's, `[B, S / P, V]`.
        teacher: the prepared model.
        batch: this rank's shard.
        temperature: that both are softened by.
    """
    with torch.no_grad():
        output = teacher(**{key: value for key, value in batch.items() if key != "shift_labels"})
    labels = batch["shift_labels"]
    counted = labels != -100
    student_log_probs = F.log_softmax(logits / temperature, dim=-1)
    teacher_log_probs = F.log_softmax(output.logits / temperature, dim=-1)
    # [B, S / P, V] -> [B, S / P]
    divergences = F.kl_div(
        student_log_probs, teacher_log_probs, log_target=True, reduction="none"
    ).sum(-1)
    # A rank may have no token that counts.
    local_loss = (divergences * counted).sum() / counted.sum().clamp(min=1)
    return aggregate_loss(local_loss, labels, accelerator.sequence_parallel.group) * temperature**2


@torch.no_grad()
def divergence(
    accelerator: Accelerator, student: Any, teacher: Any, loader: Any, temperature: float
) -> float:
    """Returns the mean divergence over the loader's batches."""
    student.eval()
    losses = [
        distillation_loss(accelerator, student(**batch).logits, teacher, batch, temperature).item()
        for batch in loader
    ]
    return sum(losses) / len(losses)


def train_teacher(accelerator: Accelerator, loader: Any, args: Any) -> Any:
    """Returns the teacher: a trained one, or a tiny one that is trained here."""
    if args.teacher:
        return AutoModelForCausalLM.from_pretrained(args.teacher)
    teacher = make_model(args, hidden_size=128, num_heads=4)
    prepared, optimizer = accelerator.prepare(
        teacher, torch.optim.AdamW(teacher.parameters(), lr=args.learning_rate)
    )
    for step, batch in zip(range(1, args.teacher_steps + 1), endless(loader)):
        loss = prepared(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            accelerator.print(f"teacher, step {step}: loss {loss.item():.4f}")
    return accelerator.unwrap_model(prepared)


def make_model(args: Any, hidden_size: int, num_heads: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(ByT5Tokenizer()),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2,
        max_position_embeddings=args.sequence_length,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def make_loaders(args: Any) -> tuple[DataLoader[Any], DataLoader[Any]]:
    tokenizer = ByT5Tokenizer()
    training, held_out = split_documents(load_documents(args.data), args.eval_documents, args.seed)
    as_batch = partial(collate, pad_token_id=tokenizer.pad_token_id or 0)
    rows = make_rows(training, tokenizer, args.sequence_length, packed=False)
    eval_rows = make_rows(held_out, tokenizer, args.sequence_length, packed=False)
    return (
        DataLoader(
            rows, batch_size=args.batch_size, shuffle=True, drop_last=True, collate_fn=as_batch
        ),  # type: ignore[arg-type]
        DataLoader(eval_rows, batch_size=args.batch_size, collate_fn=as_batch),  # type: ignore[arg-type]
    )


def endless(loader: Any) -> Iterator[dict[str, Any]]:
    while True:
        yield from loader


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--data",
        nargs="+",
        default=["stdlib"],
        help="what examples/alst/data.py reads: files, folders, `stdlib`",
    )
    add(
        "--teacher",
        help="a trained causal language model of the same bytes; without it a tiny one is trained first",
    )
    add("--teacher-steps", type=int, default=30)
    add("--sp-size", type=int, default=2, help="ranks that share a text by Ulysses")
    add("--cp-size", type=int, default=1, help="ranks that share a text by a ring")
    add("--weight", type=float, default=0.9, help="of the distillation; the rest is the labels'")
    add("--temperature", type=float, default=2.0)
    add("--sequence-length", type=int, default=512, help="most tokens of a text")
    add("--batch-size", type=int, default=2)
    add("--eval-documents", type=int, default=4)
    add("--learning-rate", type=float, default=3e-3)
    add("--steps", type=int, default=30)
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.sp_size * args.cp_size == 1:
        parser.error("--sp-size 1 and --cp-size 1 share no text. Use 2 or more of either.")
    return args


if __name__ == "__main__":
    main()
