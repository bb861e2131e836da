"""How a loss uses labels, read from forwards of every form that transformers' models have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import transformers as hf
from torch import nn
from torch.nn import CrossEntropyLoss

from tests.helpers.architectures import ENCODER_DECODER, GROUPED, SIZES
from ulysses_accel.introspection.loss import LossUse, read_loss
from ulysses_accel.introspection.sample_heads import ANSWERS
from ulysses_accel.introspection.structure import ModelReading

NEXT, OWN_MEAN, OWN = (
    LossUse("next_token", True),
    LossUse("same_token", False),
    LossUse("same_token", True),
)
WHOLE = LossUse("whole", False)
MOONSHINE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "encoder_num_hidden_layers": 1,
    "decoder_num_hidden_layers": 1,
    "encoder_num_attention_heads": 4,
    "decoder_num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


@pytest.mark.parametrize(
    ("model", "config", "expected"),
    [
        (hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED), NEXT),
        (hf.LlamaForTokenClassification, hf.LlamaConfig(**GROUPED), OWN_MEAN),
        (hf.BertForMaskedLM, hf.BertConfig(**SIZES), OWN_MEAN),
        (hf.BertForTokenClassification, hf.BertConfig(**SIZES), OWN_MEAN),
        (hf.BertLMHeadModel, hf.BertConfig(**SIZES, is_decoder=True), NEXT),
        (hf.ModernBertForMaskedLM, hf.ModernBertConfig(**SIZES), OWN),
        (
            hf.DistilBertForMaskedLM,
            hf.DistilBertConfig(vocab_size=64, dim=32, n_layers=1, n_heads=4),
            OWN_MEAN,
        ),
        (hf.BartForConditionalGeneration, hf.BartConfig(**ENCODER_DECODER), OWN_MEAN),
        # Its decoder's inputs are shifted, so it passes the labels on as if they were.
        (hf.MoonshineForConditionalGeneration, hf.MoonshineConfig(**MOONSHINE), OWN),
        (hf.BertModel, hf.BertConfig(**SIZES), None),
        (hf.BertForSequenceClassification, hf.BertConfig(**SIZES), WHOLE),
        (hf.BertForNextSentencePrediction, hf.BertConfig(**SIZES), WHOLE),
        (hf.LlamaForSequenceClassification, hf.LlamaConfig(**GROUPED), WHOLE),
        (
            hf.BertForQuestionAnswering,
            hf.BertConfig(**SIZES),
            replace(WHOLE, needs=ANSWERS),
        ),
        (
            hf.BertForPreTraining,
            hf.BertConfig(**SIZES),
            replace(OWN_MEAN, needs=("labels", "next_sentence_label")),
        ),
    ],
)
def test_what_models_do(model: Any, config: Any, expected: LossUse | None) -> None:
    assert read_loss(ModelReading(model(config))) == expected


@pytest.mark.parametrize(
    ("model", "config", "text"),
    [
        (hf.BertForMultipleChoice, hf.BertConfig(**SIZES), "is not one of each token"),
        (
            hf.ElectraForPreTraining,
            hf.ElectraConfig(**SIZES),
            "its loss (BCEWithLogitsLoss) is not one mean over",
        ),
        (
            hf.BartForQuestionAnswering,
            hf.BartConfig(**ENCODER_DECODER),
            "it looks for answers in a way",
        ),
    ],
)
def test_losses_of_another_kind_are_named(model: Any, config: Any, text: str) -> None:
    found = read_loss(ModelReading(model(config)))
    assert isinstance(found, list)
    assert text in str(found[-1])
    assert found[-1].kind == "loss"


class Body(nn.Module):
    loss_type = None


class Shifts(Body):
    def forward(self, hidden: Any, labels: Any = None) -> Any:
        logits = hidden[:, :-1]
        return CrossEntropyLoss()(logits.view(-1, logits.size(-1)), labels.view(-1))


class Weighs(Body):
    def forward(self, hidden: Any, labels: Any = None) -> Any:
        loss_fct = CrossEntropyLoss(label_smoothing=0.1)
        return loss_fct(hidden.view(-1, hidden.size(-1)), labels.view(-1))


class Names(Body):
    def forward(self, hidden: Any, labels: Any = None) -> Any:
        loss_fct = CrossEntropyLoss(ignore_index=-100)
        return loss_fct(hidden.view(-1, hidden.size(-1)), labels.view(-1))


class Child(Names):
    def forward(self, hidden: Any, labels: Any = None, **kwargs: Any) -> Any:
        return super().forward(hidden, labels=labels)


class First(nn.Module):
    def forward(self, hidden: Any) -> Any:
        return hidden[:, 0]


class Adds(Body):
    _can_set_attn_implementation = None

    def __init__(self, num_poolers: int = 1) -> None:
        super().__init__()
        self.config = hf.BertConfig()
        self.poolers = nn.ModuleList(First() for _ in range(num_poolers))

    def forward(self, hidden: Any, labels: Any = None, next_sentence_label: Any = None) -> Any:
        loss_fct = CrossEntropyLoss()
        of_tokens = loss_fct(hidden.view(-1, hidden.size(-1)), labels.view(-1))
        of_samples = loss_fct(self.poolers[0](hidden).view(-1, 2), next_sentence_label.view(-1))
        return of_tokens + of_samples


class AddsTwice(Adds):
    def forward(self, hidden: Any, labels: Any = None, next_sentence_label: Any = None) -> Any:
        loss_fct = CrossEntropyLoss()
        of_tokens = loss_fct(hidden.view(-1, hidden.size(-1)), labels.view(-1))
        of_samples = loss_fct(self.poolers[0](hidden).view(-1, 2), next_sentence_label.view(-1))
        return of_tokens + of_samples + of_samples


class WeighsOne(Adds):
    def forward(self, hidden: Any, labels: Any = None, next_sentence_label: Any = None) -> Any:
        loss_fct = CrossEntropyLoss()
        of_tokens = loss_fct(hidden.view(-1, hidden.size(-1)), labels.view(-1))
        of_samples = loss_fct(self.poolers[0](hidden).view(-1, 2), next_sentence_label.view(-1))
        return of_tokens + 2 * of_samples


@pytest.mark.parametrize(
    ("module", "is_known"),
    [(Adds(), True), (Adds(0), False), (AddsTwice(), False), (WeighsOne(), False)],
)
def test_only_a_plain_sum_of_two_losses_is_known(module: Body, is_known: bool) -> None:
    found = read_loss(ModelReading(module))
    assert (found == replace(OWN_MEAN, needs=("labels", "next_sentence_label"))) is is_known
    assert is_known or isinstance(found, list)


@pytest.mark.parametrize(
    ("module", "is_known"), [(Shifts(), False), (Weighs(), False), (Names(), True), (Child(), True)]
)
def test_details_decide(module: Body, is_known: bool) -> None:
    found = read_loss(ModelReading(module))
    assert (found == OWN_MEAN) is is_known
    assert is_known or isinstance(found, list)
