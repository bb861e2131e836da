"""XTuner's document on sequence parallelism as one script: its five functions, step by step, under
torchrun or Slurm.

    torchrun --nproc-per-node 2 examples/xtuner/train.py --sequence-parallel-size 2
    sbatch examples/xtuner/slurm.sh

Only the imports differ from a script for XTuner. Loss and gradients are those of one process with
full sequences.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from ulysses_accel.compat.xtuner import (
    SequenceParallelSampler,
    dispatch_modules,
    init_dist,
    init_sequence_parallel,
    pad_for_sequence_parallel,
    reduce_sequence_parallel_loss,
    split_for_sequence_parallel,
)

sys.path.append(str(Path(__file__).parents[1] / "alst"))

from data import load_documents

Batch = dict[str, torch.Tensor | None]


def main() -> None:
    args = parse_args()
    train(args)
    dist.destroy_process_group()


def train(args: Any) -> list[float]:
    """Returns the loss of every step, the mean over the tokens of a batch; the same on all ranks
    that share it.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # The distributed environment: neighbouring ranks share a sequence.
    init_dist(args.launcher, "nccl" if device.type == "cuda" else "gloo")
    init_sequence_parallel(args.sequence_parallel_size)
    torch.manual_seed(args.seed)
    tokenizer, model = load_model(args)
    # The attention: after init_sequence_parallel, and before anything wraps the model.
    dispatch_modules(model)
    model = DistributedDataParallel(model.to(device).train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    losses: list[float] = []
    for step, batch in enumerate(make_loader(args, tokenizer), 1):
        loss = compute_loss(
            model,
            {key: None if value is None else value.to(device) for key, value in batch.items()},
        )
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if dist.get_rank() == 0:
            print(f"step {step}: loss {losses[-1]:.4f}", flush=True)
        if step == args.steps:
            break
    return losses


def make_loader(args: Any, tokenizer: Any) -> DataLoader[Batch]:
    """Returns batches of documents, the same ones on all ranks that share a sequence."""
    documents = load_documents(args.data)[: args.documents]
    # The beginnings of documents, of different lengths.
    lengths = [args.sequence_length - 16 * (number % 4) for number in range(len(documents))]
    samples: Any = [
        torch.tensor(tokenizer(text, verbose=False)["input_ids"][:length])
        for text, length in zip(documents, lengths)
    ]
    sampler = SequenceParallelSampler(samples, seed=args.seed)
    pad = tokenizer.pad_token_id or 0
    return DataLoader(
        samples, args.batch_size, sampler=sampler, collate_fn=partial(collate, pad_token_id=pad)
    )


def collate(samples: list[torch.Tensor], pad_token_id: int) -> Batch:
    """Returns this rank's part of the samples; the attention mask stays whole."""
    input_ids = pad_sequence(samples, batch_first=True, padding_value=pad_token_id)
    lengths = torch.tensor([len(sample) for sample in samples])
    attention_mask: torch.Tensor | None = (
        torch.arange(input_ids.shape[1]) < lengths[:, None]
    ).long()
    labels: torch.Tensor | None = input_ids.masked_fill(attention_mask == 0, -100)
    position_ids: torch.Tensor | None = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    # Padding until the ranks divide the length, then the split.
    input_ids, labels, position_ids, attention_mask = pad_for_sequence_parallel(
        input_ids, labels, position_ids, attention_mask, tokens_pad_index=pad_token_id
    )
    input_ids, labels, position_ids = split_for_sequence_parallel(input_ids, labels, position_ids)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        "attention_mask": attention_mask,
    }


def compute_loss(llm: Any, batch: Batch) -> torch.Tensor:
    labels = batch["labels"]
    assert labels is not None
    outputs = llm(**batch)
    num_tokens_per_rank = (labels != -100).sum()
    return reduce_sequence_parallel_loss(outputs.loss, num_tokens_per_rank)


def load_model(args: Any) -> tuple[Any, Any]:
    """Returns the tokenizer and the model; `tiny` is a byte-level Llama, made here."""
    if args.model != "tiny":
        return AutoTokenizer.from_pretrained(args.model), AutoModelForCausalLM.from_pretrained(
            args.model
        )
    tokenizer = ByT5Tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=args.sequence_length,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, LlamaForCausalLM(config)


def parse_args(arguments: Sequence[str] | None = None) -> Any:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--launcher",
        choices=["pytorch", "slurm"],
        default="pytorch",
        help="what started the processes",
    )
    add("--sequence-parallel-size", type=int, default=1, help="processes that share each sequence")
    add("--model", default="tiny", help="a path or name for from_pretrained, or `tiny`")
    add("--data", nargs="+", default=["stdlib"], help="as of ../alst/train.py")
    add("--documents", type=int, default=32, help="how many of them")
    add("--sequence-length", type=int, default=511, help="tokens of the longest sample")
    add(
        "--batch-size",
        type=int,
        default=2,
        help="samples in a batch, of the processes that share them",
    )
    add("--steps", type=int, default=8)
    add("--learning-rate", type=float, default=3e-3)
    add("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
