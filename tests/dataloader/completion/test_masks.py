"""4-D attention masks: those that say which documents a row has are read, all others are
refused.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from tests.helpers.architectures import IGNORE, Batch, InDouble, build
from tests.helpers.parity_jobs import EXACT, Engine, Grads, compare, zero_gradients
from tests.helpers.ranks import run_ranks
from tests.helpers.support import Support
from ulysses_accel.dataloader.batch_layout import BatchLayout
from ulysses_accel.dataloader.completion.complete import complete
from ulysses_accel.errors import BatchError
from ulysses_accel.introspection.requirements import rules_of
from ulysses_accel.sequence.batch_rules import BatchRules

TWO = BatchLayout(2)
CAUSAL, BOTH_WAYS = BatchRules(), BatchRules(labels="same_token", is_causal=False)


def mask_of(numbers: Tensor, is_causal: bool) -> Tensor:
    """Returns `[B, 1, S, S]` of bool from each token's document, 0 for padding."""
    sees = (numbers[:, :, None] == numbers[:, None, :]) & (numbers > 0)[:, None, :]
    return (sees.tril() if is_causal else sees)[:, None]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6), min_size=1, max_size=3),
    is_causal=st.booleans(),
    form=st.sampled_from(["bool", "int", "scores"]),
)
def test_documents_are_read_from_any_such_mask(
    rows: list[list[int]], is_causal: bool, form: str
) -> None:
    numbers = torch.zeros(len(rows), 12, dtype=torch.long)
    for row, lengths in zip(numbers, rows):
        start = 0
        for number, length in enumerate(lengths[:3]):
            # Documents of the lengths, with padding between them.
            row[start : start + length] = number + 1 if length else 0
            start += length + lengths[3 + number] % 2
    mask = mask_of(numbers, is_causal)
    scores = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    given_mask = {"bool": mask, "int": mask.long(), "scores": scores}[form]
    tokens = {"input_ids": torch.ones(len(rows), 12, dtype=torch.long)}
    read = complete(
        {**tokens, "attention_mask": given_mask}, TWO, CAUSAL if is_causal else BOTH_WAYS
    )
    expected = complete({**tokens, "attention_mask": numbers}, TWO)
    assert (read.description.rows, read.description.holes) == (
        expected.description.rows,
        expected.description.holes,
    )
    # One process counts through the row, whatever a 4-D mask says.
    assert read.tensors["position_ids"].equal(torch.arange(12).expand(len(rows), 12))


WINDOW = torch.ones(8, 8, dtype=torch.bool).tril() & ~torch.ones(8, 8, dtype=torch.bool).tril(-3)


@pytest.mark.parametrize(
    ("mask", "rules", "message"),
    [
        (
            WINDOW,
            CAUSAL,
            "not of documents that are seen up to each token: in row 0 token 3 does not see token "
            "0",
        ),
        (torch.ones(8, 8, dtype=torch.bool), CAUSAL, "in row 0 token 0 sees token 1"),
        (
            torch.ones(8, 8, dtype=torch.bool).tril(),
            BOTH_WAYS,
            "in full: in row 0 token 0 does not see token 1",
        ),
        (
            torch.ones(2, 8, 8, dtype=torch.bool).tril(),
            CAUSAL,
            r"of 4-D masks only \[batch, 1, S, S\] is read",
        ),
        (-torch.arange(64.0).reshape(8, 8), CAUSAL, "values that change scores .* the first -1.0"),
        (
            torch.ones(8, 8).bool().tril(),
            BatchRules(is_causal=None),
            "can't be read for this model",
        ),
        (
            torch.ones(8, 8).bool().tril(),
            BatchRules(counts_mask=True),
            "can't be read for this model",
        ),
        (torch.ones(8, 8).bool().tril(), BatchRules(merges=True), "can't be read for this model"),
    ],
)
def test_other_masks_are_refused(mask: Tensor, rules: BatchRules, message: str) -> None:
    batch = {
        "input_ids": torch.ones(1, 8, dtype=torch.long),
        "attention_mask": mask.reshape(1, -1, 8, 8),
    }
    with pytest.raises(BatchError, match=message):
        complete(batch, TWO, rules)


def test_models_say_whether_such_a_mask_fits_them() -> None:
    found = {
        name: rules_of(build(name)).is_causal
        for name in ("llama_dynamic", "bert", "gpt_oss", "bart")
    }
    assert found == {"llama_dynamic": True, "bert": False, "gpt_oss": None, "bart": None}


NUMBERS = torch.tensor([[1] * 5 + [2] * 11, [1] * 9 + [2] * 4 + [0] * 3])


def batch_of(name: str) -> Batch:
    tokens = torch.randint(8, 60, (2, 16), generator=torch.Generator().manual_seed(2))
    labels = tokens.masked_fill(NUMBERS == 0, IGNORE)
    if name != "bert":
        # A document's first token is no label, as for packed documents in any other form.
        labels[:, 1:].masked_fill_(NUMBERS[:, 1:] != NUMBERS[:, :-1], IGNORE)
    return {
        "input_ids": tokens,
        "attention_mask": mask_of(NUMBERS, name != "bert"),
        "labels": labels,
    }


def one_process(name: str) -> tuple[float, Grads]:
    model = build(name)
    with InDouble():
        loss = model(**batch_of(name)).loss
        loss.backward()
    return float(loss.detach()), {
        key: value.grad for key, value in model.named_parameters() if value.grad is not None
    }


def sharded(plans: dict[str, tuple[float, Grads]]) -> dict[str, float]:
    found = {}
    for name, (expected, grads) in plans.items():
        accelerator = Engine().accelerator(sp_size=1, cp_size=2)
        whole: Any = [batch_of(name)]
        model, batches = accelerator.prepare(
            build(name), DataLoader(whole, collate_fn=lambda samples: samples[0])
        )
        zero_gradients(model)
        with InDouble():
            loss = model(**next(iter(batches))).loss
            accelerator.backward(loss)
        own = {
            key: value.grad
            for key, value in accelerator.unwrap_model(model).named_parameters()
            if key in grads
        }
        difference = compare(float(loss.detach()), own, expected, grads)
        found[name] = max(difference.loss, difference.grad, abs(difference.ratio))
    return found


def test_a_mask_of_documents_against_one_process(support: Support) -> None:
    plans = {name: one_process(name) for name in ("llama_dynamic", "bert")}
    for rank in run_ranks(sharded, 2, plans, init=False):
        assert rank.keys() == plans.keys()
        assert max(rank.values()) <= EXACT
    support(
        "batch",
        "4-D mask of packed documents",
        "cp",
        code="model(**batch)  # attention_mask [B, 1, S, S]",
    )
    other = "[B, 1, S, S] masks of anything but documents"
    support.refused("batch", other, "cp", "the mask is not one of documents")
