"""Tiny models of many families, with batches of every kind that each of them takes; all of it
computed in float64.

What transformers computes in float32 whatever the model's dtype (norms, rotary angles, losses) is
computed in float64 by `InDouble`, in the sharded run and in its reference alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers as hf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Batch = dict[str, Tensor]
Form = Literal["causal", "encoder", "seq2seq", "speech"]

VOCAB, IGNORE = 64, -100
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
# Shorter than the batches, so that the scaling is at work.
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 12,
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "short_factor": [1.0, 1.1, 1.2, 1.3],
}


class InDouble(TorchFunctionMode):
    """Computes in float64 what a model asks to be computed in float32."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Calls the function with float64 in place of float32."""
        function: Any = Tensor.double if func is Tensor.float else func
        wide = {
            key: torch.float64 if value is torch.float32 else value
            for key, value in (kwargs or {}).items()
        }
        return function(
            *(torch.float64 if value is torch.float32 else value for value in args), **wide
        )


@dataclass(frozen=True)
class Architecture:
    """One model.

    Args:
        model: its class.
        config: makes its configuration.
        form: which batches it takes.
        attention: transformers' implementation on one process; some are only right with `eager`.
        first_position: where its positions begin.
        is_packed_itself: whether one process is given packed documents as they are: tokens count in
            the row there.
    """

    model: Any
    config: Callable[[], Any]
    form: Form = "causal"
    attention: str = "sdpa"
    first_position: int = 0
    is_packed_itself: bool = False


def _encoder(model: Any, config: Any, first_position: int = 0, **sizes: Any) -> Architecture:
    return Architecture(
        model, lambda: config(**{**SIZES, **NO_DROPOUT, **sizes}), "encoder", "sdpa", first_position
    )


def _seq2seq(model: Any, config: Any, **sizes: Any) -> Architecture:
    return Architecture(model, lambda: config(**{**ENCODER_DECODER, **sizes}), "seq2seq")


def _whisper() -> Any:
    return hf.WhisperConfig(
        **{
            key: value for key, value in ENCODER_DECODER.items() if key != "max_position_embeddings"
        },
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=64,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


def _qwen2_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    text = {
        **{key: value for key, value in GROUPED.items() if key != "head_dim"},
        "rope_parameters": rope,
    }
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    return hf.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=60, video_token_id=61
    )


ARCHITECTURES: dict[str, Architecture] = {
    "bert": _encoder(hf.BertForMaskedLM, hf.BertConfig),
    "bert_tokens": _encoder(hf.BertForTokenClassification, hf.BertConfig, num_labels=5),
    "roberta": _encoder(hf.RobertaForMaskedLM, hf.RobertaConfig, 4, pad_token_id=3),
    "albert": _encoder(hf.AlbertForMaskedLM, hf.AlbertConfig, embedding_size=16),
    "electra": _encoder(hf.ElectraForMaskedLM, hf.ElectraConfig, embedding_size=16),
    "distilbert": Architecture(
        hf.DistilBertForMaskedLM,
        lambda: hf.DistilBertConfig(
            vocab_size=VOCAB,
            dim=32,
            hidden_dim=48,
            n_layers=2,
            n_heads=4,
            dropout=0.0,
            attention_dropout=0.0,
        ),
        "encoder",
    ),
    "esm": _encoder(
        hf.EsmForMaskedLM,
        hf.EsmConfig,
        token_dropout=False,
        mask_token_id=4,
        position_embedding_type="rotary",
    ),
    # Its window cuts, and reaches over a shard.
    "modernbert": _encoder(
        hf.ModernBertForMaskedLM,
        hf.ModernBertConfig,
        local_attention=10,
        global_attn_every_n_layers=2,
    ),
    "roberta_causal": Architecture(
        hf.RobertaForCausalLM,
        lambda: hf.RobertaConfig(**{**SIZES, **NO_DROPOUT, "pad_token_id": 3}, is_decoder=True),
        first_position=4,
    ),
    "opt": Architecture(
        hf.OPTForCausalLM,
        lambda: hf.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
            dropout=0.0,
        ),
    ),
    "bart_causal": Architecture(
        hf.BartForCausalLM, lambda: hf.BartConfig(**ENCODER_DECODER, is_decoder=True)
    ),
    "bart": _seq2seq(hf.BartForConditionalGeneration, hf.BartConfig),
    "mbart": _seq2seq(hf.MBartForConditionalGeneration, hf.MBartConfig),
    "marian": _seq2seq(hf.MarianMTModel, hf.MarianConfig, decoder_vocab_size=VOCAB),
    "pegasus": _seq2seq(hf.PegasusForConditionalGeneration, hf.PegasusConfig),
    "m2m_100": _seq2seq(hf.M2M100ForConditionalGeneration, hf.M2M100Config),
    "whisper": Architecture(hf.WhisperForConditionalGeneration, _whisper, "speech"),
    "qwen2_vl": Architecture(hf.Qwen2VLForConditionalGeneration, _qwen2_vl),
    "gpt_oss": Architecture(
        hf.GptOssForCausalLM,
        lambda: hf.GptOssConfig(
            **GROUPED,
            **EXPERTS,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention"],
        ),
        attention="eager",
    ),
    "gemma2": Architecture(
        hf.Gemma2ForCausalLM,
        lambda: hf.Gemma2Config(
            **GROUPED, sliding_window=6, attn_logit_softcapping=2.0, query_pre_attn_scalar=8
        ),
        attention="eager",
    ),
    "llama4": Architecture(
        hf.Llama4ForCausalLM,
        lambda: hf.Llama4TextConfig(
            **GROUPED,
            **EXPERTS,
            intermediate_size_mlp=48,
            attention_chunk_size=6,
            layer_types=["chunked_attention", "full_attention"],
            no_rope_layers=[1, 0],
            # Small enough that the scales of the tokens differ.
            floor_scale=3,
            attn_temperature_tuning=True,
        ),
        is_packed_itself=True,
    ),
    "phi3": Architecture(
        hf.Phi3ForCausalLM,
        lambda: hf.Phi3Config(
            **{key: value for key, value in GROUPED.items() if key != "head_dim"},
            original_max_position_embeddings=12,
            rope_parameters=LONG,
        ),
    ),
    "llama_dynamic": Architecture(
        hf.LlamaForCausalLM,
        lambda: hf.LlamaConfig(
            **{**GROUPED, "max_position_embeddings": 12}, rope_parameters=DYNAMIC
        ),
    ),
    "nomic_bert": _encoder(hf.NomicBertForMaskedLM, hf.NomicBertConfig),
}


def build(name: str) -> Any:
    """Returns a model in float64 and training mode; the same call gives the same weights in every
    process.
    """
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = architecture.config()
    for part in (config, *(getattr(config, sub, None) for sub in config.sub_configs)):
        if part is not None:
            part._experts_implementation = "eager"
    model: nn.Module = architecture.model._from_config(
        config, attn_implementation=architecture.attention
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than transformers draws them, so that attention is far from uniform; biases and
            # norms too.
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train()


def kinds(form: Form) -> tuple[str, ...]:
    """Returns the kinds of batches that a form takes."""
    return {
        "causal": ("plain", "packed", "left", "right", "odd"),
        "encoder": ("plain", "packed", "padded", "odd"),
        "seq2seq": ("plain", "padded", "odd"),
        "speech": ("plain", "odd"),
    }[form]


DOCUMENTS = ((5, 1, 10), (9, 7))
_PADDING: dict[str, tuple[tuple[int, int, int], ...]] = {
    "left": ((0, 0, 5),),
    "right": ((1, 11, 16),),
    # On the left, within, and on the right.
    "padded": ((0, 0, 3), (0, 7, 9), (1, 11, 16)),
}


def make_batch(name: str, kind: str) -> Batch:
    """Returns a batch of two rows as a user's loader gives it."""
    architecture = ARCHITECTURES[name]
    generator = torch.Generator().manual_seed(1)
    length = 13 if kind == "odd" else 16
    # Tokens from 8 on: none of them is special to any model.
    tokens = torch.randint(8, 60, (2, length), generator=generator)
    mask = torch.ones_like(tokens)
    for row, start, stop in _PADDING.get(kind, ()):
        mask[row, start:stop] = 0
    padding_token = getattr(architecture.config(), "pad_token_id", None) or 0
    batch: Batch = {"input_ids": tokens.masked_fill(mask == 0, padding_token)}
    if kind in _PADDING:
        batch["attention_mask"] = mask
    if architecture.form in ("seq2seq", "speech"):
        labels = torch.randint(8, 60, (2, 9 if kind == "odd" else 12), generator=generator)
        labels[1, 7:] = IGNORE
        sound = {"input_features": torch.randn(2, 8, 20, generator=generator, dtype=torch.float64)}
        return {**(batch if architecture.form == "seq2seq" else sound), "labels": labels}
    labels = tokens.masked_fill(mask == 0, IGNORE)
    if architecture.form == "encoder":
        labels = labels % 5 if name == "bert_tokens" else labels
        labels = labels.masked_fill(
            (torch.rand(tokens.shape, generator=generator) < 0.6) | (mask == 0), IGNORE
        )
    elif kind == "left":
        # Behind padding there is no token that could tell the first.
        labels[:, 1:].masked_fill_(mask[:, :-1] == 0, IGNORE)
    if kind == "packed":
        counted = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS])
        batch["position_ids"] = counted + architecture.first_position
        labels = (
            labels.masked_fill(counted == 0, IGNORE) if architecture.form == "causal" else labels
        )
    return {**batch, "labels": labels}


def reference_parts(name: str, kind: str) -> list[Batch]:
    """Returns what one process is given: the batch, or each document of packed ones alone."""
    batch = make_batch(name, kind)
    if kind != "packed" or ARCHITECTURES[name].is_packed_itself:
        return [batch]
    parts = []
    for row, sizes in enumerate(DOCUMENTS):
        split = {key: batch[key][row].split(list(sizes)) for key in ("input_ids", "labels")}
        parts += [
            {key: values[index][None] for key, values in split.items()}
            for index in range(len(sizes))
        ]
    return parts


def num_counted(name: str, batch: Batch) -> int:
    """Returns how many labels a model's loss counts; a model that is not given a token's
    predecessor can't shift.
    """
    shifts = ARCHITECTURES[name].form == "causal" and name != "bart_causal"
    labels = batch["labels"][:, 1:] if shifts else batch["labels"]
    return int((labels != IGNORE).sum())
