"""Real texts, a tokenizer and a tiny model for the two jobs; the texts are Python's standard
library.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[1] / "alst"))
from data import load_documents


def documents(count: int, length: int) -> list[str]:
    """Returns the beginnings of documents, `length` letters each at most."""
    return [text[:length] for text in load_documents(["stdlib"])[:count]]


def pairs(texts: list[str]) -> Dataset:
    """Returns preferences: a document's continuation is better than the next one's."""
    half = min(len(text) for text in texts) // 2
    continuations = [text[half:] for text in texts]
    return Dataset.from_dict(
        {
            "prompt": [text[:half] for text in texts],
            "chosen": continuations,
            "rejected": continuations[1:] + continuations[:1],
        }
    )


def make_tokenizer() -> Any:
    """Returns a tokenizer of one token for each byte."""
    return ByT5Tokenizer(extra_ids=0)


def make_model(tokenizer: Any) -> LlamaForCausalLM:
    """Returns a byte-level Llama that is built here."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)
