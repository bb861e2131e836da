"""Trains an encoder whose pooled vectors find the text that goes on from another, among those of
all others.

    torchrun --nproc_per_node 2 examples/embedding/train.py --sp-size 2    # on CPU or GPU
    torchrun --nproc_per_node 4 examples/embedding/train.py --sp-size 2    # two data parallel groups

Every text is sharded over `--sp-size` × `--cp-size` ranks. `embed` pools it, padding left out, in
one exchange of a vector for each text; `contrastive_loss` compares it with the texts of all data
parallel groups.
"""

from __future__ import annotations

import argparse
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel

from ulysses_accel import ParallelismConfig, all_gather, pool_sequence

sys.path.append(str(Path(__file__).parents[1] / "alst"))

from data import load_documents, split_documents

VOCABULARY, PADDING, SCALE = 4096, 0, 20.0
Pair = tuple[Tensor, Tensor]


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(
        parallelism_config=ParallelismConfig(sp_size=args.sp_size, cp_size=args.cp_size)
    )
    set_seed(args.seed)
    training, held_out = split_documents(load_documents(args.data), args.eval_documents, args.seed)
    model = make_model(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    pairs = [pair for document in training for pair in pairs_of(document, args.sequence_length)]
    # One of each, so that no other is right.
    questions = [next(pairs_of(document, args.sequence_length)) for document in held_out]
    loader = DataLoader(
        pairs, batch_size=args.batch_size, shuffle=True, drop_last=True, collate_fn=collate
    )  # type: ignore[arg-type]
    eval_loader = DataLoader(questions, batch_size=len(questions), collate_fn=collate)  # type: ignore[arg-type]
    model, optimizer, loader, eval_loader = accelerator.prepare(
        model, optimizer, loader, eval_loader
    )
    before = accuracy(accelerator, model, eval_loader, args.pooling)
    model.train()
    for step, batch in zip(range(1, args.steps + 1), endless(loader)):
        loss = contrastive_loss(accelerator, embed(accelerator, model, batch, args.pooling))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            accelerator.print(f"step {step}: loss {loss.item():.4f}")
    after = accuracy(accelerator, model, eval_loader, args.pooling)
    accelerator.print(
        f"found of {len(questions)} held-out texts: {before:.0%} before, {after:.0%} after"
    )
    accelerator.end_training()


def embed(accelerator: Accelerator, model: Any, batch: dict[str, Any], pooling: Any) -> Tensor:
    """Returns a unit vector for each text `[B, D]`, the same on every rank that shares the
    texts.
    """
    hidden = model(**batch).last_hidden_state
    # [B, S/P, D] -> [B, D]
    pooled = pool_sequence(
        hidden, batch["sequence_description"], accelerator.sequence_parallel.group, pooling
    )
    return F.normalize(pooled, dim=-1)


def contrastive_loss(accelerator: Accelerator, vectors: Tensor) -> Tensor:
    """Returns the loss of finding what goes on from each text in all groups' batches."""
    mesh = accelerator.torch_device_mesh
    vectors = vectors[None]
    if "dp_replicate" in mesh.mesh_dim_names:
        vectors = all_gather(vectors, mesh["dp_replicate"].get_group())
    firsts, seconds = vectors.chunk(2, dim=1)
    scores = firsts.flatten(0, 1) @ seconds.flatten(0, 1).T
    return F.cross_entropy(scores * SCALE, torch.arange(len(scores), device=scores.device))


@torch.no_grad()
def accuracy(accelerator: Accelerator, model: Any, loader: Any, pooling: str) -> float:
    """Returns the share of texts to which the one that goes on is the nearest; the loader gives all
    in one batch.
    """
    model.eval()
    firsts, seconds = embed(accelerator, model, next(iter(loader)), pooling).chunk(2)
    is_nearest = (firsts @ seconds.T).argmax(dim=1) == torch.arange(
        len(firsts), device=firsts.device
    )
    return float(is_nearest.float().mean())


def make_model(args: Any) -> BertModel:
    """Returns a BERT of 0.4 million parameters; `AutoModel.from_pretrained(path)` is used in the
    same way.
    """
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=args.sequence_length,
        pad_token_id=PADDING,
    )
    return BertModel(config, add_pooling_layer=False)


def pairs_of(document: str, length: int) -> Iterator[Pair]:
    """Yields runs of `length` words of a document, each with the next; a word's token is a hash of
    it.
    """
    words = re.findall(r"[a-z]{3,}", document.lower())
    tokens = torch.tensor([zlib.crc32(word.encode()) % (VOCABULARY - 1) + 1 for word in words])
    for both in tokens.split(2 * length):
        first, second = both.tensor_split(2)
        yield first, second


def collate(pairs: list[Pair]) -> dict[str, Tensor]:
    """Returns a batch of all texts and then all that go on from them, padded on the right."""
    texts = [first for first, _ in pairs] + [second for _, second in pairs]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=PADDING)
    return {"input_ids": ids, "attention_mask": (ids != PADDING).long()}


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
    add("--sp-size", type=int, default=2, help="ranks that share a text by Ulysses")
    add("--cp-size", type=int, default=1, help="ranks that share a text by a ring")
    add("--pooling", choices=["first", "last", "mean", "max"], default="mean")
    add("--sequence-length", type=int, default=256, help="most tokens of a text")
    add("--batch-size", type=int, default=16, help="pairs in a data parallel group's batch")
    add("--eval-documents", type=int, default=64)
    add("--learning-rate", type=float, default=1e-3)
    add("--steps", type=int, default=40)
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.sp_size * args.cp_size == 1:
        parser.error("--sp-size 1 and --cp-size 1 share no text. Use 2 or more of either.")
    return args


if __name__ == "__main__":
    main()
