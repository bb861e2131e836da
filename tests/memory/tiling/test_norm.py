"""Norms in tiles: the module's own numbers, its gradients at least as exact, and no float32 copy of
the sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.t5.modeling_t5 import T5LayerNorm

from tests.helpers.models import ExactNorm
from tests.memory.tiling.test_blocks import EXACT, assert_same, gradients
from ulysses_accel.errors import ConfigError, UnsupportedModelError
from ulysses_accel.memory import tile_mlps, tile_norm, tile_norms, track_allocations
from ulysses_accel.memory.skip_output import skip_unneeded_outputs
from ulysses_accel.memory.tiling.norm import RmsFormula, find_rms_formula

HIDDEN = 64
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "llama": LlamaRMSNorm,
    "gemma": GemmaRMSNorm,
    "gpt_oss": GptOssRMSNorm,
    "t5": T5LayerNorm,
    "cohere": CohereLayerNorm,
}
FORMULAS = {
    "llama": RmsFormula("variance_epsilon", 0, True),
    "gemma": RmsFormula("eps", 1, False),
    "gpt_oss": RmsFormula("variance_epsilon", 0, False),
    # What T5 gives for a float32 weight is not rounded to its input's dtype; Cohere's subtracts the
    # mean.
    "t5": None,
    "cohere": None,
}
# 100 rows.
TILE = 100 * HIDDEN * 4


def norm_of(name: str, dtype: torch.dtype, hidden: int = HIDDEN) -> nn.Module:
    module = NORMS[name](hidden).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            )
    return module


def rows_of(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    )


@pytest.mark.parametrize("name", NORMS)
def test_formulas_are_told_apart(name: str) -> None:
    assert find_rms_formula(norm_of(name, torch.float32)) == FORMULAS[name]


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        *itertools.product((torch.float32, torch.bfloat16, torch.float16), repeat=2),
        (torch.float64, torch.float64),
    ],
)
def test_outputs_are_the_modules_own(
    name: str, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    module, hidden = norm_of(name, weight_dtype), rows_of(2, 333, HIDDEN, dtype=dtype)
    output, expected = gradients(module, module, hidden)
    tile_norm(module, tile_bytes=TILE)
    tiled_output, found = gradients(module, module, hidden)
    assert tiled_output.dtype == output.dtype
    assert torch.equal(tiled_output, output)
    # Each of autograd's intermediates is rounded once; the tiled backward rounds its results only.
    narrow = max(
        torch.finfo(dtype).eps, torch.finfo(weight_dtype).eps, torch.finfo(torch.float32).eps
    )
    assert_same(found, expected, tolerance=4 * narrow)


@pytest.mark.parametrize("name", NORMS)
def test_gradients_are_no_less_exact(name: str) -> None:
    module, hidden = norm_of(name, torch.bfloat16), rows_of(2, 333, HIDDEN, dtype=torch.bfloat16)
    exact = norm_of(name, torch.bfloat16).double()
    _, expected = gradients(exact, exact, hidden.double())
    _, plain = gradients(module, module, hidden)
    tile_norm(module, tile_bytes=TILE)
    _, found = gradients(module, module, hidden)
    for key, grad in expected.items():
        # A norm that autograd reruns rounds each tile's part of the weight gradient once more.
        allowed = 1.01 if FORMULAS[name] else 1.5
        assert (found[key].double() - grad).norm() <= allowed * (
            plain[key].double() - grad
        ).norm(), key


@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 5), (2, 3, 4), (0, 4)])
def test_any_shape_in_float64(shape: tuple[int, ...]) -> None:
    module = ExactNorm(nn.Parameter(torch.linspace(-1, 2, HIDDEN, dtype=torch.float64)), 1e-6, 1.0)
    hidden = rows_of(*shape, HIDDEN)
    _, expected = gradients(module, module, hidden)
    tile_norm(module, tile_bytes=3 * HIDDEN * 4)
    assert_same(gradients(module, module, hidden)[1], expected, EXACT)


@pytest.mark.parametrize(("weight", "needed"), [(True, False), (False, True)])
def test_frozen(weight: bool, needed: bool) -> None:
    module, hidden = norm_of("llama", torch.float32), rows_of(2, 50, HIDDEN, dtype=torch.float32)
    module.requires_grad_(weight)
    hidden.requires_grad_(needed)
    _, expected = gradients(module, module, hidden)
    tile_norm(module, tile_bytes=TILE)
    assert_same(gradients(module, module, hidden)[1], expected, 4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("name", ["llama", "cohere"])
def test_a_recompute_needs_a_norms_output(name: str) -> None:
    module, hidden = norm_of(name, torch.float32), rows_of(2, 333, HIDDEN, dtype=torch.float32)
    expected = module(hidden)
    tile_norm(module, tile_bytes=TILE)
    with skip_unneeded_outputs(probe=True):
        assert torch.equal(module(hidden), expected)


@pytest.mark.parametrize("name", ["llama", "cohere"])
def test_bytes(name: str) -> None:
    tokens, hidden = 8192, 256
    module, rows = (
        norm_of(name, torch.bfloat16, hidden),
        rows_of(1, tokens, hidden, dtype=torch.bfloat16),
    )
    unit = rows.nbytes
    with track_allocations() as tracked:
        module(rows)
        assert tracked.peak_bytes >= 4 * unit
    tile_norm(module)
    with track_allocations() as tracked:
        output = module(rows)
        # A tile in float32 is a fifth; four are alive at a time.
        assert tracked.peak_bytes <= 1.9 * unit
        assert unit <= tracked.live_bytes <= unit + 4 * tokens
        tracked.reset_peak()
        output.backward(rows.detach())
    assert tracked.peak_bytes <= (3.2 if name == "llama" else 4.5) * unit


def layer_peak(layer: nn.Module, hidden: Tensor, **kwargs: Any) -> float:
    """Bytes beside the layer's input and parameters in its backward under checkpointing, in hidden
    tensors.
    """
    output = checkpoint(
        lambda x: layer(x, attention_mask=None, **kwargs), hidden, use_reentrant=True
    )
    grad = torch.ones_like(output)
    with track_allocations(layer) as tracked:
        output.backward(grad)
    for parameter in layer.parameters():
        parameter.grad = None
    hidden.grad = None
    return tracked.peak_bytes / hidden.nbytes


def test_the_working_set_of_a_llama_layer() -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=224,
        num_attention_heads=4,
        num_key_value_heads=1,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    # So many tokens that what is as large as the weights is small beside them.
    layer, tokens = LlamaDecoderLayer(config, 0).bfloat16(), 4096
    hidden = rows_of(1, tokens, 64, dtype=torch.bfloat16)
    positions = LlamaRotaryEmbedding(config)(hidden, torch.arange(tokens)[None])
    assert layer_peak(layer, hidden, position_embeddings=positions) > 30
    # A share of the sequence as large as the default takes of a long one.
    mlps = tile_mlps(layer, tile_bytes=hidden.nbytes // 20)
    assert layer_peak(layer, hidden, position_embeddings=positions) > 19
    norms, refused = tile_norms(layer, tile_bytes=hidden.nbytes // 20)
    assert not refused
    assert layer_peak(layer, hidden, position_embeddings=positions) <= 9.0
    norms.close()
    mlps.close()
    assert not any("forward" in vars(module) for module in layer.modules())


def test_only_norms_that_make_copies_are_tiled() -> None:
    with torch.device("meta"):
        gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=4))
    tile_norms(gpt2)
    assert not any("forward" in vars(module) for module in gpt2.modules())

    class AcrossTokens(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) * hidden_states.mean(1, keepdim=True)

    model = nn.ModuleDict({"one": LlamaRMSNorm(32), "other": AcrossTokens(32)})
    installed, refused = tile_norms(model)
    assert set(refused) == {"other"}
    assert "depends on other tokens" in refused["other"]
    assert "forward" in vars(model["one"])
    installed.close()
    with pytest.raises(UnsupportedModelError, match="AcrossTokens can't be computed in tiles"):
        tile_norm(model["other"])
    with pytest.raises(ConfigError, match="tile_bytes=-1"):
        tile_norm(model["one"], tile_bytes=-1)
