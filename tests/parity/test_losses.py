"""Losses of whole samples and of tokens, on heads of transformers' own classes, against one process
in float64.

Tolerance 1e-12, for the reason that `jobs` states. A padded row of a question-answering batch is
compared with the row alone: there padding is no answer, while one process counts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.helpers.architectures import GROUPED, NO_DROPOUT, SIZES, Batch, InDouble
from tests.helpers.parity_jobs import (
    EXACT,
    Engine,
    Grads,
    compare,
    data_rank,
    full_gradients,
    zero_gradients,
)
from tests.helpers.ranks import run_ranks
from ulysses_accel import ParallelismConfig, supports

# Data parallel, ring and Ulysses degree, and how the table of what is supported calls them.
LAYOUTS = {(1, 1, 2): "sp", (1, 2, 1): "cp", (1, 2, 2): "cp × sp", (2, 1, 2): "dp × sp"}
LENGTH = 16
# Of 4 ranks each holds a last token, and the start or the end of an answer; contiguous or in zigzag
# order.
LENGTHS = (3, 7, 11, 16)
SPANS = ((0, 2), (3, 6), (9, 10), (5, 15))
IGNORE = -100
# DeepSpeed keeps gradients in float32: some hundred of its roundings, where a wrong scale is off by
# 1e-2 at least.
FLOAT32 = 1e-5
CODE = "accelerator.prepare({}.from_pretrained(path), loader)"


@dataclass(frozen=True)
class Head:
    """One class with a head.

    Args:
        model: transformers' class.
        config: of the model.
        task: `classes`, `regression`, `several` (labels), `answers`, `tokens`, or the name of a
            sentence's label beside those of tokens.
        cases: kinds of batches.
    """

    model: Any
    config: Any
    task: str
    cases: tuple[str, ...] = ("right", "odd")


ENCODER = {**SIZES, **NO_DROPOUT}
DISTIL: dict[str, Any] = {
    "vocab_size": 64,
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "dropout": 0.0,
}
DISTIL |= {"attention_dropout": 0.0, "seq_classif_dropout": 0.0, "qa_dropout": 0.0}
GPT2: dict[str, Any] = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "pad_token_id": 0,
}
GPT2 |= {
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODERN = {**SIZES, "local_attention": 10, "global_attn_every_n_layers": 2, "num_labels": 3}
LEFT = ("left", "right")
HEADS: dict[str, Head] = {
    "LlamaForSequenceClassification": Head(
        hf.LlamaForSequenceClassification, hf.LlamaConfig(**GROUPED, num_labels=3), "classes", LEFT
    ),
    "Qwen3ForSequenceClassification": Head(
        hf.Qwen3ForSequenceClassification, hf.Qwen3Config(**GROUPED, num_labels=3), "several", LEFT
    ),
    "GPT2ForSequenceClassification": Head(
        hf.GPT2ForSequenceClassification, hf.GPT2Config(**GPT2, num_labels=1), "regression"
    ),
    "BertForSequenceClassification": Head(
        hf.BertForSequenceClassification, hf.BertConfig(**ENCODER, num_labels=3), "classes"
    ),
    "RobertaForSequenceClassification": Head(
        hf.RobertaForSequenceClassification,
        hf.RobertaConfig(**{**ENCODER, "pad_token_id": 3}),
        "classes",
    ),
    "DistilBertForSequenceClassification": Head(
        hf.DistilBertForSequenceClassification, hf.DistilBertConfig(**DISTIL), "classes"
    ),
    "ModernBertForSequenceClassification": Head(
        hf.ModernBertForSequenceClassification,
        hf.ModernBertConfig(**MODERN, classifier_pooling="mean"),
        "classes",
        LEFT,
    ),
    "LlamaForQuestionAnswering": Head(
        hf.LlamaForQuestionAnswering, hf.LlamaConfig(**GROUPED), "answers"
    ),
    "BertForQuestionAnswering": Head(
        hf.BertForQuestionAnswering, hf.BertConfig(**ENCODER), "answers"
    ),
    "ModernBertForQuestionAnswering": Head(
        hf.ModernBertForQuestionAnswering,
        hf.ModernBertConfig(**{**MODERN, "num_labels": 2}),
        "answers",
        ("plain", "odd"),
    ),
    "BertForNextSentencePrediction": Head(
        hf.BertForNextSentencePrediction, hf.BertConfig(**ENCODER), "classes"
    ),
    "BertForPreTraining": Head(
        hf.BertForPreTraining, hf.BertConfig(**ENCODER), "next_sentence_label"
    ),
    "AlbertForPreTraining": Head(
        hf.AlbertForPreTraining,
        hf.AlbertConfig(**ENCODER, embedding_size=16, classifier_dropout_prob=0.0),
        "sentence_order_label",
    ),
    "LlamaForTokenClassification": Head(
        hf.LlamaForTokenClassification,
        hf.LlamaConfig(**GROUPED, num_labels=3, classifier_dropout=0.0),
        "tokens",
    ),
}
# What reads something else than the others.
EACH_KIND = (
    "LlamaForSequenceClassification",
    "BertForSequenceClassification",
    "RobertaForSequenceClassification",
    "ModernBertForSequenceClassification",
    "BertForQuestionAnswering",
    "BertForPreTraining",
    "AlbertForPreTraining",
    "LlamaForTokenClassification",
)


def build(name: str) -> Any:
    """Returns a model in float64 and training mode; the same call gives the same weights in every
    process.
    """
    torch.manual_seed(0)
    head = HEADS[name]
    model: nn.Module = head.model._from_config(head.config, attn_implementation="sdpa").double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train()


def make_batch(name: str, case: str, seed: int) -> Batch:
    """Returns four rows as a user's loader gives them."""
    head = HEADS[name]
    generator = torch.Generator().manual_seed(seed)
    length = 13 if case == "odd" else LENGTH
    ids = torch.randint(8, 60, (4, length), generator=generator)
    batch: Batch = {"input_ids": ids}
    if case in ("left", "right"):
        places = torch.arange(length)
        short = torch.tensor(LENGTHS)[:, None]
        mask = (places < short if case == "right" else places >= length - short).long()
        padding = getattr(head.config, "pad_token_id", None) or 0
        batch = {"input_ids": ids.masked_fill(mask == 0, padding), "attention_mask": mask}
    return {**batch, **make_labels(head, batch, generator)}


def make_labels(head: Head, batch: Batch, generator: torch.Generator) -> Batch:
    """Returns the labels of a head's task."""
    rows, length = batch["input_ids"].shape
    if head.task == "answers":
        starts, ends = torch.tensor(SPANS).clamp(max=length - 1).T
        return {"start_positions": starts.contiguous(), "end_positions": ends.contiguous()}
    if head.task == "regression":
        return {"labels": torch.randn(rows, generator=generator, dtype=torch.float64)}
    if head.task == "several":
        return {"labels": torch.randint(0, 2, (rows, 3), generator=generator).double()}
    classes = torch.randint(0, 2, (rows,), generator=generator)
    if head.task == "classes":
        return {"labels": classes}
    unseen = torch.rand(rows, length, generator=generator) < 0.5
    unseen |= batch.get("attention_mask", torch.ones(rows, length)) == 0
    labels = torch.randint(0, 3, (rows, length), generator=generator).masked_fill(unseen, IGNORE)
    return {"labels": labels} if head.task == "tokens" else {"labels": labels, head.task: classes}


def parts_of(name: str, case: str, seed: int) -> list[Batch]:
    """Returns what one process is given: the batch, or where answers must not be padding each row
    alone.
    """
    batch = make_batch(name, case, seed)
    if HEADS[name].task != "answers" or "attention_mask" not in batch:
        return [batch]
    found = []
    for row, length in enumerate(LENGTHS):
        alone = {
            key: value[row : row + 1] for key, value in batch.items() if key != "attention_mask"
        }
        found.append({**alone, "input_ids": alone["input_ids"][:, :length]})
    return found


@dataclass(frozen=True)
class Expected:
    losses: list[float]
    logits: list[Tensor]
    grads: Grads


def expected_of(name: str, case: str, dp_size: int) -> Expected:
    """Returns one process's losses of each data parallel rank's batch, and the gradients of their
    mean.
    """
    model = build(name)
    zero_gradients(model)
    losses, logits = [], []
    with InDouble():
        for seed in range(dp_size):
            outputs = [model(**part) for part in parts_of(name, case, seed)]
            loss = torch.stack([output.loss for output in outputs]).mean()
            (loss / dp_size).backward()
            losses.append(float(loss.detach()))
            logits.append(
                outputs[0].logits.detach()
                if HEADS[name].task in ("classes", "several")
                else torch.zeros(0)
            )
    return Expected(
        losses, logits, {key: value.grad.clone() for key, value in used_parameters(model)}
    )


def used_parameters(model: nn.Module) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in model.named_parameters() if value.grad is not None]


def unused() -> Any:
    from accelerate.utils import DistributedDataParallelKwargs

    # A pooler that no head reads.
    return DistributedDataParallelKwargs(find_unused_parameters=True)


def first(samples: list[Batch]) -> Batch:
    return samples[0]


def loader(name: str, cases: list[str], dp_size: int) -> DataLoader[Any]:
    batches: Any = [make_batch(name, case, seed) for case in cases for seed in range(dp_size)]
    return DataLoader(batches, batch_size=1, collate_fn=first)


def run_layout(
    plans: dict[str, dict[str, Expected]], layout: tuple[int, int, int]
) -> dict[str, list[float]]:
    dp_size, cp_size, sp_size = layout
    accelerator, found = (
        Engine("ddp").accelerator(sp_size, dp_size, cp_size=cp_size, kwargs_handlers=[unused()]),
        {},
    )
    for name, cases in plans.items():
        model, batches = accelerator.prepare(build(name), loader(name, list(cases), dp_size))
        found.update(steps(accelerator, model, batches, name, cases, cp_size * sp_size))
    return found


def steps(
    accelerator: Any,
    model: Any,
    batches: Any,
    name: str,
    cases: dict[str, Expected],
    num_shards: int,
) -> dict[str, list[float]]:
    """Returns each case's errors, and how many tokens this rank computed of each that the sequence
    has.
    """
    inner = accelerator.unwrap_model(model)
    seen: list[int] = []
    gradients = keep_gradients(model)
    inner.get_input_embeddings().register_forward_hook(
        lambda _module, _args, output: seen.append(output.shape[1])
    )
    found = {}
    for (case, expected), batch in zip(cases.items(), batches, strict=True):
        zero_gradients(model)
        with InDouble() if inner.dtype == torch.float64 else nullcontext():
            output = model(**batch)
            accelerator.backward(output.loss)
        rank = data_rank(accelerator)
        grads = {key: value for key, value in gradients().items() if key in expected.grads}
        difference = compare(
            float(output.loss.detach()), grads, expected.losses[rank], expected.grads
        )
        logits = expected.logits[rank]
        off = float((output.logits - logits).abs().max()) if logits.numel() else 0.0
        share = seen.pop() / make_batch(name, case, 0)["input_ids"].shape[1] * num_shards
        found[f"{name}: {case}"] = [
            difference.loss,
            difference.grad,
            abs(difference.ratio),
            off,
            share,
        ]
    return found


def keep_gradients(model: Any) -> Callable[[], Grads]:
    """Returns what gives the gradients of the last backward; DeepSpeed's are gone once its engine
    made the step.
    """
    if not hasattr(model, "zero_optimization"):
        return lambda: full_gradients_of(model)
    kept: list[Grads] = []
    step = model.step

    def keep_and_step() -> None:
        kept.append(full_gradients(model))
        step()

    model.step = keep_and_step
    return kept.pop


def full_gradients_of(model: Any) -> Grads:
    """Returns whole gradients, zeros for parameters that the loss doesn't depend on."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return full_gradients(model)


def check(reports: list[dict[str, list[float]]], count: int, tolerance: float = EXACT) -> None:
    for report in reports:
        assert len(report) == count
        assert {
            case: errors for case, errors in report.items() if not max(errors[:4]) <= tolerance
        } == {}
        # 13 tokens are padded to 16.
        assert {
            case: errors[4] for case, errors in report.items() if not 1.0 <= errors[4] <= 1.3
        } == {}


@pytest.fixture(scope="module")
def plans() -> dict[int, dict[str, dict[str, Expected]]]:
    two = ParallelismConfig(sp_size=2)
    # Also reads the sources of all models before the fork.
    assert {name: found for name in HEADS if (found := supports(build(name), two))} == {}
    names = {1: HEADS, 2: EACH_KIND}
    return {
        dp_size: {
            name: {case: expected_of(name, case, dp_size) for case in HEADS[name].cases}
            for name in names[dp_size]
        }
        for dp_size in names
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads(
    plans: dict[int, dict[str, dict[str, Expected]]], layout: tuple[int, int, int], support: Any
) -> None:
    names = HEADS if math.prod(layout) == 2 else EACH_KIND
    plan = {name: plans[layout[0]][name] for name in names}
    check(
        run_ranks(run_layout, math.prod(layout), plan, layout, init=False),
        sum(map(len, plan.values())),
    )
    for name in names:
        support("loss", name, LAYOUTS[layout], code=CODE.format(name))


ENGINES = {"FSDP2": Engine("fsdp2"), "ZeRO-2": Engine("deepspeed", stage=2)}
SHARDED = {
    "FSDP2": ("LlamaForSequenceClassification", "LlamaForQuestionAnswering"),
    "ZeRO-2": ("LlamaForSequenceClassification", "BertForPreTraining"),
}


def run_engine(plans: dict[str, dict[str, Expected]], engine: str) -> dict[str, list[float]]:
    found = {}
    for name, cases in plans.items():
        accelerator = ENGINES[engine].accelerator(2)
        model = build(name).to(torch.float32 if engine.startswith("ZeRO") else torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        model, batches, _ = accelerator.prepare(model, loader(name, list(cases), 1), optimizer)
        found.update(steps(accelerator, model, batches, name, cases, 2))
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_engines(
    plans: dict[int, dict[str, dict[str, Expected]]], engine: str, support: Any
) -> None:
    plan = {name: {"right": plans[1][name]["right"]} for name in SHARDED[engine]}
    tolerance = FLOAT32 if engine.startswith("ZeRO") else EXACT
    check(run_ranks(run_engine, 2, plan, engine, init=False), len(plan), tolerance)
    for name in plan:
        support("loss", name, "sp", code=CODE.format(name), engine=engine)
