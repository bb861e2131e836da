"""Which blocks are tiled, by which way, and that each gives what it gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BloomConfig,
    DistilBertConfig,
    FalconConfig,
    GemmaConfig,
    GPT2Config,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    T5Config,
)

from ulysses_accel.errors import UnsupportedModelError
from ulysses_accel.memory import find_tileable, tile_mlp, tile_mlps
from ulysses_accel.memory.tiling.probe import small_copy
from ulysses_accel.memory.tiling.structure import make_plan

# The same products in the same order but for sums over tiles, of some hundred float64 terms: some
# 1e-15 of a gradient.
EXACT = 1e-12

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_GPT: dict[str, Any] = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 4,
    "n_positions": 64,
}
_EXPERTS = {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
_FINE = {**_GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_T5: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 1,
    "num_heads": 4,
}

# Model, and what is tiled in it: by its formula, or rerun row by row.
MODELS: dict[str, tuple[Any, Any, dict[str, str]]] = {
    "llama": (AutoModelForCausalLM, LlamaConfig(**_GROUPED, mlp_bias=True), {"mlp": "formula"}),
    "gemma": (AutoModelForCausalLM, GemmaConfig(**_GROUPED, head_dim=8), {"mlp": "formula"}),
    "phi": (AutoModelForCausalLM, PhiConfig(**_GROUPED), {"mlp": "formula"}),
    "phi3": (AutoModelForCausalLM, Phi3Config(**_GROUPED), {"mlp": "formula"}),
    "lfm2": (
        AutoModelForCausalLM,
        Lfm2Config(**_GROUPED, layer_types=["full_attention"]),
        {"feed_forward": "formula"},
    ),
    "falcon": (AutoModelForCausalLM, FalconConfig(**_SIZES), {"mlp": "formula"}),
    "gpt2": (AutoModelForCausalLM, GPT2Config(**_GPT, resid_pdrop=0.0), {"mlp": "formula"}),
    "gpt2 dropout": (AutoModelForCausalLM, GPT2Config(**_GPT, resid_pdrop=0.1), {"mlp": "rows"}),
    "bloom": (
        AutoModelForCausalLM,
        BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4),
        {"mlp": "rows"},
    ),
    "bert": (AutoModelForMaskedLM, BertConfig(**_SIZES), {"0": "rows"}),
    "distilbert": (
        AutoModelForMaskedLM,
        DistilBertConfig(vocab_size=60, dim=32, hidden_dim=48, n_layers=1, n_heads=4),
        {"ffn": "rows"},
    ),
    "t5": (
        AutoModelForSeq2SeqLM,
        T5Config(**_T5, dropout_rate=0.0, feed_forward_proj="gated-gelu", decoder_start_token_id=0),
        {"DenseReluDense": "formula"},
    ),
    "mixtral": (AutoModelForCausalLM, MixtralConfig(**_EXPERTS), {"experts": "rows"}),
    "gpt_oss": (AutoModelForCausalLM, GptOssConfig(**_EXPERTS, head_dim=8), {"experts": "rows"}),
    "qwen3_moe": (
        AutoModelForCausalLM,
        Qwen3MoeConfig(**_FINE, num_experts=8, head_dim=8),
        {"experts": "rows"},
    ),
    "qwen2_moe": (
        AutoModelForCausalLM,
        Qwen2MoeConfig(**_FINE, num_experts=4, shared_expert_intermediate_size=24),
        {"experts": "rows", "shared_expert": "formula"},
    ),
    "llama4": (
        AutoModelForCausalLM,
        Llama4TextConfig(**_EXPERTS, intermediate_size_mlp=48, head_dim=8),
        {"shared_expert": "formula"},
    ),
}


def build(name: str, device: str = "cpu") -> nn.Module:
    """A float64 model without dropout, but for the ways that tiles are chosen."""
    auto, config, _ = MODELS[name]
    with torch.device(device):
        torch.manual_seed(0)
        # Grouped products are not made in float64.
        built: nn.Module = auto.from_config(config, experts_implementation="eager")
    return built.double().train()


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


def gradients(
    function: Callable[..., Tensor], module: nn.Module, *inputs: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of a sum with fixed weights; inputs by their number, parameters by their
    name.
    """
    for parameter in module.parameters():
        parameter.grad = None
    inputs = tuple(
        tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs
    )
    output = function(*inputs)
    weights = torch.randn(
        output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    output.backward(weights.to(output))
    grads = {
        name: parameter.grad
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    grads.update(
        {str(i): tensor.grad for i, tensor in enumerate(inputs) if tensor.grad is not None}
    )
    return output.detach(), grads


def assert_same(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = EXACT
) -> None:
    assert found.keys() == expected.keys()
    assert expected
    for name, grad in expected.items():
        assert found[name].dtype == grad.dtype
        assert (found[name] - grad).norm() <= tolerance * grad.norm().clamp(min=1e-4), name


def ways(model: nn.Module) -> dict[str, str]:
    tileable, _ = find_tileable(model)
    chunked = {
        name: "feed_forward_chunk"
        for name in tileable
        if hasattr(tileable[name], "feed_forward_chunk")
    }
    chunked.update({name: "ff_chunk" for name in tileable if hasattr(tileable[name], "ff_chunk")})
    plans = {
        name: make_plan(module, chunked.get(name, "forward")) for name, module in tileable.items()
    }
    return {
        name.rpartition(".")[2]: "formula" if plan.formula else "rows"
        for name, plan in plans.items()
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_blocks_are_found_by_structure(name: str, device: str) -> None:
    assert ways(build(name, device)) == MODELS[name][2]


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gpt2 dropout"])
def test_a_tiled_model_is_the_model(name: str) -> None:
    model = without_dropout(build(name))
    ids = torch.randint(3, 60, (2, 13), generator=torch.Generator().manual_seed(0))
    seen = {"labels": ids} if name == "t5" else {}

    def logits() -> Tensor:
        output: Tensor = model(input_ids=ids, **seen).logits
        return output

    expected_output, expected = gradients(logits, model)
    names = list(model.state_dict())
    # Five rows at most, of 26.
    installed = tile_mlps(model, tile_bytes=5 * 48 * 8)
    output, found = gradients(logits, model)
    assert list(model.state_dict()) == names
    assert_same(found, expected)
    assert (output - expected_output).norm() <= EXACT * expected_output.norm()
    installed.close()
    installed.close()
    assert not any(
        {"forward", "ff_chunk", "feed_forward_chunk", "_z3_leaf"} & set(vars(it))
        for it in model.modules()
    )
    assert_same(gradients(logits, model)[1], expected, tolerance=0.0)


def test_what_can_not_be_tiled_is_named() -> None:
    with torch.device("meta"):
        config = OPTConfig(
            vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4
        )
        model = AutoModelForCausalLM.from_config(config)
    tileable, refused = find_tileable(model)
    assert not tileable
    assert "OPTDecoderLayer computes fc1, fc2 inside" in refused["model.decoder.layers.0"]
    with pytest.raises(
        UnsupportedModelError, match=r"OPTForCausalLM has no feed-forward block to tile.*fc1, fc2"
    ):
        tile_mlps(model)
    _, refused = find_tileable(build("llama4", "meta"))
    assert (
        "Llama4TextExperts computes its experts" in refused["model.layers.0.feed_forward.experts"]
    )


class Block(nn.Module):
    """Looks like Llama's, and does what it is told on the way."""

    def __init__(
        self, extra: Callable[[Tensor], Any], before: Callable[[Tensor], Any] = lambda x: x
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(32, 48, bias=False)
        self.up_proj = nn.Linear(32, 48, bias=False)
        self.down_proj = nn.Linear(48, 32, bias=False)
        self.act_fn = nn.SiLU()
        self.extra, self.before = extra, before

    def forward(self, x: Tensor) -> Any:
        x = self.before(x)
        return self.extra(self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Block(lambda y: y - y.mean(1, keepdim=True)), "depends on other tokens"),
        (Block(lambda y: y.cumsum(-2)), "depends on other tokens"),
        (Block(lambda y: (y, y)), "it returns tuple"),
        (Block(lambda y: y[..., :1, :]), r"its output has shape \[1, 1, 8\]"),
        (Block(lambda y: y, lambda x: x.mul_(2)), "changes its input in place"),
        (Block(lambda y: y.view(3, 5)), "a small copy of it could not be run"),
    ],
)
def test_a_look_alike_is_refused(block: Block, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        tile_mlp(block)
    assert "forward" not in vars(block)


@pytest.mark.parametrize(
    "extra", [lambda y: 2 * y, lambda y: y + 1, lambda y: y / y.norm(dim=-1, keepdim=True)]
)
def test_a_look_alike_with_more_to_it_is_rerun(extra: Callable[[Tensor], Tensor]) -> None:
    block = Block(extra).double()
    assert make_plan(block).formula is None
    hidden = torch.randn(2, 7, 32, dtype=torch.float64, requires_grad=True)
    _, expected = gradients(block, block, hidden)
    tile_mlp(block, tile_bytes=4 * 48 * 8)
    assert_same(gradients(block, block, hidden)[1], expected)


@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "a", "b"), ("b", "c", "a")])
def test_the_formula_does_not_depend_on_names(order: tuple[str, str, str]) -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, sizes in zip(sorted(order), ((32, 32),) * 3):
                setattr(self, name, nn.Linear(*sizes))

        def forward(self, states: Tensor) -> Tensor:
            gate, up, down = (getattr(self, name) for name in order)
            result: Tensor = down(torch.sigmoid(gate(states)) * up(states))
            return result

    formula = make_plan(small_copy(Renamed())).formula
    assert formula is not None
    assert (formula.linears, formula.activation) == (order, "sigmoid")
