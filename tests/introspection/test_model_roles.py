"""What engines find out about a model: its rules for batches, its findings, and that its attention
comes to us.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.utils.data import DataLoader

from tests.helpers.architectures import ENCODER_DECODER, GROUPED, Batch, InDouble, build, make_batch
from tests.helpers.engine_jobs import error_of
from tests.helpers.parity_jobs import EXACT, Engine, compare, zero_gradients
from tests.helpers.ranks import run_ranks
from ulysses_accel import Finding, ParallelismConfig, supports
from ulysses_accel.errors import ConfigError
from ulysses_accel.forward.checkpoint_context import CheckpointInBatch
from ulysses_accel.introspection.positions import position_sources
from ulysses_accel.introspection.requirements import (
    Requirements,
    common_rules,
    requirements_of,
    rules_of,
)
from ulysses_accel.introspection.structure import ModelReading, attending, encoder_of

T5_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_layers": 1,
    "num_heads": 4,
}


def first(samples: list[Batch]) -> Batch:
    return samples[0]


def loader(*batches: Batch) -> DataLoader[Any]:
    whole: Any = list(batches)
    return DataLoader(whole, batch_size=1, collate_fn=first)


def test_supports_takes_models_and_configs() -> None:
    two = ParallelismConfig(sp_size=2)
    assert supports(hf.LlamaConfig(**GROUPED), two) == []
    assert supports(hf.BartConfig(**ENCODER_DECODER), two) == []
    findings = supports(hf.T5Config(**T5_SIZES), two)
    assert {finding.kind for finding in findings} == {"attention", "positions"}
    assert all(
        isinstance(finding, Finding) and str(finding).endswith(finding.remedy)
        for finding in findings
    )
    assert supports(hf.T5ForConditionalGeneration(hf.T5Config(**T5_SIZES)), two) == findings
    assert supports(hf.T5Config(**T5_SIZES), ParallelismConfig(sp_size=1)) == []
    (heads,) = supports(hf.LlamaConfig(**GROUPED), ParallelismConfig(sp_size=8))
    (heads_left,) = supports(hf.LlamaConfig(**GROUPED), ParallelismConfig(sp_size=4, tp_size=2))
    assert "sp_size=4 (from constructor) is more than num_attention_heads=4 / tp_size=2" in str(
        heads_left
    )
    (dense,) = supports(hf.LlamaConfig(**GROUPED), ParallelismConfig(ep_size=2))
    assert "LlamaForCausalLM has no experts" in str(dense)
    (experts,) = supports(hf.MixtralConfig(**GROUPED), ParallelismConfig(tp_size=2))
    assert "no rule says how to shard model.layers.0.mlp" in str(experts)
    assert supports(hf.MixtralConfig(**GROUPED), ParallelismConfig(ep_size=2)) == []
    assert heads.where == "sp_size"
    assert "more than num_attention_heads=4" in heads.fact


def test_supports_names_what_is_no_language_model() -> None:
    (finding,) = supports(torch.nn.Linear(4, 4), ParallelismConfig(sp_size=2))
    assert "holds no transformers model" in finding.fact
    (finding,) = supports(hf.CLIPVisionConfig(), ParallelismConfig(sp_size=2))
    assert "names no language model" in finding.fact


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama_dynamic", ("next_token", False, None, False)),
        ("bert", ("same_token", False, None, False)),
        ("bert_tokens", ("same_token", False, None, False)),
        ("roberta", ("same_token", False, 3, False)),
        ("roberta_causal", ("next_token", False, 3, False)),
        ("opt", ("next_token", True, None, False)),
        ("bart_causal", ("same_token", False, None, False)),
        ("bart", ("same_token", False, None, True)),
        ("m2m_100", ("same_token", False, 0, True)),
        ("whisper", ("same_token", False, None, True)),
        ("qwen2_vl", ("next_token", False, None, False)),
    ],
)
def test_rules(name: str, expected: tuple[Any, ...]) -> None:
    rules = rules_of(build(name))
    assert (
        rules.labels,
        rules.counts_mask,
        rules.padding_idx,
        rules.decoder_inputs is not None,
    ) == expected


@pytest.mark.parametrize("name", ["bart", "mbart", "whisper"])
def test_decoder_inputs_are_the_models_own(name: str) -> None:
    model = build(name).eval()
    batch = make_batch(name, "plain")
    rules = rules_of(model)
    assert rules.decoder_inputs is not None
    given = rules.decoder_inputs(batch["labels"])
    torch.testing.assert_close(
        model(**batch, decoder_input_ids=given).logits, model(**batch).logits
    )


def required(*models: Any) -> list[Requirements]:
    return [requirements_of(ModelReading(model)) for model in models]


def test_models_that_differ_need_loaders_of_their_own() -> None:
    llama, bert, headless = build("llama_dynamic"), build("bert"), build("bert").bert
    with pytest.raises(
        ConfigError, match=r"LlamaForCausalLM and BertForMaskedLM .* ask for different batches"
    ):
        common_rules(required(llama, bert))
    # A model without a loss has nothing against another's labels.
    assert common_rules(required(headless, bert)).labels == "same_token"
    assert common_rules([]).labels == "next_token"


def test_parts_of_an_encoder_decoder() -> None:
    bart, whisper, qwen = build("bart"), build("whisper"), build("qwen2_vl")
    assert encoder_of(bart) is bart.model.encoder
    assert encoder_of(build("bert")) is None
    assert [source.key for source in position_sources(ModelReading(bart))] == [
        "decoder_position_ids",
        "position_ids",
    ]
    # Sound is whole on every rank, so its encoder is none of the sharded parts; neither is a tower
    # for images.
    assert [source.key for source in position_sources(ModelReading(whisper))] == [
        "decoder_position_ids"
    ]
    assert not {name for name in ModelReading(whisper).sharded if name.startswith("model.encoder.")}
    assert not {name for name in ModelReading(qwen).sharded if "visual" in name}
    assert len(list(attending(bart))) == 6


def replaced_layer() -> dict[str, str]:
    accelerator = Engine("ddp").accelerator(sp_size=2)
    model, batches = accelerator.prepare(
        build("llama_dynamic"), loader(*[make_batch("llama_dynamic", "plain")] * 2)
    )
    first_batch, second_batch = list(batches)
    layer = accelerator.unwrap_model(model).model.layers[1].self_attn
    # As a fused kernel that someone puts into a layer: no call of transformers' functions any more.
    layer.forward = lambda hidden_states, **_: (hidden_states, None)
    found = {"replaced": error_of(model, **first_batch)}
    del layer.forward
    found["restored"] = error_of(model, **second_batch)
    accelerator.sequence_parallel.close()
    hooks = [len(module._forward_pre_hooks) for module in accelerator.unwrap_model(model).modules()]
    return {**found, "hooks left": str(sum(hooks))}


def test_a_layer_that_attends_elsewhere_is_told() -> None:
    for found in run_ranks(replaced_layer, 2, init=False):
        assert (
            "with 1 attention calls through 'ulysses_accel_sdpa' in 2 attention layers"
            in found["replaced"]
        )
        assert found["restored"] == ""
        assert found["hooks left"] == "0"


def expected_losses(
    name: str, kinds: tuple[str, ...], weights: list[float], in_double: bool = True
) -> tuple[list[float], dict[str, Tensor]]:
    model = build(name)
    with InDouble() if in_double else nullcontext():
        losses = [model(**make_batch(name, kind)).loss for kind in kinds]
        torch.stack([loss * weight for loss, weight in zip(losses, weights)]).sum().backward()
    return [float(loss.detach()) for loss in losses], {
        key: parameter.grad.clone()
        for key, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def checkpointed(name: str, kinds: tuple[str, ...], enabled_late: bool) -> list[float]:
    """Runs several forwards before one backward, with activation checkpointing."""
    accelerator = Engine("ddp").accelerator(sp_size=1, cp_size=2)
    model = build(name)
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    if not enabled_late:
        model.gradient_checkpointing_enable(**options)
    model, batches = accelerator.prepare(model, loader(*(make_batch(name, kind) for kind in kinds)))
    inner = accelerator.unwrap_model(model)
    if enabled_late:
        inner.gradient_checkpointing_enable(**options)
    zero_gradients(model)
    # Past the wrapper: DDP allows one forward for each backward.
    losses = [inner(**batch).loss for batch in batches]
    torch.stack(losses).sum().backward()
    grads = {}
    for key, parameter in inner.named_parameters():
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            grads[key] = parameter.grad / 2
    expected, expected_grads = expected_losses(name, kinds, [1.0] * len(kinds), in_double=False)
    found = [
        compare(float(loss.detach()), grads, one, expected_grads)
        for loss, one in zip(losses, expected)
    ]
    accelerator.sequence_parallel.close()
    left = [
        module
        for module in inner.modules()
        if isinstance(vars(module).get("_gradient_checkpointing_func"), CheckpointInBatch)
    ]
    assert not left
    return [max(one.loss, one.grad) for one in found]


@pytest.mark.parametrize(
    ("name", "enabled_late"),
    [("whisper", False), ("whisper", True), ("bert", False), ("bart", True)],
)
def test_checkpoints_recompute_with_their_own_batch(name: str, enabled_late: bool) -> None:
    for errors in run_ranks(checkpointed, 2, name, ("plain", "odd"), enabled_late, init=False):
        assert len(errors) == 2
        assert max(errors) <= EXACT


def accumulated(name: str, kinds: tuple[str, ...]) -> float:
    """Counts all tokens of a step first, as token-exact accumulation does; the model itself only
    knows means.
    """
    from ulysses_accel import count_items

    accelerator = Engine("ddp").accelerator(sp_size=2, steps=len(kinds))
    model, batches = accelerator.prepare(
        build(name), loader(*(make_batch(name, kind) for kind in kinds))
    )
    local = list(batches)
    items = count_items(local, accelerator.sequence_parallel.groups.world_group)
    zero_gradients(model)
    total = 0.0
    with InDouble():
        for batch in local:
            with accelerator.accumulate(model):
                loss = model(**batch, num_items_in_batch=items).loss
                accelerator.backward(loss)
                total += float(loss.detach()) / len(kinds)
    counts = [int((make_batch(name, kind)["labels"] != -100).sum()) for kind in kinds]
    weights = [count / sum(counts) for count in counts]
    losses, grads = expected_losses(name, kinds, weights)
    own = {
        key: parameter.grad
        for key, parameter in accelerator.unwrap_model(model).named_parameters()
        if parameter.grad is not None
    }
    found = compare(total, own, sum(loss * weight for loss, weight in zip(losses, weights)), grads)
    return max(found.loss, found.grad)


def test_token_counts_reach_models_that_only_compute_means() -> None:
    assert max(run_ranks(accumulated, 2, "bert", ("plain", "padded"), init=False)) <= EXACT


def ordinary(name: str) -> float:
    accelerator = Engine("ddp").accelerator(sp_size=2)
    expected = build(name).eval()
    model = accelerator.prepare_model(build(name)).eval()
    batch = make_batch(name, "right")
    with torch.no_grad():
        return float((model(**batch).logits - expected(**batch).logits).abs().max())


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_whole_batches_keep_sinks_and_soft_caps(name: str) -> None:
    # Norms and softmax in float32 here, in both: 1e-5 of logits of order one.
    assert max(run_ranks(ordinary, 2, name, init=False)) <= 1e-5
