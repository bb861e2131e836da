"""Tiles on a CUDA device: sums in float32 that bfloat16 products are added to, the allocator's own
peak, dropout.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, LlamaConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from tests.memory.tiling.test_blocks import gradients
from ulysses_accel.memory import tile_mlp, tile_norm, track_allocations

pytestmark = pytest.mark.gpu


def test_peak_and_error() -> None:
    tokens, hidden, inner = 32768, 1024, 3584
    torch.manual_seed(0)
    module: nn.Module = (
        LlamaMLP(LlamaConfig(hidden_size=hidden, intermediate_size=inner)).cuda().bfloat16()
    )
    exact = copy.deepcopy(module).double()
    rows = torch.randn(1, tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    _, expected = gradients(exact, exact, rows.double())
    _, plain = gradients(module, module, rows)
    tile_mlp(module)
    _, found = gradients(module, module, rows)
    for name, grad in expected.items():
        error, usual = ((it[name].double() - grad).norm() / grad.norm() for it in (found, plain))
        # Adding to a float32 matrix in another order than cuBLAS does inside of one product.
        assert error <= 1.05 * usual, name
    with track_allocations(device="cuda") as tracked:
        module(rows)
    assert tracked.allocator_peak_bytes is not None
    assert tracked.allocator_peak_bytes <= 1.45 * rows.nbytes


def test_dropout_is_replayed() -> None:
    module = GPT2MLP(256, GPT2Config(n_embd=64, resid_pdrop=0.5)).cuda().train()
    tile_mlp(module, tile_bytes=100 * 256 * 4)
    rows = torch.randn(1, 1000, 64, device="cuda", requires_grad=True)
    output = module(rows)
    (grad,) = torch.autograd.grad(output.sum(), module.c_proj.bias)
    # Of a bias in front of dropout: how often each feature was kept, times two.
    assert torch.equal(grad, 2.0 * (output != 0).sum((0, 1)).float())


def test_norm() -> None:
    module = LlamaRMSNorm(512).cuda().bfloat16()
    rows = torch.randn(2, 5000, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    exact = copy.deepcopy(module).double()
    _, expected = gradients(exact, exact, rows.double())
    output, plain = gradients(module, module, rows)
    tile_norm(module)
    tiled_output, found = gradients(module, module, rows)
    assert torch.equal(tiled_output, output)
    for name, grad in expected.items():
        assert (found[name].double() - grad).norm() <= 1.05 * (
            plain[name].double() - grad
        ).norm(), name
