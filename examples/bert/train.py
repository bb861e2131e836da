"""Pre-trains BERT on pairs of segments too long for one device, with a stock
`accelerate.Accelerator`.

    python prepare.py --output data --sequence-length 4096
    torchrun --nproc-per-node 2 train.py --sp-size 2 --max-positions 4096    # Ulysses
    torchrun --nproc-per-node 4 train.py --sp-size 2 --cp-size 2 --max-positions 4096    # and a ring

Two losses: masked words, each process computes those of its tokens; and which segment comes first,
computed of the first token's vector, which one process has. The model returns their sum, the same
on every process that shares a sequence.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from pairs import IGNORED, Row, make_loaders
from positions import extend_positions
from transformers import BertConfig, BertForPreTraining

from ulysses_accel import ParallelismConfig


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    accelerator = Accelerator(
        parallelism_config=ParallelismConfig(sp_size=args.sp_size, cp_size=args.cp_size),
        mixed_precision=args.mixed_precision,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    set_seed(args.seed)
    tokenizer, train_loader, eval_loader = make_loaders(args)
    model = make_model(args, tokenizer)
    # From here on only dropout draws numbers, which is to drop something else in each part of a
    # sequence.
    set_seed(args.seed, device_specific=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay
    )
    model, optimizer, train_loader, eval_loader = accelerator.prepare(
        model, optimizer, train_loader, eval_loader
    )
    before = evaluate(accelerator, model, eval_loader)
    log = Log(args, accelerator)
    epoch = 0
    while log.step < args.steps:
        train_epoch(log, model, optimizer, train_loader, epoch)
        epoch += 1
    save(
        accelerator,
        model,
        tokenizer,
        Path(args.output),
        before,
        evaluate(accelerator, model, eval_loader),
    )
    accelerator.end_training()


def train_epoch(log: Log, model: Any, optimizer: Any, loader: Any, epoch: int) -> None:
    """Runs the loop that every accelerate script has, to the end of the epoch or of the job."""
    accelerator, args = log.accelerator, log.args
    model.train()
    loader.set_epoch(epoch)
    for batch in loader:
        output = model(**batch)
        accelerator.backward(output.loss)
        accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        log.add(means(sums(accelerator, output, batch)))
        if log.step == args.steps:
            return


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: Any, loader: Any) -> dict[str, float]:
    """Returns the measures of all batches of a loader, whose masks are always the same."""
    model.eval()
    return means(torch.stack([sums(accelerator, model(**batch), batch) for batch in loader]).sum(0))


@torch.no_grad()
def sums(accelerator: Accelerator, output: Any, batch: Row) -> torch.Tensor:
    """Returns sums of losses, right answers and questions over all processes `[2, 3]`: of words,
    and of pairs.

    Args:
        accelerator: sums over processes.
        output: of the model: `prediction_logits` `[B, S / P, V]` of this process's tokens,
            `seq_relationship_logits` `[B, 2]` of the whole samples.
        batch: `labels` `[B, S / P]` of this process's tokens, `next_sentence_label` `[B]` of the
            samples.
    """
    orders, is_word = batch["next_sentence_label"], batch["labels"] != IGNORED
    order_loss = F.cross_entropy(output.seq_relationship_logits, orders)
    right_words = output.prediction_logits.argmax(-1)[is_word] == batch["labels"][is_word]
    right_orders = output.seq_relationship_logits.argmax(-1) == orders
    words = [(output.loss - order_loss) * is_word.sum(), right_words.sum(), is_word.sum()]
    pairs = [order_loss * len(orders), right_orders.sum(), orders.ne(IGNORED).sum()]
    sums = torch.stack(
        [torch.stack([value.double() for value in values]) for values in (words, pairs)]
    )
    return accelerator.reduce(sums, "sum")  # type: ignore[no-any-return]


def means(totals: torch.Tensor) -> dict[str, float]:
    """Returns losses and accuracies from `sums`."""
    mlm, sop = (totals / totals[:, 2:].clamp(min=1)).tolist()
    return {
        "loss": mlm[0] + sop[0],
        "mlm_loss": mlm[0],
        "sop_loss": sop[0],
        "mlm_accuracy": mlm[1],
        "sop_accuracy": sop[1],
        "masked_words": totals[0, 2].item(),
    }


class Log:
    """Counts steps and writes one line of JSON for each."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator) -> None:
        self.args, self.accelerator, self.step = args, accelerator, 0
        self.file = Path(args.output) / "metrics.jsonl"
        self.started = time.perf_counter()
        if accelerator.is_main_process:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text("")

    def add(self, measured: dict[str, float]) -> None:
        self.step += 1
        seconds, self.started = time.perf_counter() - self.started, time.perf_counter()
        if not self.accelerator.is_main_process:
            return
        with self.file.open("a") as file:
            file.write(json.dumps({"step": self.step, **measured, "seconds": seconds}) + "\n")
        if self.step % self.args.print_every == 0 or self.step == self.args.steps:
            print(f"step {self.step}: {told(measured)}", flush=True)


def told(measured: dict[str, float]) -> str:
    return (
        f"loss {measured['loss']:.4f} (masked words {measured['mlm_loss']:.4f}, order "
        f"{measured['sop_loss']:.4f}), "
        f"right words {measured['mlm_accuracy']:.1%}, right orders {measured['sop_accuracy']:.1%}"
    )


def save(
    accelerator: Accelerator,
    model: Any,
    tokenizer: Any,
    output: Path,
    before: dict[str, float],
    after: dict[str, float],
) -> None:
    """Writes the model as transformers reads it, and the held-out measures."""
    weights = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return
    accelerator.unwrap_model(model).save_pretrained(output / "model", state_dict=weights)
    tokenizer.save_pretrained(output / "model")
    (output / "summary.json").write_text(
        json.dumps({"held_out_before": before, "held_out_after": after})
    )
    print(
        f"held out, before: {told(before)}\nheld out, after:  {told(after)}\nmodel in "
        f"{output / 'model'}"
    )


def make_model(args: argparse.Namespace, tokenizer: Any) -> BertForPreTraining:
    """Returns a new BERT of the given size, or one that was saved."""
    dtype = getattr(torch, args.dtype)
    if args.model is not None:
        model = BertForPreTraining.from_pretrained(args.model, dtype=dtype)
        extend_positions(model, args.max_positions)
        return model
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=4 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=args.max_positions,
        hidden_dropout_prob=args.dropout,
        attention_probs_dropout_prob=args.dropout,
        pad_token_id=tokenizer.pad_token_id,
    )
    return BertForPreTraining(config).to(dtype)


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data-path", default="data/dataset", help="the data set that prepare.py wrote")
    add("--vocab-path", default="data/vocab", help="the tokenizer that prepare.py wrote")
    add(
        "--output", default="runs/bert", help="folder for metrics.jsonl, summary.json and the model"
    )
    add(
        "--sp-size",
        type=int,
        help="ranks that share one sequence by heads; the launcher's setting counts without it",
    )
    add(
        "--cp-size",
        type=int,
        help="ranks that share one sequence in a ring; the launcher's setting counts without it",
    )
    add("--model", help="a BERT to go on from, instead of a new one of the sizes that follow")
    add("--hidden-size", type=int, default=128)
    add("--layers", type=int, default=2)
    add("--heads", type=int, default=4)
    add(
        "--max-positions",
        type=int,
        default=512,
        help="of the position table; at least prepare.py's --sequence-length",
    )
    add("--dropout", type=float, default=0.1)
    add("--dtype", choices=["float32", "float64"], default="float32", help="of the weights")
    add("--mixed-precision", choices=["no", "bf16", "fp16"], default="no")
    add(
        "--batch-size",
        type=int,
        default=8,
        help="pairs of one batch of the ranks that share sequences",
    )
    add("--steps", type=int, default=100)
    add("--learning-rate", type=float, default=1e-3)
    add("--weight-decay", type=float, default=0.01)
    add("--max-grad-norm", type=float, default=1.0)
    add("--print-every", type=int, default=10)
    add("--seed", type=int, default=42)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
