"""The tiled loss inside of transformers models: the same loss and gradients, and no logits."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from tests.helpers.models import VOCAB, build
from tests.helpers.parity_jobs import EXACT, FLOOR
from ulysses_accel.errors import ConfigError, UnsupportedModelError
from ulysses_accel.memory import tile_loss, tiled_cross_entropy, track_allocations

_SIZES: dict[str, Any] = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}
_QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_BART: dict[str, Any] = {
    **{
        "vocab_size": VOCAB,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
    },
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
}
_T5: dict[str, Any] = {
    **{"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
    **{"dropout_rate": 0.0, "decoder_start_token_id": 0},
}
Model = tuple[str, Callable[[], Any]]

# What lies between the head and the loss: nothing, a bound, a factor, a divisor, a tied weight, a
# bias, a buffer.
CASES: dict[str, Model] = {
    "llama": ("LlamaForCausalLM", lambda: transformers.LlamaConfig(**_GROUPED)),
    "gemma2": (
        "Gemma2ForCausalLM",
        lambda: transformers.Gemma2Config(**_GROUPED, final_logit_softcapping=2.0),
    ),
    "cohere": (
        "CohereForCausalLM",
        lambda: transformers.CohereConfig(**_GROUPED, logit_scale=0.25),
    ),
    "granite": (
        "GraniteForCausalLM",
        lambda: transformers.GraniteConfig(**_GROUPED, logits_scaling=4.0),
    ),
    "nanochat": ("NanoChatForCausalLM", lambda: transformers.NanoChatConfig(**_GROUPED)),
    "mixtral": (
        "MixtralForCausalLM",
        lambda: transformers.MixtralConfig(
            **_GROUPED, num_local_experts=4, output_router_logits=True
        ),
    ),
    "gpt2": ("GPT2LMHeadModel", lambda: build("gpt2").config),
    "phi": ("PhiForCausalLM", lambda: transformers.PhiConfig(**_SIZES)),
    "xlnet": (
        "XLNetLMHeadModel",
        lambda: transformers.XLNetConfig(
            vocab_size=VOCAB, d_model=32, n_layer=1, n_head=4, d_inner=48, dropout=0.0
        ),
    ),
    "bert": ("BertForMaskedLM", lambda: transformers.BertConfig(**_SIZES, **_QUIET)),
    "roberta": ("RobertaForMaskedLM", lambda: transformers.RobertaConfig(**_SIZES, **_QUIET)),
    "bart": ("BartForConditionalGeneration", lambda: transformers.BartConfig(**_BART)),
    "t5": ("T5ForConditionalGeneration", lambda: transformers.T5Config(**_T5)),
}


def make(case: str) -> Any:
    name, config = CASES[case]
    torch.manual_seed(0)
    model = getattr(transformers, name)._from_config(config(), attn_implementation="eager").train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batch(ignored: slice = slice(3, 6)) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, ignored] = -100
    return {"input_ids": ids, "labels": labels}


def step(
    model: nn.Module, loss_of: Callable[[Any], Tensor] = lambda output: output.loss, **kwargs: Any
) -> Any:
    model.zero_grad()
    output = model(**{**batch(), **kwargs})
    loss = loss_of(output)
    loss.backward()
    grads = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return loss.detach(), copy.deepcopy(grads), output


def assert_same(found: Any, expected: Any, tolerance: float) -> None:
    assert (found[0] - expected[0]).abs() <= tolerance * expected[0].abs()
    assert found[1].keys() == expected[1].keys()
    floor = FLOOR * sum(grad.square().sum() for grad in expected[1].values()) ** 0.5
    for name, grad in expected[1].items():
        assert (found[1][name] - grad).norm() <= tolerance * max(grad.norm(), floor), name


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_the_plain_models(case: str) -> None:
    model = make(case)
    expected = step(model)
    installed = tile_loss(model, tile_tokens=5)
    found = step(model)
    # float32 throughout, as transformers casts logits to it: some hundred roundings of 6e-8.
    assert_same(found, expected, 1e-5)
    assert expected[2].logits.shape[-1] == VOCAB
    assert found[2].logits is None
    assert "logits" not in found[2]
    again = step(model, return_logits=True)
    assert_same(again, expected, 0.0)
    assert torch.equal(again[2].logits, expected[2].logits)
    installed.close()
    assert "forward" not in model.get_output_embeddings().__dict__
    assert_same(step(model), expected, 0.0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)])
def test_exact_in_float64(name: str, recompute: bool, num_items: Any) -> None:
    model = build(name)
    shifted = F.pad(batch()["labels"], (0, 1), value=-100)[:, 1:]
    for kwargs in ({}, {"shift_labels": shifted}):
        expected = step(model, num_items_in_batch=num_items, **kwargs)
        installed = tile_loss(model, tile_tokens=5, recompute=recompute)
        assert_same(step(model, num_items_in_batch=num_items, **kwargs), expected, EXACT)
        scaled = step(
            model, lambda output: output.loss / 32, num_items_in_batch=num_items, **kwargs
        )
        assert_same(scaled, (expected[0] / 32, {k: v / 32 for k, v in expected[1].items()}), EXACT)
        installed.close()


def test_accumulation_and_two_forwards_before_one_backward() -> None:
    model = build("llama")
    second = batch(slice(0, 2))

    def both(output: Any) -> Tensor:
        return output.loss / 2 + model(**second).loss.square()

    expected = step(model, both)
    tile_loss(model, tile_tokens=5)
    assert_same(step(model, both), expected, EXACT)


def test_without_labels_and_in_evaluation() -> None:
    model = build("llama")
    ids = batch()["input_ids"]
    with torch.no_grad():
        logits, loss = model(ids).logits, model(**batch()).loss
    installed = tile_loss(model, tile_tokens=5)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
        assert (model(**batch()).loss - loss).abs() <= EXACT * loss
        assert model(**batch()).logits is None
        assert torch.equal(model(**batch(), return_logits=True).logits, logits)
        assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (2, 14)
        as_tuple = model(**batch(), return_dict=False)
        assert (as_tuple[0] - loss).abs() <= EXACT * loss
        installed.close()
        tile_loss(model, return_logits=True)
        assert torch.equal(model(**batch()).logits, logits)
        assert model(**batch(), return_logits=False).logits is None


def test_labels_that_a_model_does_not_use_leave_its_logits() -> None:
    model = build("llama")
    logits = model(batch()["input_ids"]).logits
    tile_loss(model)
    output = model(batch()["input_ids"], shift_labels=batch()["labels"])
    assert output.loss is None
    assert torch.equal(output.logits, logits)


def test_a_batch_without_counted_labels_is_not_a_number_as_plain() -> None:
    model = build("llama")
    everything = batch(slice(None))
    expected = model(**everything).loss
    tile_loss(model)
    loss = model(**everything).loss
    assert expected.isnan()
    assert loss.isnan()
    summed = model(**everything, num_items_in_batch=3).loss
    assert summed == 0
    for total in (loss, summed):
        model.zero_grad()
        total.backward()
        assert all((p.grad == 0).all() for p in model.parameters())


def test_options_and_the_loss_functions_own() -> None:
    model = build("llama")
    hidden = model.model(batch()["input_ids"]).last_hidden_state
    shifted = F.pad(batch()["labels"], (0, 1), value=-100)[:, 1:]
    expected, count = tiled_cross_entropy(
        hidden, model.lm_head.weight, shifted, label_smoothing=0.1, z_loss=0.01
    )
    tile_loss(model, label_smoothing=0.1, z_loss=0.01)
    found = model(**batch()).loss
    assert (found - expected / count).abs() <= EXACT * found
    logits = model(batch()["input_ids"]).logits
    smooth = F.cross_entropy(logits.view(-1, VOCAB), shifted.reshape(-1), label_smoothing=0.3)
    model.loss_function = lambda logits, labels, vocab_size: F.cross_entropy(
        logits.view(-1, vocab_size), shifted.reshape(-1), label_smoothing=0.3
    )
    penalty = model(**batch()).loss - smooth
    assert 0 < penalty < 0.1 * smooth, "the z-loss alone is left"


def test_a_loss_per_token() -> None:
    model = build("llama")

    def weighted(logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
        losses = F.cross_entropy(
            logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1), reduction="none"
        )
        return (losses * torch.linspace(0, 1, len(losses), dtype=losses.dtype)).sum()

    model.loss_function = weighted
    expected = step(model)
    tile_loss(model, tile_tokens=5)
    assert_same(step(model), expected, EXACT)


@pytest.mark.parametrize(
    ("action", "loss"),
    [
        ("log_softmax", lambda logits: logits.log_softmax(-1).sum()),
        ("softmax", lambda logits: F.softmax(logits, -1).sum()),
        ("transpose", lambda logits: logits.transpose(1, 2).sum()),
        ("topk", lambda logits: torch.topk(logits, 2).values.sum()),
        ("vocabulary", lambda logits: logits[..., :5].sum()),
        ("vocabulary", lambda logits: logits[:, :, 3].sum()),
        ("indexes", lambda logits: logits[logits.shape[0] * [0]].sum()),
        ("multiplies", lambda logits: (logits * torch.ones(VOCAB)).sum()),
        ("tanh", lambda logits: logits.tanh().tanh().sum()),
        ("adds", lambda logits: (logits * 2 + torch.ones(VOCAB)).sum()),
        ("reshapes", lambda logits: logits.view(-1).sum()),
        ("casts", lambda logits: logits.to(torch.float16).sum()),
        (
            "class weights",
            lambda logits: F.cross_entropy(
                logits[0], batch()["labels"][0], weight=torch.ones(VOCAB)
            ),
        ),
    ],
)
def test_unknown_uses_of_logits_are_refused_by_name(
    action: str, loss: Callable[[Any], Tensor]
) -> None:
    model = build("llama")
    model.loss_function = lambda logits, labels, vocab_size: loss(logits)
    installed = tile_loss(model)
    with pytest.raises(UnsupportedModelError, match=action):
        model(**batch())
    # A forward that raised leaves nothing behind.
    assert not installed.running
    assert model(batch()["input_ids"]).logits.shape[-1] == VOCAB


def test_a_loss_made_without_the_head_is_refused() -> None:
    model = build("llama")
    model.loss_function = lambda logits, labels, vocab_size: torch.zeros(())
    tile_loss(model)
    with pytest.raises(UnsupportedModelError, match="without its output layer"):
        model(**batch())


def test_models_without_a_plain_head_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="found: none"):
        tile_loss(nn.Linear(2, 2))
    model = build("llama")

    class Quantized(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.round())

    model.lm_head = Quantized(32, VOCAB)
    with pytest.raises(UnsupportedModelError, match="Quantized"):
        tile_loss(model)


def test_installing_twice_is_refused() -> None:
    model = build("llama")
    tile_loss(model).close()
    tile_loss(model)
    with pytest.raises(ConfigError, match="tiled already"):
        tile_loss(nn.ModuleList([model]))


def test_liger_is_used_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    expected = step(model)
    with pytest.raises(ConfigError, match="liger-kernel"):
        tile_loss(model, use_liger=True)
    calls = []

    def stand_in(rows: Tensor, weight: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return F.cross_entropy(
            F.linear(rows, weight, kwargs["bias"]), labels, reduction=kwargs["reduction"]
        )

    module = types.ModuleType("liger_kernel.transformers.functional")
    module.liger_fused_linear_cross_entropy = stand_in  # type: ignore[attr-defined]
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    tile_loss(model, use_liger=True)
    assert_same(step(model), expected, EXACT)
    assert len(calls) == 1
    assert calls[0]["ignore_index"] == -100


def test_the_whole_models_peak_has_no_logits() -> None:
    config = transformers.LlamaConfig(**{**_GROUPED, "vocab_size": 4096, "num_hidden_layers": 1})
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(3, 4096, (1, 1024))
    peaks = []
    for tiled in (False, True):
        if tiled:
            tile_loss(model, tile_tokens=64)
        model.zero_grad()
        with track_allocations(model) as tracked:
            model(input_ids=ids, labels=ids).loss.backward()
        peaks.append(tracked.peak_bytes)
    logits = 1024 * 4096 * 4
    # Plain holds logits, log-probabilities and their gradient; tiled a 16th of one of them.
    assert peaks[0] - peaks[1] > 2 * logits
    assert peaks[1] < logits
