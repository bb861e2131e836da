"""A model that computes shards is freed when it is deleted, without the garbage collector; closing
the sharded forward leaves every module as it was.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from torch import nn
from torch.utils.data import DataLoader

from tests.helpers import architectures, models, vision_models
from tests.helpers.architectures import Batch
from tests.helpers.parity_jobs import Engine
from tests.helpers.ranks import run_ranks
from ulysses_accel.attention import SequenceAttention
from ulysses_accel.attention.huggingface import registry
from ulysses_accel.forward.sharded import ShardedForward, shard_forward
from ulysses_accel.introspection.profile import profile_of


def build_mixtral() -> Any:
    config = hf.MixtralConfig(
        vocab_size=models.VOCAB,
        hidden_size=models.HIDDEN,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
    )
    config._experts_implementation = "eager"
    return models.build("mixtral", config=config)


def build_classifier() -> Any:
    config = hf.LlamaConfig(
        **{**architectures.GROUPED, "pad_token_id": 0}, num_labels=3, attn_implementation="sdpa"
    )
    return hf.LlamaForSequenceClassification(config).double()


def tokens(**others: Any) -> Batch:
    ids = torch.randint(8, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone(), **others}


Case = tuple[Callable[[], Any], Callable[[], Batch]]
CASES: dict[str, Case] = {
    "llama": (lambda: models.build("llama"), tokens),
    "mixtral": (build_mixtral, tokens),
    "classifier": (build_classifier, lambda: tokens(labels=torch.tensor([0, 2]))),
    **{
        name: (
            lambda name=name: architectures.build(name),  # type: ignore[misc]
            lambda name=name: architectures.make_batch(name, "plain"),  # type: ignore[misc]
        )
        for name in ("bert", "roberta", "opt", "bart", "m2m_100", "whisper", "llama_dynamic")
    },
    "qwen2_vl": (
        lambda: vision_models.build("qwen2_vl"),
        lambda: vision_models.make_batch("qwen2_vl", "border"),
    ),
}


# What transformers' own forwards of these models set: dynamic RoPE's buffers, and Qwen2-VL's offsets.
SET_BY_FORWARD = ("_buffers", "max_seq_len_cached", "rope_deltas")


def state_of(model: nn.Module) -> list[dict[str, Any]]:
    """Returns every module's attributes; hooks and children by their identities."""
    states = []
    for module in model.modules():
        state: dict[str, Any] = {}
        for name, value in vars(module).items():
            if name not in SET_BY_FORWARD:
                is_dict = isinstance(value, dict)
                state[name] = {key: id(value[key]) for key in value} if is_dict else value
        states.append(state)
    return states


def shard(model: nn.Module, group: Any) -> ShardedForward:
    world = dist.group.WORLD
    assert world is not None
    return shard_forward(model, profile_of(model), SequenceAttention(group), group, world)


def lifetimes(name: str) -> dict[str, Any]:
    build, make_batch = CASES[name]
    accelerator = Engine().accelerator(sp_size=2)
    # A prepared loader describes its batches for the model that it was prepared with.
    _, loader = accelerator.prepare(
        build(), DataLoader([make_batch()], batch_size=1, collate_fn=lambda rows: rows[0])
    )
    (batch,) = list(loader)
    group = accelerator.sequence_parallel.group

    model = build()
    before = state_of(model)
    sharded = shard(model, group)
    model(**batch).loss.backward()
    sharded.close()
    after = state_of(model)
    found: dict[str, Any] = {"left over": after == before}

    sharded = shard(model, group)
    model.gradient_checkpointing_enable()
    model.zero_grad()
    gc.collect()
    gc.disable()
    model(**batch).loss.backward()
    modules = [weakref.ref(module) for module in model.modules()]
    installed = weakref.ref(sharded)
    entries = len(registry._INSTALLED)
    del model
    found["alive"] = [type(ref()).__name__ for ref in modules if ref() is not None]
    found["entries"] = entries > len(registry._INSTALLED)
    sharded.close()
    del sharded
    found["installation"] = installed() is None
    gc.enable()
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_deleted_model_is_freed_at_once(name: str) -> None:
    for found in run_ranks(lifetimes, 2, name, init=False):
        assert found["left over"]
        assert found["alive"] == []
        assert found["entries"]
        assert found["installation"]
