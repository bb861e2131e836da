"""Per-token log-probabilities against log_softmax of all logits; tolerances as in
test_tiled_loss.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.memory.tiled_loss.test_tiled_loss import assert_close, gradients, inputs
from ulysses_accel.errors import ConfigError, ShapeError
from ulysses_accel.memory import token_log_probs, track_allocations


def plain(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    heat: float,
) -> tuple[Tensor, Tensor]:
    """The definition, written with all logits: log-probabilities and entropies."""
    logits = scale * F.linear(x, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    all_of_them = (logits / heat).log_softmax(-1)
    counts = labels != -100
    picked = all_of_them.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return picked * counts, -(all_of_them.exp() * all_of_them).sum(-1) * counts


@settings(max_examples=80, deadline=None)
@given(
    shape=st.sampled_from([(5,), (2, 7), (2, 2, 3), (0,)]),
    tile_tokens=st.integers(1, 16),
    seed=st.integers(0, 1000),
    with_bias=st.booleans(),
    softcap=st.sampled_from([None, 0.7, 5.0]),
    scale=st.sampled_from([1.0, 0.3]),
    temperature=st.sampled_from([1.0, 0.6, 2.5]),
)
def test_every_option_against_plain_autograd(
    shape: tuple[int, ...],
    tile_tokens: int,
    seed: int,
    with_bias: bool,
    softcap: float | None,
    scale: float,
    temperature: float,
) -> None:
    x, weight, bias, labels = inputs(shape, seed=seed)
    used = bias if with_bias else None
    found, entropies = token_log_probs(
        x,
        weight,
        labels,
        bias=used,
        softcap=softcap,
        logit_scale=scale,
        temperature=temperature,
        tile_tokens=tile_tokens,
        entropy=True,
    )
    expected, expected_entropies = plain(x, weight, labels, used, softcap, scale, temperature)
    assert entropies is not None
    assert not entropies.requires_grad
    assert_close([found, entropies], [expected, expected_entropies])
    upstream = torch.randn(shape, dtype=torch.float64)
    ours, theirs = (found * upstream).sum() / 3, (expected * upstream).sum() / 3
    assert_close(gradients(ours, x, weight, used), gradients(theirs, x, weight, used))


def test_a_preference_loss_of_two_forwards() -> None:
    x, weight, _, labels = inputs()
    x2, _, _, labels2 = inputs(seed=1)

    def loss(function: object) -> Tensor:
        assert callable(function)
        margin = function(x, labels).sum(-1) - function(x2, labels2).sum(-1)
        return -F.logsigmoid(0.1 * margin).mean()

    ours = loss(lambda h, y: token_log_probs(h, weight, y, tile_tokens=4)[0])
    theirs = loss(lambda h, y: plain(h, weight, y, None, None, 1.0, 1.0)[0])
    assert_close([ours], [theirs])
    assert_close(gradients(ours, x, x2, weight), gradients(theirs, x, x2, weight))


def test_backward_may_run_twice() -> None:
    x, weight, _, labels = inputs()
    total = token_log_probs(x, weight, labels)[0].sum()
    first = torch.autograd.grad(total, x, retain_graph=True)
    assert_close(list(torch.autograd.grad(total, x)), list(first))


def test_bf16_gives_float32_and_grows_with_one_number_per_token() -> None:
    peaks = []
    for tokens in (1024, 4096):
        x, weight, _, labels = inputs((1, tokens), hidden=32, vocab=256, dtype=torch.bfloat16)
        with track_allocations() as tracked:
            found, none = token_log_probs(x, weight, labels, tile_tokens=64)
        peaks.append(tracked.peak_bytes)
        assert found.dtype == torch.float32
        assert none is None
        exact, _ = plain(
            x.detach().double(), weight.detach().double(), labels, None, None, 1.0, 1.0
        )
        # A label's logit and the largest one, both below 32, are rounded to bf16: by 2^-9 of that
        # at most.
        assert (found - exact).abs().max() <= 2 * 32 * 2**-9
    assert peaks[1] - peaks[0] <= 3 * 1024 * (4 + 17)


def test_frozen_hidden_states_cost_no_product() -> None:
    x, weight, _, labels = inputs()
    with track_allocations() as tracked:
        found, _ = token_log_probs(x.detach(), weight, labels, tile_tokens=100)
        gradients(found.sum(), weight)
    assert tracked.matmul_calls == 3


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"softcap": -1.0}, {"tile_tokens": -1}])
def test_settings_that_are_not_legal(wrong: dict[str, float]) -> None:
    x, weight, _, labels = inputs()
    with pytest.raises(ConfigError):
        token_log_probs(x, weight, labels, **wrong)  # type: ignore[arg-type]


def test_shapes_that_do_not_fit() -> None:
    x, weight, _, labels = inputs()
    with pytest.raises(ShapeError, match="don't fit"):
        token_log_probs(x, weight, labels[0])
