"""A checkpointed model's gradients are the plain model's to the bit: every layer runs the same
operations twice.

Bit equality is asked for, not a tolerance: nothing is summed in another order.
"""

from __future__ import annotations

import gc
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from ulysses_accel.errors import ConfigError, UlyssesAccelError, UnsupportedModelError
from ulysses_accel.memory.checkpoint.layers import CheckpointedLayers, checkpoint_layers
from ulysses_accel.memory.skip_output import recomputing, unneeded_output

LAYERS, ROWS, TOKENS, HIDDEN = 5, 2, 24, 32
INPUT_BYTES = ROWS * TOKENS * HIDDEN * 8
Result = tuple[Tensor, dict[str, Tensor], Tensor]


def llama(dropout: float = 0.1, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=90,
        attention_dropout=dropout,
        use_cache=False,
        **changes,
    )
    return LlamaForCausalLM(config).double().train()


def tokens(seed: int = 3) -> Tensor:
    return torch.randint(0, 90, (ROWS, TOKENS), generator=torch.Generator().manual_seed(seed))


def step(model: nn.Module, *batches: Tensor) -> Result:
    """Runs all forwards, then one backward."""
    model.zero_grad()
    torch.manual_seed(7)
    losses = [model(input_ids=batch, labels=batch).loss for batch in batches or (tokens(),)]
    total = torch.stack(losses).sum()
    total.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return total.detach(), grads, torch.get_rng_state()


def assert_same(found: Result, expected: Result) -> None:
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert torch.equal(found[1][name], grad), name
    assert torch.equal(found[2], expected[2]), "the random numbers go on elsewhere"


@pytest.mark.parametrize(
    ("every_n_layers", "offload", "keep_last"),
    [*itertools.product((1, 2, 3, 5), (False, True), (0, 1)), (2, True, 9)],
)
def test_gradients_and_random_numbers(every_n_layers: int, offload: bool, keep_last: int) -> None:
    model = llama()
    expected = step(model)
    engine = checkpoint_layers(
        model, every_n_layers=every_n_layers, offload=offload, keep_last=keep_last
    )
    for _ in range(2):
        assert_same(step(model), expected)
    assert engine.num_recomputed == 2 * LAYERS
    kept = -(-LAYERS // every_n_layers) - keep_last
    assert engine.slab.num_bytes == (max(kept, 0) * INPUT_BYTES if offload else 0)
    assert engine.slab.num_bytes_used == 0
    engine.close()
    assert_same(step(model), expected)
    assert engine.num_recomputed == 2 * LAYERS


def test_two_forwards_before_one_backward() -> None:
    model = llama()
    expected = step(model, tokens(1), tokens(2))
    engine = checkpoint_layers(model, every_n_layers=2, offload=True)
    assert_same(step(model, tokens(1), tokens(2)), expected)
    assert engine.slab.num_bytes == 2 * 2 * INPUT_BYTES


def test_a_second_backward_through_a_kept_graph() -> None:
    model = llama()
    expected = step(model)
    checkpoint_layers(model, offload=True)
    torch.manual_seed(7)
    model.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[1][name]), name


def test_autocast_is_that_of_the_forward() -> None:
    model = llama().float()

    def amp_step() -> Result:
        model.zero_grad()
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        return (
            loss.detach(),
            {n: p.grad.clone() for n, p in model.named_parameters()},
            torch.get_rng_state(),
        )

    expected = amp_step()
    checkpoint_layers(model, every_n_layers=2, offload=True)
    assert_same(amp_step(), expected)


def test_only_one_input_of_each_kept_layer_is_held() -> None:
    model = llama(dropout=0.0)
    for every, expected in ((1, LAYERS), (2, 3)):
        engine = checkpoint_layers(model, every_n_layers=every)
        before = live_bytes((ROWS, TOKENS, HIDDEN))
        loss = model(input_ids=tokens(), labels=tokens()).loss
        # The embedding's output is the first input; what the last norm and the head hold comes on
        # top.
        assert live_bytes((ROWS, TOKENS, HIDDEN)) - before <= (expected + 3) * INPUT_BYTES
        loss.backward()
        engine.close()


def live_bytes(shape: tuple[int, ...]) -> int:
    gc.collect()
    found = {
        thing.untyped_storage().data_ptr(): thing.untyped_storage().nbytes()
        for thing in gc.get_objects()
        if isinstance(thing, Tensor) and thing.shape == shape
    }
    return sum(found.values())


def test_nested_checkpointing() -> None:
    model = llama()
    expected = step(model)
    for layer in model.model.layers:
        inner = layer.mlp.forward
        layer.mlp.forward = lambda hidden, inner=inner: checkpoint(
            inner, hidden, use_reentrant=False
        )
    checkpoint_layers(model, offload=True, every_n_layers=2)
    assert_same(step(model), expected)


def test_no_gradient_and_evaluation_pass_straight_through() -> None:
    model = llama()
    engine = checkpoint_layers(model, offload=True)
    with torch.no_grad():
        model(input_ids=tokens())
    model.eval()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert (engine.num_recomputed, engine.slab.num_bytes) == (0, 0)


def test_frozen_layers_and_embeddings() -> None:
    model = llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.2" in name or "lm_head" in name)
    expected = step(model)
    checkpoint_layers(model, offload=True)
    assert_same(step(model), expected)


def test_memory_is_free_after_an_exception() -> None:
    model = llama()
    engine = checkpoint_layers(model, offload=True)
    handle = model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=tokens(), labels=tokens())
    gc.collect()
    assert engine.slab.num_bytes_used == 0
    handle.remove()
    expected = step(llama())
    assert_same(step(model), expected)


def test_an_exception_in_the_backward_pass_frees_the_rest() -> None:
    model = llama()
    engine = checkpoint_layers(model, offload=True)
    loss = model(input_ids=tokens(), labels=tokens()).loss
    handle = model.model.layers[1].register_full_backward_pre_hook(lambda *_: 1 / 0)
    loss = model(input_ids=tokens(), labels=tokens()).loss
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    handle.remove()
    del loss
    gc.collect()
    assert engine.slab.num_bytes_used == 0


def test_an_input_modified_in_place_is_noticed_on_the_device_and_harmless_on_the_host() -> None:
    model = llama(dropout=0.0)
    expected = step(model)

    def spoil(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        with torch.no_grad():
            args[0].zero_()

    engine = checkpoint_layers(model)
    handle = model.model.layers[2].register_forward_hook(spoil)
    with pytest.raises(UlyssesAccelError, match="modified in place"):
        step(model)
    engine.close()
    checkpoint_layers(model, offload=True, keep_last=0)
    found = step(model)
    handle.remove()
    assert torch.equal(found[0], expected[0])
    for name in ("model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert torch.equal(found[1][name], expected[1][name]), name


@pytest.mark.parametrize("before", [True, False])
def test_transformers_own_checkpointing_before_or_after(before: bool) -> None:
    model = llama()
    expected = step(model)
    if before:
        model.gradient_checkpointing_enable()
    engine = checkpoint_layers(model, offload=True)
    if not before:
        model.gradient_checkpointing_enable()
    assert_same(step(model), expected)
    assert engine.num_recomputed == LAYERS
    engine.close()
    flags = {getattr(layer, "gradient_checkpointing", False) for layer in model.model.layers}
    assert flags == {before}


def test_an_encoder_that_takes_its_mask_by_name() -> None:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    model = BertForMaskedLM(BertConfig(vocab_size=90, **sizes)).double().train()
    expected = step(model)
    engine = checkpoint_layers(model, every_n_layers=2, offload=True)
    assert_same(step(model), expected)
    assert engine.num_recomputed == 3


class _Twice(torch.autograd.Function):
    """As a tiled block does it: computes an output, or leaves it out, and then saves what its
    backward needs.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, left_out: list[bool]) -> Tensor:
        left_out.append(recomputing())
        ctx.save_for_backward(hidden)
        return unneeded_output(hidden) if recomputing() else hidden * hidden

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return 2 * grad * ctx.saved_tensors[0], None


class Elided(nn.Module):
    """A block that hands back nothing of value where its output is not needed."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.left_out: list[bool] = []

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = _Twice.apply(self.inner(hidden), self.left_out)
        return out


@pytest.mark.parametrize("norm_behind", [False, True])
def test_outputs_are_left_out_only_where_nobody_reads_them(norm_behind: bool) -> None:
    model = llama(dropout=0.0)
    for layer in model.model.layers:
        layer.mlp = Elided(layer.mlp)
        if norm_behind:
            # As in Gemma 2: a norm behind the block saves the block's output.
            layer.mlp = nn.Sequential(layer.mlp, nn.RMSNorm(HIDDEN).double())
    expected = step(model)
    checkpoint_layers(model)
    for _ in range(3):
        assert_same(step(model), expected)
    blocks = [module for module in model.modules() if isinstance(module, Elided)]
    # The first recompute is a probe and a proper one; where the probe finds a reader, it stays the
    # only one.
    expected_runs = [False, True, False, not norm_behind, *[False, not norm_behind] * 2]
    assert [block.left_out[1:] for block in blocks] == [expected_runs] * LAYERS


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="every_n_layers=0"):
        checkpoint_layers(llama(), every_n_layers=0)
    with pytest.raises(UnsupportedModelError, match="Linear has no layers"):
        checkpoint_layers(nn.Linear(2, 2))


def test_slab_is_freed_by_close() -> None:
    model = llama()
    engine: CheckpointedLayers = checkpoint_layers(model, offload=True)
    step(model)
    assert engine.slab.num_bytes > 0
    engine.close()
    assert engine.slab.num_bytes == 0
