"""Losses that a user's own loop makes of pooled vectors, or of two models' logits, against one
process in float64.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor
from torch.utils.data import DataLoader

from tests.helpers.architectures import GROUPED, NO_DROPOUT, SIZES, Batch, InDouble
from tests.helpers.parity_jobs import (
    EXACT,
    Engine,
    compare,
    data_rank,
    full_gradients,
    zero_gradients,
)
from tests.helpers.ranks import run_ranks
from ulysses_accel import aggregate_loss, all_gather, gather_sequence, pool_sequence
from ulysses_accel.sequence.gather import Pooling

# Data parallel, ring and Ulysses degree, and how the table of what is supported calls them.
LAYOUTS = {(1, 2, 1): "cp", (2, 1, 2): "dp × sp"}
LENGTH, PAIRS = 16, 2
# Tokens of each row: first the rows that are asked for, then their matches; a last token lies on
# each of 4 ranks.
LENGTHS = (3, 16, 11, 7)
POOLINGS: tuple[Pooling, ...] = ("first", "last", "mean", "max")
TEMPERATURE = 2.0


def spread(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def build_encoder() -> Any:
    torch.manual_seed(0)
    config = hf.BertConfig(**{**SIZES, **NO_DROPOUT})
    model = hf.BertModel._from_config(config, attn_implementation="sdpa", add_pooling_layer=False)
    return spread(model.double())


def build_causal(num_heads: int, seed: int) -> Any:
    torch.manual_seed(seed)
    config = hf.LlamaConfig(**{**GROUPED, "num_attention_heads": num_heads})
    return spread(hf.LlamaForCausalLM._from_config(config, attn_implementation="sdpa").double())


def pairs(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(8, 60, (2 * PAIRS, LENGTH), generator=generator).masked_fill(mask == 0, 0)
    return {"input_ids": ids, "attention_mask": mask}


def contrast(pooled: Tensor) -> Tensor:
    """Returns the loss of finding each row's match among all, `[n, 2 * PAIRS, D]` of n data
    parallel ranks.
    """
    asked, matches = F.normalize(pooled, dim=-1).chunk(2, dim=1)
    scores = asked.flatten(0, 1) @ matches.flatten(0, 1).T
    return F.cross_entropy(scores * 20, torch.arange(len(scores)))


def pooled_alone(hidden: Tensor, how: str) -> Tensor:
    rows = [row[:length] for row, length in zip(hidden, LENGTHS)]
    reduce = {
        "first": lambda row: row[0],
        "last": lambda row: row[-1],
        "mean": lambda row: row.mean(0),
    }
    return torch.stack([{**reduce, "max": lambda row: row.amax(0)}[how](row) for row in rows])


def expected_contrast(how: str, dp_size: int) -> tuple[float, dict[str, Tensor]]:
    model = build_encoder()
    with InDouble():
        hidden = [model(**pairs(seed)).last_hidden_state for seed in range(dp_size)]
        loss = contrast(torch.stack([pooled_alone(one, how) for one in hidden]))
        loss.backward()
    return float(loss.detach()), {
        name: parameter.grad.clone() for name, parameter in model.named_parameters()
    }


def first(samples: list[Batch]) -> Batch:
    return samples[0]


def loader(*batches: Batch) -> DataLoader[Any]:
    whole: Any = list(batches)
    return DataLoader(whole, batch_size=1, collate_fn=first)


def embed(
    plans: dict[str, tuple[float, dict[str, Tensor]]], layout: tuple[int, int, int]
) -> dict[str, list[float]]:
    dp_size, cp_size, sp_size = layout
    accelerator, found = Engine("ddp").accelerator(sp_size, dp_size, cp_size=cp_size), {}
    samples = [pairs(seed) for _ in plans for seed in range(dp_size)]
    model, batches = accelerator.prepare(build_encoder(), loader(*samples))
    for (how, (expected_loss, expected)), batch in zip(plans.items(), batches, strict=True):
        zero_gradients(model)
        description, group = batch["sequence_description"], accelerator.sequence_parallel.group
        with InDouble():
            hidden = model(**batch).last_hidden_state
            pooled = pool_sequence(hidden, description, group, how)[None]  # type: ignore[arg-type]
            if dp_size > 1:
                pooled = all_gather(
                    pooled, accelerator.torch_device_mesh["dp_replicate"].get_group()
                )
            loss = contrast(pooled)
            accelerator.backward(loss)
        difference = compare(float(loss.detach()), full_gradients(model), expected_loss, expected)
        share = hidden.shape[1] * cp_size * sp_size / LENGTH
        found[how] = [difference.loss, difference.grad, abs(difference.ratio), abs(share - 1)]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pooled_vectors_in_a_contrastive_loss(layout: tuple[int, int, int], support: Any) -> None:
    plans = {how: expected_contrast(how, layout[0]) for how in POOLINGS}
    for found in run_ranks(embed, math.prod(layout), plans, layout, init=False):
        assert set(found) == set(POOLINGS)
        assert {how: errors for how, errors in found.items() if not max(errors) <= EXACT} == {}
    for how in POOLINGS:
        code = f'pool_sequence(hidden, batch["sequence_description"], accelerator.sequence_parallel.group, "{how}")'
        support(
            "loss",
            f"embeddings, {how} token" + ("s" if how in ("mean", "max") else ""),
            LAYOUTS[layout],
            code=code,
        )


def tokens(seed: int, length: int) -> Batch:
    """Returns rows of which the second counts labels in its first half alone: a rank has none."""
    ids = torch.randint(8, 60, (2, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, 3 if seed % 2 else 9 :] = -100
    return {"input_ids": ids, "labels": labels}


def divergence(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    """Returns the mean over this rank's counted tokens of the divergence from the teacher."""
    ours, theirs = (F.log_softmax(logits / TEMPERATURE, dim=-1) for logits in (student, teacher))
    of_tokens = F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)
    return (of_tokens * counted).sum() / counted.sum().clamp(min=1)


LENGTHS_OF_STEPS = (16, 13)


def expected_distillation(dp_size: int) -> list[tuple[list[float], dict[str, Tensor]]]:
    student, teacher, found = build_causal(4, 0), build_causal(8, 1).eval(), []
    for step, length in enumerate(LENGTHS_OF_STEPS):
        zero_gradients(student)
        losses = []
        for rank in range(dp_size):
            batch = tokens(step * dp_size + rank, length)
            with InDouble():
                output = student(**batch)
                counted = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:] != -100
                with torch.no_grad():
                    logits = teacher(input_ids=batch["input_ids"]).logits
                loss = 0.5 * output.loss + 0.5 * divergence(output.logits, logits, counted)
                (loss / dp_size).backward()
            losses.append(float(loss.detach()))
        found.append(
            (
                losses,
                {name: parameter.grad.clone() for name, parameter in student.named_parameters()},
            )
        )
    return found


def distill(
    plan: list[tuple[list[float], dict[str, Tensor]]], layout: tuple[int, int, int]
) -> list[list[float]]:
    dp_size, cp_size, sp_size = layout
    accelerator = Engine("ddp").accelerator(sp_size, dp_size, cp_size=cp_size)
    samples = [
        tokens(step * dp_size + rank, n)
        for step, n in enumerate(LENGTHS_OF_STEPS)
        for rank in range(dp_size)
    ]
    student, batches = accelerator.prepare(build_causal(4, 0), loader(*samples))
    teacher = build_causal(8, 1).requires_grad_(False).eval()
    teacher = accelerator.prepare_model(teacher, evaluation_mode=True)
    found = []
    for (losses, grads), batch in zip(plan, batches, strict=True):
        zero_gradients(student)
        labels = batch["shift_labels"]
        with InDouble():
            output = student(**batch)
            with torch.no_grad():
                logits = teacher(
                    **{key: value for key, value in batch.items() if key != "shift_labels"}
                ).logits
            own = divergence(output.logits, logits, labels != -100)
            loss = 0.5 * output.loss + 0.5 * aggregate_loss(
                own, labels, accelerator.sequence_parallel.group
            )
            accelerator.backward(loss)
        expected = losses[data_rank(accelerator)]
        difference = compare(float(loss.detach()), full_gradients(student), expected, grads)
        whole = gather_sequence(
            logits, batch["sequence_description"], accelerator.sequence_parallel.group
        )
        assert whole.shape[1] == logits.shape[1] * cp_size * sp_size <= LENGTH
        found.append([difference.loss, difference.grad, abs(difference.ratio)])
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_student_of_a_sharded_teacher_with_other_heads(
    layout: tuple[int, int, int], support: Any
) -> None:
    plan = expected_distillation(layout[0])
    for found in run_ranks(distill, math.prod(layout), plan, layout, init=False):
        assert len(found) == len(LENGTHS_OF_STEPS)
        assert max(map(max, found)) <= EXACT
    code = 'aggregate_loss(kl, batch["shift_labels"], accelerator.sequence_parallel.group)'
    support("loss", "distillation from a sharded teacher", LAYOUTS[layout], code=code)
