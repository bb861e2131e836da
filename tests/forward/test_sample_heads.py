"""What stands behind a model's layers: which heads are known, which batches they refuse, and what
they give back.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.utils.data import DataLoader

from tests.helpers.architectures import GROUPED, NO_DROPOUT, SIZES, Batch, InDouble
from tests.helpers.engine_jobs import error_of
from tests.helpers.parity_jobs import EXACT, Engine, compare, zero_gradients
from tests.helpers.ranks import run_ranks
from tests.parity.test_losses import build, first, full_gradients_of, make_batch
from ulysses_accel import ParallelismConfig, count_items, supports
from ulysses_accel.introspection.loss import LossUse, read_loss
from ulysses_accel.introspection.sample_heads import first_token_modules, read_sample_head
from ulysses_accel.introspection.structure import ModelReading

ENCODER = {**SIZES, **NO_DROPOUT}


def without_weights(name: str, **sizes: Any) -> Any:
    cls = getattr(hf, name)
    with torch.device("meta"):
        return cls._from_config(cls.config_class(**{**SIZES, **sizes}))


@pytest.mark.parametrize(
    ("name", "reads", "answers"),
    [
        ("MistralForSequenceClassification", "logits", False),
        ("Gemma2ForSequenceClassification", "logits", False),
        ("OPTForSequenceClassification", "logits", False),
        ("XLMRobertaForSequenceClassification", "first", False),
        ("EsmForSequenceClassification", "first", False),
        ("AlbertForSequenceClassification", "nothing", False),
        ("ModernBertDecoderForSequenceClassification", "all", False),
        ("Qwen2ForQuestionAnswering", "logits", True),
        ("AlbertForQuestionAnswering", "logits", True),
        ("GPT2ForQuestionAnswering", "logits", True),
    ],
)
def test_heads_are_read_from_their_forward(name: str, reads: str, answers: bool) -> None:
    model = without_weights(name, **({"head_dim": 8} if "Gemma" in name else {}))
    head = read_sample_head(ModelReading(model))
    assert head is not None
    assert (head.reads, head.answers, len(head.linears)) == (reads, answers, int(reads == "logits"))
    assert head.base is model.base_model
    used = read_loss(ModelReading(model))
    assert isinstance(used, LossUse)
    assert used.labels == "whole"


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("BertForMultipleChoice", "is not one of each token"),
        ("RobertaForMultipleChoice", "is not one of each token"),
        ("ElectraForPreTraining", "its loss (BCEWithLogitsLoss) is not one mean over tokens"),
        ("BartForSequenceClassification", "is not one mean over tokens"),
        ("BartForQuestionAnswering", "it looks for answers in a way that is not known"),
    ],
)
def test_other_losses_are_refused_by_name(name: str, fact: str, support: Any) -> None:
    sizes = (
        {"d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
        if "Bart" in name
        else {}
    )
    findings = supports(without_weights(name, **sizes), ParallelismConfig(sp_size=2))
    assert [finding.kind for finding in findings if fact in finding.fact] == ["loss"]
    support.refused("loss", name, "sp", "its loss is neither one of tokens nor one of rows")
    support.refused("loss", name, "cp", "its loss is neither one of tokens nor one of rows")


class ReadsAnotherLayer(hf.BertForSequenceClassification):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        outputs = self.bert(input_ids, attention_mask=attention_mask, output_hidden_states=True)
        logits = self.classifier(outputs.hidden_states[-2][:, 0])
        problem_type = hf.modeling_outputs.SequenceClassifierOutput
        return problem_type(loss=self.loss_function(labels, logits, self.config), logits=logits)


class ReadsAnUnknownPooler(hf.BertForSequenceClassification):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert.pooler = torch.nn.AdaptiveAvgPool2d((1, None))


@pytest.mark.parametrize("model", [ReadsAnotherLayer, ReadsAnUnknownPooler])
def test_what_shards_cant_give_is_no_known_head(model: Any) -> None:
    with torch.device("meta"):
        built = model(hf.BertConfig(**ENCODER))
    assert read_sample_head(ModelReading(built)) is None
    assert isinstance(read_loss(ModelReading(built)), list)


@pytest.mark.parametrize(
    ("name", "picked"),
    [
        ("CLIPTextModel", "last_hidden_state[torch.arange("),
        ("SiglipTextModel", "last_hidden_state[:, -1, :]"),
        ("DPRContextEncoder", "sequence_output[:, 0, :]"),
        ("AltCLIPTextModel", "projection_state[:, 0]"),
    ],
)
def test_tokens_picked_in_unknown_ways_are_refused(name: str, picked: str, support: Any) -> None:
    findings = supports(without_weights(name), ParallelismConfig(cp_size=2))
    assert [
        "picks or mixes tokens by their place" in one.fact and picked in one.fact
        for one in findings
    ] == [True]
    support.refused(
        "model",
        f"{name}'s pooler_output",
        "cp",
        "picks tokens by their place in a way that is not known",
    )


def test_unknown_poolers_are_refused() -> None:
    two = ParallelismConfig(sp_size=2)
    model = without_weights("BertModel")
    assert supports(model, two) == supports(without_weights("AlbertForMaskedLM"), two) == []
    model.pooler = ReadsAnUnknownPooler(hf.BertConfig(**ENCODER)).bert.pooler
    (finding,) = supports(model, two)
    assert "picks or mixes tokens by their place (self.pooler(sequence_output))" in finding.fact
    assert "pool_sequence" in finding.remedy


def test_poolers_are_found() -> None:
    bert, albert = without_weights("BertModel"), without_weights("AlbertModel")
    assert [(one.module, one.is_cut) for one in first_token_modules(ModelReading(bert))] == [
        (bert.pooler, False)
    ]
    assert [(one.module, one.is_cut) for one in first_token_modules(ModelReading(albert))] == [
        (albert.pooler, True)
    ]
    assert first_token_modules(ModelReading(without_weights("LlamaModel"))) == ()


def loader(*batches: Batch) -> DataLoader[Any]:
    whole: Any = list(batches)
    return DataLoader(whole, batch_size=1, collate_fn=first)


def refusals() -> dict[str, str]:
    """Returns what is said of batches that a head can't be computed for, and how far the next good
    one is off.
    """
    llama, bert, modern = (
        "LlamaForSequenceClassification",
        "BertForSequenceClassification",
        "ModernBertForQuestion",
    )
    modern += "Answering"
    packed = make_batch(llama, "plain", 0)
    packed["position_ids"] = torch.cat([torch.arange(10), torch.arange(6)]).repeat(4, 1)
    embedded = make_batch(llama, "right", 0)
    embedded["inputs_embeds"] = torch.randn(4, 16, 32, dtype=torch.float64)
    del embedded["input_ids"]
    cases = {
        "packed": (llama, packed),
        "embedded": (llama, embedded),
        "pooled left": (bert, make_batch(bert, "left", 0)),
        "first left": ("DistilBertForSequenceClassification", make_batch(bert, "left", 0)),
        "mixed left": ("BertForPreTraining", make_batch("BertForPreTraining", "left", 0)),
        "padded answers": (modern, make_batch(modern, "right", 0)),
    }
    accelerator, found = Engine("ddp").accelerator(sp_size=2), {}
    for case, (name, batch) in cases.items():
        model, batches = accelerator.prepare(
            build(name), loader(batch, make_batch(name, "plain", 0))
        )
        refused, good = list(batches)
        found[case], plain = error_of(model, **refused), build(name)
        with InDouble():
            distance = abs(
                float(model(**good).loss) - float(plain(**make_batch(name, "plain", 0)).loss)
            )
        found[f"{case}, after"] = "" if distance <= EXACT else str(distance)
    return found


REFUSALS = {
    "packed": "row 0 of the batch holds 2 packed documents, but LlamaForSequenceClassification computes one loss for",
    "embedded": "is padded on the right and has inputs_embeds alone",
    "pooled left": "row 0 of the batch begins with padding, and BertPooler computes the loss from each row's first",
    "first left": "row 0 of the batch begins with padding, and DistilBertForSequenceClassification computes its loss",
    "mixed left": "row 0 of the batch begins with padding, and BertPooler computes the loss",
    "padded answers": "ModernBertForQuestionAnswering finds answers among all tokens in a way that padding can't",
}


def test_batches_that_a_head_cant_be_computed_for(support: Any) -> None:
    for found in run_ranks(refusals, 2, init=False):
        assert {
            case for case, message in found.items() if message and case.endswith("after")
        } == set()
        assert {case for case in REFUSALS if REFUSALS[case] not in found[case]} == set()
        assert all(found[case].startswith("BatchError: ") for case in REFUSALS)
    support.refused("loss", "sequence classification, packed rows", "sp", "one loss for each row")


def tiny_bert(**options: Any) -> Any:
    torch.manual_seed(0)
    return hf.BertModel._from_config(
        hf.BertConfig(**ENCODER, **options), attn_implementation="sdpa"
    ).double()


def pooled() -> dict[str, float | bool]:
    """Returns how far a base model's pooled output and its gradients are off, and what an uninstall
    leaves.
    """
    name = "BertForSequenceClassification"
    accelerator = Engine("ddp").accelerator(sp_size=1, cp_size=2)
    right, left = (make_batch(name, case, 0) for case in ("right", "left"))
    for batch in (right, left):
        del batch["labels"]
    model, batches = accelerator.prepare(tiny_bert(), loader(right, left))
    plain = tiny_bert()
    hooks = count_hooks(plain)
    first_batch, second_batch = list(batches)
    with InDouble():
        output, expected = model(**first_batch).pooler_output, plain(**right).pooler_output
        accelerator.backward(output.square().sum())
        expected.square().sum().backward()
        unknown = accelerator.unwrap_model(model)(**second_batch).pooler_output
    grads = {key: value.grad for key, value in plain.named_parameters() if value.grad is not None}
    own = {key: value for key, value in full_gradients_of(model).items() if key in grads}
    difference = compare(float(output.detach().sum()), own, float(expected.detach().sum()), grads)
    accelerator.sequence_parallel.close()
    return {
        "off": max(difference.loss, difference.grad, float((output - expected).abs().max())),
        # Three of the rows begin with padding.
        "unknown": unknown.isnan().all(dim=1).tolist() == [True, True, True, False],
        "hooks left": count_hooks(accelerator.unwrap_model(model)) - hooks,
    }


def count_hooks(model: Any) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def test_a_base_models_pooled_output(support: Any) -> None:
    for found in run_ranks(pooled, 2, init=False):
        assert found["off"] <= EXACT
        assert found["unknown"] is True
        assert found["hooks left"] == 0
    support("loss", "BertModel's pooler_output", "cp", code="model(**batch).pooler_output")


def accumulated(name: str) -> float:
    """Counts all rows of a step first, of which its two micro-steps have four and one."""
    whole = (
        make_batch(name, "plain", 0),
        {key: value[:1] for key, value in make_batch(name, "plain", 1).items()},
    )
    accelerator = Engine("ddp").accelerator(sp_size=2, steps=2)
    model, batches = accelerator.prepare(build(name), loader(*whole))
    local = list(batches)
    items = count_items(local, accelerator.sequence_parallel.groups.world_group)
    zero_gradients(model)
    total, plain = 0.0, build(name)
    with InDouble():
        for batch in local:
            with accelerator.accumulate(model):
                loss = model(**batch, num_items_in_batch=items).loss
                accelerator.backward(loss)
                total += float(loss.detach()) / 2
        together = {key: torch.cat([batch[key] for batch in whole]) for key in whole[0]}
        expected = plain(**together).loss
        expected.backward()
    grads = {key: value.grad for key, value in plain.named_parameters() if value.grad is not None}
    found = compare(total, full_gradients_of(model), float(expected.detach()), grads)
    return max(found.loss, found.grad)


def test_rows_are_counted_over_micro_steps() -> None:
    assert max(run_ranks(accumulated, 2, "LlamaForSequenceClassification", init=False)) <= EXACT


def with_dropout() -> list[Tensor]:
    """Returns the losses of a head whose dropout each rank draws for itself, and of outputs as
    tuples.
    """
    torch.manual_seed(0)
    config = hf.LlamaConfig(**GROUPED, num_labels=3)
    accelerator = Engine("ddp").accelerator(sp_size=2)
    bert = hf.BertConfig(**{**ENCODER, "classifier_dropout": 0.5}, num_labels=3)
    found = []
    for model in (
        hf.BertForSequenceClassification(bert),
        hf.LlamaForSequenceClassification(config),
    ):
        batch = make_batch("BertForSequenceClassification", "plain", 0)
        model, batches = accelerator.prepare(model.train(), loader(batch, batch))
        torch.manual_seed(accelerator.process_index)
        one, other = list(batches)
        output = accelerator.unwrap_model(model)(**other, return_dict=False)
        found += [model(**one).loss.detach(), output[0].detach(), output[1].detach()]
        accelerator.sequence_parallel.close()
        accelerator = Engine("ddp").accelerator(sp_size=2)
    return found


def padded_answers() -> list[str]:
    name = "BertForQuestionAnswering"
    model, batches = (
        Engine("ddp")
        .accelerator(sp_size=2)
        .prepare(build(name), loader(*[make_batch(name, "right", 0)] * 2))
    )
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for batch in batches:
            model(**batch)
    return [
        str(one.message)
        for one in caught
        if "no answer starts or ends in padding" in str(one.message)
    ]


def test_padded_answers_are_told_of_once() -> None:
    for (message,) in run_ranks(padded_answers, 2, init=False):
        assert message.startswith("BertForQuestionAnswering is given padded rows")


def test_every_rank_gets_the_same_loss() -> None:
    one, other = run_ranks(with_dropout, 2, init=False)
    assert [value.shape for value in one] == [(), (), (4, 3)] * 2
    for place in (0, 1, 3, 4, 5):
        torch.testing.assert_close(one[place], other[place], rtol=0, atol=1e-6)
    # The logits of which each rank has drawn its own dropout differ.
    assert not torch.equal(one[2], other[2])
