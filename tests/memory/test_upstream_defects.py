"""B18 and B19 of upstream's tiled compute, each shown absent here; float64, 1e-12 of the plain
computation.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from ulysses_accel.memory import tile_mlp, tiled_cross_entropy

CLOSE = 1e-12
TOKENS, WIDTH, VOCAB = 9, 16, 40


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for own, right in zip(found, expected, strict=True):
        assert (own - right).norm() <= CLOSE * right.norm()


def tiled(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    loss, _ = tiled_cross_entropy(hidden, weight, labels, tile_tokens=4)
    return loss


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_b18_the_heads_gradient_follows_the_scale_of_the_loss(is_checkpointed: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, VOCAB, (TOKENS,))
    plain = F.cross_entropy(hidden @ weight.T, labels, reduction="sum") / TOKENS
    compute: Callable[..., Tensor] = tiled
    if is_checkpointed:
        loss = checkpoint(compute, hidden, weight, labels, use_reentrant=False) / TOKENS
    else:
        loss = compute(hidden, weight, labels) / TOKENS
    assert_close(gradients(loss, hidden, weight), gradients(plain, hidden, weight))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return LlamaMLP(
        LlamaConfig(hidden_size=WIDTH, intermediate_size=24, num_attention_heads=2)
    ).double()


@pytest.mark.parametrize("tokens", [1, 2, 5, 7, 11])
@pytest.mark.parametrize("is_frozen_input", [False, True])
def test_b19_odd_tiles_and_frozen_inputs_reach_every_weight_once(
    tokens: int, is_frozen_input: bool
) -> None:
    block = mlp()
    hidden = torch.randn(1, tokens, WIDTH, dtype=torch.float64, requires_grad=not is_frozen_input)
    leaves = [*block.parameters(), *([] if is_frozen_input else [hidden])]
    weights = torch.randn(1, tokens, WIDTH, dtype=torch.float64)
    expected = gradients((block(hidden) * weights).sum(), *leaves)
    reached = {name: 0 for name, _ in block.named_parameters()}

    def count(name: str) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            reached[name] += 1

        return hook

    # Three rows in a tile: five tokens are two tiles, where three were asked for of upstream.
    tile_mlp(block, tile_bytes=3 * 24 * 8)
    assert_close(gradients((block(hidden) * weights).sum(), *leaves), expected)
    for name, parameter in block.named_parameters():
        parameter.register_post_accumulate_grad_hook(count(name))
    (block(hidden) * weights).sum().backward()
    # ZeRO and DDP reduce a gradient when it is accumulated: once, and not once a tile.
    assert set(reached.values()) == {1}


def test_b19_dropout_inside_a_tile_is_the_one_of_the_forward() -> None:
    block = mlp().train()
    block.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    tile_mlp(block, tile_bytes=3 * 24 * 8)
    hidden = torch.randn(1, 7, WIDTH, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    out = block(hidden)
    (grad,) = gradients(out.sum(), hidden)
    step = 1e-6 * torch.randn_like(hidden)
    torch.manual_seed(3)
    above = block(hidden.detach() + step)
    torch.manual_seed(3)
    below = block(hidden.detach() - step)
    # A central difference is off by the step squared; another mask would be off by the values
    # themselves.
    assert float((above - below).sum() / 2) == pytest.approx(float((grad * step).sum()), rel=1e-5)
