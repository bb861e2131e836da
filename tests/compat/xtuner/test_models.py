"""XTuner's table of models, its four missing families among them: the document's loop against one
process, in float64.

Tolerance 1e-12, for the reason that `tests/helpers/parity_jobs.py` states.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from torch import Tensor, nn

from tests.helpers.architectures import EXPERTS, GROUPED, SIZES, InDouble
from tests.helpers.own_attention import (
    BaichuanAlibiForCausalLM,
    BaichuanConfig,
    BaichuanForCausalLM,
    ChatGLMConfig,
    ChatGLMForConditionalGeneration,
)
from tests.helpers.parity_jobs import EXACT, FLOOR
from tests.helpers.ranks import run_ranks
from tests.helpers.support import Support
from ulysses_accel.compat.xtuner import (
    dispatch_modules,
    init_sequence_parallel,
    pad_for_sequence_parallel,
    reduce_sequence_parallel_loss,
    split_for_sequence_parallel,
)
from ulysses_accel.introspection.profile import profile_of

IGNORE, LENGTH = -100, 13
# Whole rows, the second of them padded; and documents packed into rows, as XTuner's varlen data
# sets give them.
KINDS = ("padded", "packed")
DOCUMENTS = ((5, 8), (3, 4, 6))
MLA = {
    **{
        key: value
        for key, value in GROUPED.items()
        if key not in ("head_dim", "num_key_value_heads")
    },
    **{
        "num_key_value_heads": 4,
        "kv_lora_rank": 8,
        "q_lora_rank": 12,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
    },
    **{
        "v_head_dim": 6,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    },
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
}
QWEN_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
}
FUSED = {key: value for key, value in GROUPED.items() if key != "head_dim"}
LEARNED = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "pad_token_id": 0,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def auto(config: Callable[..., Any], **sizes: Any) -> Callable[[], Any]:
    """What makes a model that transformers itself has."""

    def make() -> Any:
        made = config(**sizes)
        made._experts_implementation = "eager"
        return hf.AutoModelForCausalLM.from_config(made, attn_implementation="sdpa")

    return make


# InternLM 2 is Llama by its layers and its fused projection; Yi and DeepSeek's first are Llama,
# Zephyr is Mistral.
MODELS: dict[str, Callable[[], Any]] = {
    "Llama 2": auto(hf.LlamaConfig, **SIZES),
    "InternLM 2, Yi, DeepSeek LLM": auto(hf.LlamaConfig, **GROUPED),
    "Mistral, Zephyr": auto(hf.MistralConfig, **GROUPED, sliding_window=6),
    "Mixtral": auto(hf.MixtralConfig, **GROUPED, **EXPERTS, sliding_window=None),
    "Qwen 1.5, Qwen 2": auto(hf.Qwen2Config, **FUSED),
    "Qwen 2 MoE": auto(hf.Qwen2MoeConfig, **FUSED, **QWEN_MOE, shared_expert_intermediate_size=16),
    "DeepSeek V2": auto(hf.DeepseekV2Config, **MLA),
    "DeepSeek V3": auto(hf.DeepseekV3Config, **MLA),
    "Phi 3": auto(hf.Phi3Config, **FUSED),
    "Cohere": auto(hf.CohereConfig, **FUSED),
    "Gemma": auto(hf.GemmaConfig, **{**GROUPED, "num_key_value_heads": 1, "head_dim": 16}),
    "GLM": auto(hf.GlmConfig, **GROUPED, partial_rotary_factor=0.5),
    "GLM 4": auto(hf.Glm4Config, **GROUPED, partial_rotary_factor=0.5),
    "StarCoder": auto(hf.GPTBigCodeConfig, **LEARNED, **NO_DROPOUT, multi_query=True),
    "StarCoder 2": auto(
        hf.Starcoder2Config, **FUSED, sliding_window=6, residual_dropout=0.0, embedding_dropout=0.0
    ),
    "Baichuan 7B": lambda: BaichuanForCausalLM(BaichuanConfig()),
    "Baichuan 13B": lambda: BaichuanAlibiForCausalLM(BaichuanConfig(alibi=True)),
    "ChatGLM 2, ChatGLM 3": lambda: ChatGLMForConditionalGeneration(ChatGLMConfig()),
}
# Ranks, and how many of them share a sequence.
LAYOUTS = [(2, 2), (4, 4), (4, 2)]
# What differs between models is the same with other sequences beside theirs.
WITH_DATA = ("Llama 2", "Mixtral", "StarCoder", "Baichuan 13B")
CASES = [
    (layout, name)
    for layout in LAYOUTS
    for name in (MODELS if layout[0] == layout[1] else WITH_DATA)
]


@dataclass(frozen=True)
class Expected:
    loss: float
    grads: dict[str, Tensor]


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().double()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than transformers draws them, so that attention is far from uniform.
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train()


def make_batch(kind: str, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Tokens, labels, positions and mask; labels count unevenly over the row, and the numbers tell
    batches apart.
    """
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(8, 60, (2, LENGTH), generator=generator)
    labels = tokens.masked_fill(torch.rand(tokens.shape, generator=generator) < 0.2, IGNORE)
    labels[0, :6] = IGNORE
    if kind == "packed":
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS])
        return tokens, labels.masked_fill(positions == 0, IGNORE), positions, None
    mask = torch.ones_like(tokens)
    mask[1, 9:] = 0
    positions = torch.arange(LENGTH).expand(2, LENGTH).contiguous()
    return tokens.masked_fill(mask == 0, 0), labels.masked_fill(mask == 0, IGNORE), positions, mask


def one_process(name: str, model: Any, kind: str, number: int) -> Tensor:
    """The loss of the batch; of packed documents each is given alone."""
    tokens, labels, _, mask = make_batch(kind, number)
    if kind == "padded":
        loss: Tensor = model(input_ids=tokens, labels=labels, attention_mask=mask).loss
        return loss
    total, count = torch.zeros((), dtype=torch.float64), (labels != IGNORE).sum()
    for row, sizes in enumerate(DOCUMENTS):
        for ids, own in zip(tokens[row].split(list(sizes)), labels[row].split(list(sizes))):
            if counted := int((own[1:] != IGNORE).sum()):
                total = total + model(input_ids=ids[None], labels=own[None]).loss * counted / count
    return total


@cache
def reference(name: str, num_batches: int) -> dict[str, Expected]:
    model, found = build(name), {}
    # Its source is read before the fork, once for all ranks.
    profile_of(model, 1)
    for kind in KINDS:
        model.zero_grad()
        with InDouble():
            loss = torch.stack(
                [one_process(name, model, kind, number) for number in range(num_batches)]
            ).mean()
            loss.backward()
        grads = {
            key: value.grad.clone()
            for key, value in model.named_parameters()
            if value.grad is not None
        }
        found[kind] = Expected(float(loss.detach()), grads)
    return found


def documented_step(model: nn.Module, kind: str, number: int) -> Tensor:
    """The loop of XTuner's document, word for word."""
    input_ids, labels, position_ids, attention_mask = make_batch(kind, number)
    input_ids, labels, position_ids, attention_mask = pad_for_sequence_parallel(  # type: ignore[assignment]
        input_ids, labels, position_ids, attention_mask
    )
    input_ids, labels, position_ids = split_for_sequence_parallel(  # type: ignore[assignment]
        input_ids, labels, position_ids
    )
    kwargs = {"attention_mask": attention_mask} if kind == "padded" else {}
    if "position_ids" in type(model).forward.__code__.co_varnames or kind == "packed":
        kwargs["position_ids"] = position_ids
    outputs = model(input_ids=input_ids, labels=labels, **kwargs)
    num_tokens_per_rank = (labels != -100).sum()
    return reduce_sequence_parallel_loss(outputs.loss, num_tokens_per_rank)


def train(
    names: list[str], size: int, expected: dict[str, dict[str, Expected]]
) -> dict[str, list[float]]:
    init_sequence_parallel(size)
    number, num_groups = dist.get_rank() // size, dist.get_world_size() // size
    found = {}
    for name in names:
        model = build(name)
        dispatch_modules(model)
        lengths = tokens_seen(model)
        for kind, answer in expected[name].items():
            model.zero_grad()
            lengths.clear()
            with InDouble():
                loss = documented_step(model, kind, number)
                loss.backward()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            own = {key: value.grad for key, value in model.named_parameters()}
            errors = [relative(own[key], grad, answer.grads) for key, grad in answer.grads.items()]
            loss_error = abs(float(mean) / num_groups / size / answer.loss - 1)
            found[f"{name}: {kind}"] = [loss_error, max(errors), *lengths]
    return found


def tokens_seen(model: nn.Module) -> list[int]:
    """Gets the number of tokens that the first layer computes in each forward."""
    lengths: list[int] = []
    layer = next(
        module for module in model.modules() if isinstance(module, nn.LayerNorm | nn.Linear)
    )
    layer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[:-1].numel()))
    return lengths


def relative(own: Tensor | None, expected: Tensor, every: dict[str, Tensor]) -> float:
    """The error of a parameter's gradient; an expert that no token of a rank chose has none
    there.
    """
    grad = torch.zeros_like(expected) if own is None else own.clone()
    dist.all_reduce(grad)
    whole = torch.stack([value.norm() for value in every.values()]).norm()
    return float(
        (grad / dist.get_world_size() - expected).norm()
        / torch.maximum(expected.norm(), FLOOR * whole)
    )


@cache
def errors_of(layout: tuple[int, int]) -> list[dict[str, list[float]]]:
    """For each rank the errors of every model; all models share one start of the ranks."""
    world_size, size = layout
    names = [name for found, name in CASES if found == layout]
    expected = {name: reference(name, world_size // size) for name in names}
    return run_ranks(partial(train, names, size, expected), world_size)


@pytest.mark.parametrize(("layout", "name"), CASES, ids=lambda value: str(value))
def test_the_documented_loop_is_exact(layout: tuple[int, int], name: str, support: Support) -> None:
    world_size, size = layout
    for rank in errors_of(layout):
        for kind in KINDS:
            loss, grads, *tokens = rank[f"{name}: {kind}"]
            assert loss <= EXACT
            assert grads <= EXACT
            assert tokens == [2 * math.ceil(LENGTH / size)]
    mode = "sp" if size == world_size else "dp × sp"
    support(
        "system", f"XTuner: {name}", mode, code="init_sequence_parallel(2); dispatch_modules(model)"
    )
