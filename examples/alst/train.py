"""Fine-tunes a causal language model on documents too long for one device, with a stock
`accelerate.Accelerator`.

    torchrun --nproc-per-node 2 train.py --sp-size 2     # a tiny model, on CPU or GPU
    torchrun --nproc-per-node 8 train.py --sp-size 8 \\
        --model MODEL --data TEXTS/ --sequence-length 131072

`main` is the whole job. What sequence parallelism adds to an ordinary accelerate script is one
argument of `Accelerator`, and `--memory alst` all that the paper on Arctic Long Sequence Training
saves memory with. `data.py` makes rows of tokens out of documents; `job.py` writes metrics and
checkpoints.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from data import collate, load_documents, make_rows, split_documents
from job import Job
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    get_scheduler,
)

from ulysses_accel import MemoryConfig, ParallelismConfig


def main() -> None:
    args = parse_args()
    memory = MemoryConfig.alst() if args.memory == "alst" else None
    parallelism = ParallelismConfig(sp_size=args.sp_size, memory_config=memory)
    accelerator = Accelerator(
        parallelism_config=parallelism,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    set_seed(args.seed)
    tokenizer, model = load_model(args)
    train_loader, eval_loader = make_loaders(args, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    # Accelerate steps a prepared scheduler once per data parallel replica.
    replicas = accelerator.num_processes // parallelism.non_data_parallel_size
    scheduler = get_scheduler(
        "constant_with_warmup", optimizer, num_warmup_steps=args.warmup_steps * replicas
    )
    model, optimizer, train_loader, eval_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, eval_loader, scheduler
    )
    steps = args.steps or args.epochs * math.ceil(
        len(train_loader) / args.gradient_accumulation_steps
    )
    job = Job(args, accelerator, steps)
    if args.resume:
        job.load_checkpoint()
    else:
        job.state["held_out_before"] = evaluate(accelerator, model, eval_loader)
    while job.state["step"] < steps:
        train_epoch(args, job, model, optimizer, train_loader, scheduler)
    job.finish(evaluate(accelerator, model, eval_loader))
    accelerator.end_training()


def train_epoch(
    args: Any, job: Job, model: Any, optimizer: Any, loader: Any, scheduler: Any
) -> None:
    """Runs the loop that every accelerate script has, from where `job` stands to the end of the
    epoch or of the job.
    """
    accelerator = job.accelerator
    model.train()
    job.started = time.perf_counter()
    loader.set_epoch(job.state["epoch"])
    num_done = job.state["batch"]
    for batch in accelerator.skip_first_batches(loader, num_done) if num_done else loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:  # before, the gradients are a part of the step's
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        job.state["batch"] += 1
        job.add_batch(loss, count_labels(batch))
        if accelerator.sync_gradients:
            job.end_step(grad_norm)
            if job.state["step"] == job.num_steps:
                return
    job.state.update(epoch=job.state["epoch"] + 1, batch=0)


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: Any, loader: Any) -> float:
    """Returns the mean loss of a label over the whole loader, however the labels are spread over
    ranks.
    """
    model.eval()
    totals = torch.zeros(2, device=accelerator.device, dtype=torch.float32)
    for batch in loader:
        num_labels = count_labels(batch)
        totals += torch.stack([model(**batch).loss.float() * num_labels, num_labels.float()])
    loss_sum, num_labels = accelerator.reduce(totals, "sum").tolist()
    return loss_sum / max(num_labels, 1.0)


def count_labels(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns how many labels of this rank's part of the batch count: sharded batches hold them
    already shifted.
    """
    labels = batch["shift_labels"] if "shift_labels" in batch else batch["labels"][..., 1:]
    return (labels != -100).sum()


def load_model(args: Any) -> tuple[Any, Any]:
    """Returns the tokenizer and the model; `tiny` is a byte-level Llama of half a million
    parameters, made here.
    """
    if args.model == "tiny":
        tokenizer = ByT5Tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=args.sequence_length,
        )
        model = LlamaForCausalLM(config)
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        # Weights are trained in float32; --mixed-precision chooses what they are computed with.
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.config.use_cache = False
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return tokenizer, model


def make_loaders(args: Any, tokenizer: Any) -> tuple[DataLoader[Any], DataLoader[Any]]:
    training, held_out = split_documents(load_documents(args.data), args.eval_documents, args.seed)
    as_batch = partial(collate, pad_token_id=tokenizer.pad_token_id or 0)
    rows = make_rows(training, tokenizer, args.sequence_length, args.packed)
    eval_rows = make_rows(held_out, tokenizer, args.sequence_length, args.packed, whole=False)
    return (
        DataLoader(
            rows, batch_size=args.batch_size, shuffle=True, drop_last=True, collate_fn=as_batch
        ),  # type: ignore[arg-type]
        DataLoader(eval_rows, batch_size=args.batch_size, collate_fn=as_batch),  # type: ignore[arg-type]
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model",
        default="tiny",
        help="hub name or local path of a causal language model, or `tiny`",
    )
    add(
        "--data",
        nargs="+",
        default=["stdlib"],
        help="text or JSONL files, folders, `datasets` names, or `stdlib`",
    )
    add(
        "--output",
        default="runs/tiny",
        help="folder for metrics.jsonl, loss.png, summary.json and the checkpoints",
    )
    add("--sequence-length", type=int, default=4096, help="tokens of one row, before it is sharded")
    add(
        "--sp-size",
        type=int,
        help="ranks that share one sequence; without it the launcher's setting counts, else 1",
    )
    add("--batch-size", type=int, default=1, help="rows of one micro-batch of a sequence group")
    add("--gradient-accumulation-steps", type=int, default=1)
    add("--learning-rate", type=float, default=3e-3)
    add("--warmup-steps", type=int, default=10)
    add("--max-grad-norm", type=float, default=1.0)
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--steps", type=int, help="optimizer steps of the whole job, resumed parts included"
    )
    length.add_argument(
        "--epochs", type=int, default=1, help="passes over the data, where --steps is not given"
    )
    add(
        "--packed",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="documents share rows, or one per row",
    )
    add("--gradient-checkpointing", action="store_true")
    add(
        "--memory",
        choices=["none", "alst"],
        default="none",
        help="alst: tiles, checkpoints on the host, bf16 reduction",
    )
    add("--mixed-precision", choices=["no", "bf16", "fp16"], default="no")
    add(
        "--eval-documents",
        type=int,
        default=8,
        help="documents held out; a row's length of each is evaluated",
    )
    add(
        "--save-every",
        type=int,
        default=0,
        help="steps between checkpoints; one is always written at the end",
    )
    add("--resume", action="store_true", help="go on from the newest checkpoint in --output")
    add("--seed", type=int, default=42)
    return parser.parse_args()


if __name__ == "__main__":
    main()
