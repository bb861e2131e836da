"""Trains a Llama on random tokens with one of ColossalAI's three kinds of sequence parallelism, and
times it.

    torchrun --nproc-per-node 4 benchmark.py --tp 4 --mode split_gather
    torchrun --nproc-per-node 4 benchmark.py --tp 2 --sp 2 --mode all_to_all
    torchrun --nproc-per-node 4 benchmark.py --tp 2 --sp 2 --mode ring_attn

The loss does not depend on how the work is partitioned. What a process computes with does: the last line
says how many tokens of each row its norms saw, and how many query heads its attention had.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from ulysses_accel import ParallelismConfig, use_fsdp_plugin

CONFIGS: dict[str, dict[str, int]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    # What LlamaConfig() is.
    "7b": {},
}


class RandomTokens(Dataset[dict[str, Tensor]]):
    """Rows of random tokens, whose labels are themselves."""

    def __init__(self, num_rows: int, length: int, vocab_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(0, vocab_size, (num_rows, length), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark; returns the losses, and what one rank saw of a row."""
    args = parse_args(arguments)
    parallelism = ParallelismConfig(
        tp_size=args.tp,
        sp_size=args.sp,
        sequence_parallelism_mode=args.mode,
        dp_shard_size=args.dp if args.fsdp else 1,
        dp_replicate_size=1 if args.fsdp else args.dp,
    )
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
    )
    accelerator = Accelerator(
        parallelism_config=parallelism,
        # On GPUs `plugin` alone is enough.
        fsdp_plugin=use_fsdp_plugin(parallelism, plugin) if args.fsdp else None,
        mixed_precision="bf16" if torch.cuda.is_available() else "no",
    )
    set_seed(42)
    config = LlamaConfig(**CONFIGS[args.config], max_position_embeddings=args.max_length)  # type: ignore[arg-type]
    model = LlamaForCausalLM(config)
    seen = watch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # As many rows as the steps take, over all data parallel groups.
    rows = RandomTokens(
        args.batch_size * args.num_steps * args.dp, args.max_length, config.vocab_size
    )
    loader = DataLoader(rows, batch_size=args.batch_size, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for step, batch in enumerate(loader):
        started = time.perf_counter()
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        tokens = args.batch_size * args.dp * args.max_length
        accelerator.print(
            f"step {step}: loss {losses[-1]:.4f}, {tokens / (time.perf_counter() - started):.0f} "
            "tokens/s"
        )
    accelerator.print(
        f"one process: {seen['tokens']} of {args.max_length} tokens, {seen['heads']} heads"
    )
    accelerator.end_training()
    return {"losses": losses, **seen}


def watch(model: LlamaForCausalLM) -> dict[str, int]:
    """Returns what is filled in by each forward: tokens at the first norm, and heads after the
    query projection.
    """
    seen = {"tokens": 0, "heads": 0}
    layer: Any = model.model.layers[0]

    def norm(_: Any, args: tuple[Tensor, ...]) -> None:
        seen["tokens"] = args[0].shape[1]

    def output(_: Any, args: tuple[Tensor, ...]) -> None:
        seen["heads"] = args[0].shape[-1] // layer.self_attn.head_dim

    layer.input_layernorm.register_forward_pre_hook(norm)
    layer.self_attn.o_proj.register_forward_pre_hook(output)
    return seen


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("-b", "--batch_size", type=int, default=2, help="rows of a batch")
    add("-s", "--num_steps", type=int, default=5, help="steps to run")
    add(
        "-l",
        "--max_length",
        type=int,
        default=256,
        help="tokens of a row, over all processes that share it",
    )
    add("-c", "--config", choices=list(CONFIGS), default="tiny", help="size of the model")
    add("--tp", type=int, default=1, help="tensor parallel processes")
    add("--sp", type=int, default=1, help="Ulysses or ring processes")
    add("--dp", type=int, default=1, help="data parallel groups")
    add(
        "--mode",
        choices=["split_gather", "all_to_all", "ring_attn"],
        help="without it, what the sizes say",
    )
    add("--fsdp", action="store_true", help="shard parameters with FSDP2 as well")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
