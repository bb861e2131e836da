"""What can't be computed exactly is refused on every rank, by name and with a remedy; nothing is
silently ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BigBirdPegasusConfig,
    BloomConfig,
    ElectraConfig,
    ElectraForPreTraining,
    EsmConfig,
    FNetConfig,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    Qwen3NextConfig,
    T5Config,
    T5Gemma2Config,
)

from tests.helpers.engine_jobs import batches_of, documents, error_of
from tests.helpers.models import build
from tests.helpers.parity_jobs import Engine
from tests.helpers.ranks import run_ranks
from ulysses_accel.sequence.description import DESCRIPTION_KEY
from ulysses_accel.sequence.running import running_batch

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
EXPERTS: dict[str, Any] = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1}


def causal(config: Any, **changes: Any) -> Callable[[], nn.Module]:
    return lambda: AutoModelForCausalLM.from_config(config, **changes)


UNGROUPED = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}


def t5gemma2() -> nn.Module:
    sizes = {**SIZES, "head_dim": 8, "layer_types": ["full_attention"] * 2}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = T5Gemma2Config(encoder={"text_config": sizes, "vision_config": vision}, decoder=sizes)
    model: nn.Module = AutoModelForSeq2SeqLM.from_config(config)
    return model


UNSUPPORTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "MambaForCausalLM": (
        causal(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)),
        "2 of its 2 layers are linear_attention",
    ),
    "JambaForCausalLM": (
        causal(
            JambaConfig(
                **SIZES,
                **EXPERTS,
                attn_layer_period=2,
                attn_layer_offset=1,
                use_mamba_kernels=False,
                mamba_dt_rank=4,
            )
        ),
        "1 of its 2 layers are linear_attention",
    ),
    "Qwen3NextForCausalLM": (
        causal(
            Qwen3NextConfig(
                **SIZES,
                head_dim=8,
                layer_types=["linear_attention", "full_attention"],
                num_experts=2,
                num_experts_per_tok=1,
                linear_num_key_heads=2,
                linear_num_value_heads=2,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
            )
        ),
        "1 of its 2 layers are linear_attention",
    ),
    "T5ForConditionalGeneration": (
        lambda: AutoModelForSeq2SeqLM.from_config(
            T5Config(vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4)
        ),
        "adds a bias by position to its scores (position_bias=position_bias)",
    ),
    "T5Gemma2ForConditionalGeneration": (t5gemma2, "joins masks"),
    "BigBirdPegasusForConditionalGeneration": (
        lambda: AutoModelForSeq2SeqLM.from_config(BigBirdPegasusConfig(**ENCODER_DECODER)),
        "weighs tokens by itself, past transformers' AttentionInterface",
    ),
    "BartForConditionalGeneration": (
        lambda: AutoModelForSeq2SeqLM.from_config(
            BartConfig(**ENCODER_DECODER, decoder_layerdrop=0.1)
        ),
        "leaves layers out by chance (layerdrop=0.1)",
    ),
    "ElectraForPreTraining": (
        lambda: ElectraForPreTraining(ElectraConfig(**UNGROUPED)),
        "its loss (BCEWithLogitsLoss) is not one mean over tokens",
    ),
    "EsmForMaskedLM": (
        lambda: AutoModelForMaskedLM.from_config(
            EsmConfig(**UNGROUPED, token_dropout=True, mask_token_id=4)
        ),
        "scales its embeddings by the share of masked tokens",
    ),
    "FNetForMaskedLM": (
        lambda: AutoModelForMaskedLM.from_config(
            FNetConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)
        ),
        "do not call attention through transformers' AttentionInterface",
    ),
    "BloomForCausalLM": (
        causal(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
        "Use ",
    ),
    "Linear": (lambda: nn.Linear(4, 4), "holds no transformers model"),
}


def refusals() -> dict[str, Any]:
    acc = Engine("ddp").accelerator(sp_size=2)
    found: dict[str, Any] = {}
    for name, (make, _) in UNSUPPORTED.items():
        model = make()
        found[name] = error_of(acc.prepare, model)
        # Refused before anything was changed.
        hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
        found[f"{name} untouched"] = hooks == 0 and not acc.sequence_parallel.forwards
    one_head = LlamaConfig(**{**SIZES, "num_attention_heads": 1, "num_key_value_heads": 1})
    found["heads"] = error_of(acc.prepare, AutoModelForCausalLM.from_config(one_head))
    return found


@pytest.fixture(scope="module")
def refused() -> list[dict[str, Any]]:
    """Each rank's messages; one fork for all models."""
    found: list[dict[str, Any]] = run_ranks(refusals, 2, init=False)
    return found


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_unsupported_models_are_refused_by_name(refused: list[dict[str, Any]], name: str) -> None:
    for rank in refused:
        message = rank[name]
        assert message.startswith(f"UnsupportedModelError: {name}"), message
        assert UNSUPPORTED[name][1] in message
        assert "Use " in message or "Call " in message or "Set " in message
        assert rank[f"{name} untouched"]


def test_more_ranks_than_heads_are_refused(refused: list[dict[str, Any]]) -> None:
    for rank in refused:
        assert "sp_size=2 is more than num_attention_heads=1" in rank["heads"]
        assert "Use sp_size=1 at most" in rank["heads"]


def replaced_attention() -> str:
    acc = Engine("ddp").accelerator(sp_size=2)
    model, batches = acc.prepare(build("llama"), batches_of(1))
    unwrapped = acc.unwrap_model(model)
    unwrapped.set_attn_implementation("sdpa")
    return error_of(model, **next(iter(batches)))


def forwards() -> dict[str, str]:
    """Calls a prepared model in ways that would compute something else than what was asked for."""
    acc = Engine("ddp").accelerator(sp_size=2)
    model, batches = acc.prepare(build("llama"), batches_of(1))
    batch = next(iter(batches))
    tokens, positions = batch["input_ids"], batch["position_ids"]
    embedded = acc.unwrap_model(model).get_input_embeddings()(tokens)
    bare = {name: value for name, value in batch.items() if name != DESCRIPTION_KEY}
    labels_only = {"input_ids": tokens.clone(), "shift_labels": batch["shift_labels"].clone()}
    described = {DESCRIPTION_KEY: batch[DESCRIPTION_KEY]}
    whole = {name: value[None] for name, value in documents(1)[0].items()}
    unshifted = {name: value for name, value in batch.items() if name != "shift_labels"}
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "no description": ((), bare),
        "tokens alone": ((), {"input_ids": tokens}),
        "tokens by place": ((tokens,), {}),
        "part of the tokens": ((), {"input_ids": tokens[:, :-1]}),
        "embedded": ((), {"inputs_embeds": embedded, "position_ids": positions}),
        "moved": ((), {name: value.to("cpu") for name, value in bare.items()}),
        "copied with shift_labels": ((), labels_only),
        "by place": ((tokens,), {**described, "position_ids": positions}),
        "cut": ((), {**batch, "input_ids": tokens[:, :-1]}),
        "more rows": ((), {**batch, "input_ids": tokens.repeat(2, 1)}),
        "no positions": ((), {**batch, "position_ids": None}),
        "no tokens": ((), {**described, "position_ids": positions}),
        "labels alone": ((), {**unshifted, "labels": batch["shift_labels"]}),
        "whole labels": ((), {**unshifted, "labels": whole["labels"]}),
        "whole positions": ((), {**batch, "position_ids": torch.arange(16)[None]}),
        "as it came": ((), batch),
        "whole": ((), whole),
        "whole, masked": ((), {**whole, "attention_mask": torch.ones(1, 16)}),
        "whole without labels": ((whole["input_ids"],), {}),
    }
    found = {name: error_of(model, *args, **kwargs) for name, (args, kwargs) in calls.items()}
    # Nothing of a refused forward stays behind.
    found["left over"] = str(running_batch())
    found["replaced attention"] = replaced_attention()
    return found


def test_shards_without_their_description_are_refused() -> None:
    lost = (
        "no description",
        "tokens alone",
        "tokens by place",
        "part of the tokens",
        "embedded",
        "moved",
        "copied with shift_labels",
    )
    wrong = {
        "by place": "1 positional arguments",
        "cut": "the batch has (1, 7) rows and tokens on this rank, its sequence_description says (1, 8)",
        "more rows": "the batch has (2, 8) rows",
        "no positions": "has no position_ids",
        "labels alone": "has labels and no shift_labels",
        "whole labels": "the batch's labels has shape [1, 16] on this rank, which has 8 of 16 tokens",
        "whole positions": "the batch's position_ids has shape [1, 16] on this rank",
        "no tokens": "the batch has None rows and tokens",
        "replaced attention": "LlamaForCausalLM computed a sharded batch with 0 attention calls",
    }
    for rank in run_ranks(forwards, 2, init=False):
        for name in lost:
            assert rank[name].startswith("BatchError: "), name
            assert "came without its sequence_description" in rank[name]
            assert "model(**batch)" in rank[name]
        for name, text in wrong.items():
            assert text in rank[name], name
        ordinary = [
            name
            for name in rank
            if (name.startswith("whole") and name not in wrong) or name == "as it came"
        ]
        assert {name: rank[name] for name in ordinary} == dict.fromkeys(ordinary, "")
        assert len(ordinary) == 4
        assert rank["left over"] == "None"
