"""What tiles cost and keep: bytes, products, gradients under every circumstance that a block can be
called in.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.memory.tiling.test_blocks import EXACT, assert_same, gradients
from ulysses_accel.errors import ConfigError, UnsupportedModelError
from ulysses_accel.memory import tile_mlp, track_allocations
from ulysses_accel.memory.skip_output import recomputing, skip_unneeded_outputs
from ulysses_accel.memory.tiling.rows import MAX_TILE_BYTES, MIN_TILE_ROWS, rows_per_tile, tiles

HIDDEN, INNER = 32, 48
# Five rows.
TILE = 5 * INNER * 8
SHAPES = [(13,), (1, 13), (3, 7), (2, 2, 5), (1, 1)]


def llama(hidden: int = HIDDEN, inner: int = INNER, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return LlamaMLP(
        LlamaConfig(hidden_size=hidden, intermediate_size=inner, mlp_bias=bias)
    ).double()


def gpt2(dropout: float) -> nn.Module:
    torch.manual_seed(0)
    return GPT2MLP(INNER, GPT2Config(n_embd=HIDDEN, resid_pdrop=dropout)).double().train()


def rows_of(*shape: int, requires_grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, HIDDEN, generator=generator, dtype=torch.float64).requires_grad_(
        requires_grad
    )


class LowRank(nn.Module):
    """A linear layer with an adapter, built as PEFT builds it."""

    def __init__(self, base: nn.Linear, dropout: float) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_dropout = nn.Dropout(dropout)
        self.lora_A = nn.ModuleDict(
            {"default": nn.Linear(base.in_features, 8, bias=False).double()}
        )
        self.lora_B = nn.ModuleDict(
            {"default": nn.Linear(8, base.out_features, bias=False).double()}
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x)
        return result + 2.0 * self.lora_B["default"](self.lora_A["default"](self.lora_dropout(x)))


def with_adapters(module: nn.Module, dropout: float = 0.0) -> nn.Module:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, LowRank(child, dropout))
    return module


@given(
    num_rows=st.integers(0, 10**7),
    row_bytes=st.integers(1, 10**6),
    input_row_bytes=st.integers(1, 10**6),
    tile_bytes=st.none() | st.integers(1, 10**9),
)
def test_tiles_cover_the_rows(
    num_rows: int, row_bytes: int, input_row_bytes: int, tile_bytes: int | None
) -> None:
    rows = rows_per_tile(num_rows, row_bytes, input_row_bytes, tile_bytes)
    assert rows >= 1
    if tile_bytes is None:
        assert rows <= max(
            MIN_TILE_ROWS, min(MAX_TILE_BYTES, num_rows * input_row_bytes // 20) // row_bytes
        )
    else:
        assert rows <= max(1, tile_bytes // row_bytes)
    num_tiles = -(-num_rows // rows)
    assert num_rows - (num_tiles - 1) * rows <= rows or num_rows == 0
    if num_tiles < 1000:
        assert [row for tile in tiles(num_rows, rows) for row in (tile.start, tile.stop)][-1:] == [
            num_rows
        ][:num_tiles]


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        *itertools.product([llama, lambda: gpt2(0.0), lambda: with_adapters(llama())], SHAPES),
        # GPT-2 itself does not take an empty batch.
        *itertools.product([llama, lambda: with_adapters(llama())], [(0, 4), (0,)]),
    ],
)
def test_any_shape(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    module, hidden = build(), rows_of(*shape)
    output, expected = gradients(module, module, hidden)
    tile_mlp(module, tile_bytes=TILE)
    tiled_output, found = gradients(module, module, hidden)
    assert tiled_output.shape == output.shape
    assert torch.allclose(tiled_output, output, rtol=EXACT, atol=EXACT)
    assert_same(found, expected)


def test_strided_inputs_and_gradients() -> None:
    module, hidden = llama(), rows_of(3, 7)

    def across(x: Tensor) -> Tensor:
        return module(x.transpose(0, 1)).transpose(0, 1).sum(1, keepdim=True).expand(-1, 4, -1)

    _, expected = gradients(across, module, hidden)
    tile_mlp(module, tile_bytes=TILE)
    assert_same(gradients(across, module, hidden)[1], expected)


@pytest.mark.parametrize("build", [llama, lambda: with_adapters(llama())])
@pytest.mark.parametrize(
    "frozen",
    [
        ("gate_proj",),
        ("down_proj",),
        ("gate_proj", "up_proj"),
        ("gate_proj", "up_proj", "down_proj"),
    ],
)
@pytest.mark.parametrize("input_needs_grad", [True, False])
def test_frozen_weights(
    build: Callable[[], nn.Module], frozen: tuple[str, ...], input_needs_grad: bool
) -> None:
    module, hidden = build(), rows_of(2, 9, requires_grad=input_needs_grad)
    for name in frozen:
        module.get_submodule(name).requires_grad_(False)
    if not input_needs_grad and len(frozen) == 3:
        module.down_proj.requires_grad_(True)
    _, expected = gradients(module, module, hidden)
    tile_mlp(module, tile_bytes=TILE)
    assert_same(gradients(module, module, hidden)[1], expected)


def products(module: nn.Module, hidden: Tensor) -> float:
    with track_allocations() as tracked:
        module(hidden).sum().backward()
    return tracked.matmul_units(hidden.shape[:-1].numel(), HIDDEN, INNER)


def test_frozen_weights_cost_no_products() -> None:
    module = llama()
    tile_mlp(module, tile_bytes=TILE)
    assert products(module, rows_of(40)) == pytest.approx(3 + 8)
    module.requires_grad_(False)
    assert products(module, rows_of(40)) == pytest.approx(3 + 5)
    module.down_proj.requires_grad_(True)
    assert products(module, rows_of(40, requires_grad=False)) == pytest.approx(3 + 3)


def test_a_recompute_makes_no_products() -> None:
    module, hidden = llama(), rows_of(2, 20)
    _, expected = gradients(module, module, hidden)
    tile_mlp(module, tile_bytes=TILE)

    def recomputed(x: Tensor) -> Tensor:
        with torch.no_grad():
            module(x)
        assert not recomputing()
        with skip_unneeded_outputs(probe=True):
            assert recomputing()
            unneeded: Tensor = module(x)
        assert unneeded.isnan().all()
        return unneeded

    with track_allocations() as tracked:
        _, found = gradients(recomputed, module, hidden)
    assert tracked.matmul_units(40, HIDDEN, INNER) == pytest.approx(3 + 0 + 8)
    assert_same(found, expected)


def test_a_recompute_of_rerun_rows_leaves_the_output_out() -> None:
    module, hidden = with_adapters(llama()), rows_of(2, 20)
    _, expected = gradients(module, module, hidden)
    tile_mlp(module, tile_bytes=TILE)
    with skip_unneeded_outputs(probe=True):
        output, found = gradients(module, module, hidden)
    assert output.isnan().all()
    assert_same(found, expected)


@pytest.mark.parametrize("build", [lambda: gpt2(0.3), lambda: with_adapters(llama(), 0.3)])
def test_dropout_is_replayed(build: Callable[[], nn.Module]) -> None:
    module, hidden = build(), rows_of(2, 9)

    def tile_by_tile(x: Tensor) -> Tensor:
        parts = x.reshape(-1, HIDDEN).split(TILE // (INNER * 8))
        return torch.cat([module(part[None])[0] for part in parts]).view(x.shape)

    torch.manual_seed(5)
    output, expected = gradients(tile_by_tile, module, hidden)
    tile_mlp(module, tile_bytes=TILE)
    torch.manual_seed(5)
    tiled_output, found = gradients(module, module, hidden)
    after = torch.rand(1)
    torch.manual_seed(5)
    module(hidden.detach())
    assert torch.equal(torch.rand(1), after), "backward moved the generator"
    assert torch.equal(tiled_output, output)
    assert_same(found, expected)


@pytest.mark.parametrize("build", [llama, lambda: with_adapters(llama())])
def test_autocast(build: Callable[[], nn.Module]) -> None:
    module = build().float()
    hidden = rows_of(2, 9).detach().float().requires_grad_()

    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output: Tensor = module(x)
        return output

    exact, exact_grads = gradients(module, module, hidden)
    output, plain = gradients(cast, module, hidden)
    tile_mlp(module, tile_bytes=TILE)
    tiled_output, found = gradients(cast, module, hidden)
    assert output.dtype == tiled_output.dtype == torch.bfloat16
    assert torch.equal(tiled_output, output)
    assert not torch.equal(output.float(), exact)
    for name, grad in exact_grads.items():
        assert found[name].dtype == plain[name].dtype == torch.float32
        # A fifth more for roundings that fall otherwise in so few numbers.
        assert (found[name] - grad).norm() <= 1.2 * (plain[name] - grad).norm(), name


def test_a_block_used_twice_and_backward_twice() -> None:
    module, hidden = llama(), rows_of(2, 9)

    def twice(x: Tensor) -> Tensor:
        once: Tensor = module(x)
        again: Tensor = module(once + x)
        again.sum().backward(retain_graph=True)
        return again

    _, expected = gradients(twice, module, hidden)
    tile_mlp(module, tile_bytes=TILE)
    assert_same(gradients(twice, module, hidden)[1], expected)


def test_the_output_may_be_changed_in_place_and_a_weight_may_not() -> None:
    module, hidden = llama(), rows_of(2, 9)
    tile_mlp(module, tile_bytes=TILE)
    output = module(hidden)
    output += 1
    output.sum().backward()
    output = module(hidden)
    with torch.no_grad():
        module.up_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_hooks_on_children_still_see_every_token() -> None:
    module, hidden = llama(), rows_of(2, 9)
    seen: list[int] = []
    _, expected = gradients(module, module, hidden)
    tile_mlp(module, tile_bytes=TILE)
    module.up_proj.register_forward_hook(
        lambda _module, args, _output: seen.append(args[0].shape[:-1].numel())
    )
    _, found = gradients(module, module, hidden)
    assert_same(found, expected)
    # Forward, and backward's rerun.
    assert sum(seen) == 2 * 18
    assert max(seen) <= 5


def test_changes_after_installing_are_followed() -> None:
    module, hidden = llama(), rows_of(2, 9)
    tile_mlp(module, tile_bytes=TILE)
    module(hidden)
    reference = with_adapters(copy.deepcopy(llama()))
    with_adapters(module)
    module.load_state_dict(reference.state_dict())
    assert_same(gradients(module, module, hidden)[1], gradients(reference, reference, hidden)[1])


def test_a_deep_copy_has_its_own_weights() -> None:
    module, hidden = llama(), rows_of(2, 9)
    tile_mlp(module, tile_bytes=TILE)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.down_proj.weight.zero_()
        twin.down_proj.bias.zero_()
    assert not twin(hidden).any()
    assert module(hidden).any()


def test_another_forward_of_the_instance_is_kept() -> None:
    module, hidden = llama(), rows_of(2, 9)

    def doubled(self: Any, x: Tensor) -> Tensor:
        output: Tensor = 2 * type(self).forward(self, x)
        return output

    module.forward = MethodType(doubled, module)  # type: ignore[method-assign]
    _, expected = gradients(module, module, hidden)
    installed = tile_mlp(module, tile_bytes=TILE)
    assert_same(gradients(module, module, hidden)[1], expected)
    installed.close()
    assert module.forward.__func__ is doubled
    module.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModelError, match="was replaced by"):
        tile_mlp(module)


def test_compiled_models_break_their_graph_here() -> None:
    module, hidden = llama(), rows_of(2, 9)
    _, expected = gradients(module, module, hidden)
    tile_mlp(module, tile_bytes=TILE)
    compiled = torch.compile(lambda x: module(x + 0.0) * 1.0, backend="eager")
    assert_same(gradients(compiled, module, hidden)[1], expected)


def test_a_size_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="tile_bytes=0 is not a positive number"):
        tile_mlp(llama(), tile_bytes=0)


def test_peak_and_error_in_bfloat16() -> None:
    """3.5 times as many features inside, as in Llama, and enough tokens for tiles of more than the
    least rows.
    """
    exact, tokens, hidden, inner = llama(256, 896, bias=False), 10240, 256, 896
    module = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict(module.state_dict())
    rows = (
        torch.randn(1, tokens, hidden, generator=torch.Generator().manual_seed(1))
        .bfloat16()
        .requires_grad_()
    )
    unit = rows.nbytes

    def peer(x: Tensor) -> Tensor:
        output: Tensor = TiledMLP.apply(
            type(module).forward, module, x, 32, list(module.parameters())
        )
        return output

    def errors(function: Callable[[Tensor], Tensor]) -> dict[str, float]:
        _, found = gradients(function, module, rows)
        return {
            name: float((found[name].double() - grad).norm() / grad.norm())
            for name, grad in expected.items()
        }

    _, expected = gradients(exact, exact, rows.double())
    plain, theirs = errors(module), errors(peer)
    installed = tile_mlp(module)
    tiled = errors(module)
    for name in expected:
        # Equal but for the last digits: the products' own roundings are the same, the sums' are not
        # larger.
        assert tiled[name] <= 1.01 * plain[name], name
        assert name == "0" or tiled[name] < 7.3e-3 < theirs[name], name
    with track_allocations() as tracked:
        output = module(rows)
        assert tracked.peak_bytes <= 1.4 * unit
        assert tracked.live_bytes == unit
        tracked.reset_peak()
        output.backward(rows.detach())
    # Output, input's gradient, float32 sums of 0.66u, gradients of 0.33u, and the tile.
    assert tracked.peak_bytes <= 4.0 * unit
    assert tracked.matmul_units(tokens, hidden, inner) == pytest.approx(11)
    installed.close()
