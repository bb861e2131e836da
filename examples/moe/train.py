"""Trains a small mixture of experts whose sequences and experts are shared by the same processes.

    torchrun --nproc-per-node 2 examples/moe/train.py

Each process has half of every sequence and half of every layer's experts; tokens travel to the
experts that they chose. The router loss, which keeps experts evenly used, is that of the full
sequence.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import ByT5Tokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from ulysses_accel import ParallelismConfig

sys.path.append(str(Path(__file__).parents[1] / "alst"))

from data import collate, load_documents, make_rows


def main() -> None:
    args = parse_args()
    parallelism = ParallelismConfig(sp_size=args.sp_size, ep_size=args.ep_size)
    accelerator = Accelerator(parallelism_config=parallelism)
    set_seed(0)
    tokenizer = ByT5Tokenizer()
    model: Any = make_model(len(tokenizer), args.sequence_length)
    documents = load_documents(args.data)[: args.documents]
    rows: Any = make_rows(documents, tokenizer, args.sequence_length, packed=True)
    loader = DataLoader(
        rows[: args.steps], collate_fn=partial(collate, pad_token_id=tokenizer.pad_token_id)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    report(accelerator, model)
    for step, batch in enumerate(loader, 1):
        # Asked for in the call, the shard's router logits come with the output; the loss has the
        # router loss in it.
        output = model(**batch, output_router_logits=True)
        accelerator.backward(output.loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens = accelerator.reduce(tokens_per_expert(output.router_logits), "sum").tolist()
        if step % args.print_every == 0:
            accelerator.print(
                f"step {step}: loss {output.loss.item():.4f}, router loss "
                f"{output.aux_loss.item():.4f}, "
                f"tokens per expert {tokens}"
            )


def make_model(vocab_size: int, sequence_length: int) -> Qwen3MoeForCausalLM:
    """Returns a byte-level Qwen3-MoE of eight experts."""
    config = Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.1,
        max_position_embeddings=sequence_length,
        use_cache=False,
    )
    return Qwen3MoeForCausalLM(config)


def tokens_per_expert(router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Returns how many of this process's tokens chose each expert, over all layers."""
    chosen = torch.cat(router_logits).topk(2, dim=-1).indices
    return torch.bincount(chosen.reshape(-1), minlength=router_logits[0].shape[-1])


def report(accelerator: Accelerator, model: Any) -> None:
    experts = accelerator.unwrap_model(model).model.layers[0].mlp.experts
    accelerator.print(
        f"{accelerator.num_processes} processes, each with {experts.num_experts} of 8 experts of a "
        "layer"
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sp-size", type=int, default=2, help="processes that share each sequence")
    add("--ep-size", type=int, default=2, help="processes that share the experts of each layer")
    add("--data", nargs="+", default=["stdlib"], help="as of ../alst/train.py")
    add("--documents", type=int, default=8, help="how many of them are read")
    add("--sequence-length", type=int, default=512)
    add("--steps", type=int, default=40)
    add("--print-every", type=int, default=10)
    return parser.parse_args()


if __name__ == "__main__":
    main()
