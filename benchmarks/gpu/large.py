"""Past 2^31 elements: tiled MLP, tiled loss and attention on tensors that 32-bit indices can't
reach.

Only sampled rows, among them the last ones, get a gradient. What they give can then be computed
from them alone, in float32, and all other rows' gradients must be exactly zero.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.scale import Scale, measured
from benchmarks.memory.measure import relative_error
from ulysses_accel.attention.strategy import usp_attention
from ulysses_accel.memory.tiled_loss.cross_entropy import tiled_cross_entropy
from ulysses_accel.memory.tiling.mlp import tile_mlp

# bfloat16 keeps 8 bits; results are sums of products that are each rounded once or twice.
TOLERANCE = 2e-2


def _samples(length: int, count: int, device: torch.device) -> Tensor:
    """Rows all over the sequence, and the last ones."""
    spread = torch.linspace(0, length - 1, count - 8).long()
    rows: Tensor = torch.cat([spread, torch.arange(length - 8, length)]).unique()
    return rows.to(device)


def _random(scale: Scale, *shape: int, factor: float = 1.0) -> Tensor:
    return torch.randn(*shape, device=scale.device, dtype=scale.dtype).mul_(factor)


def _result(
    scale: Scale, tokens: int, size: int, errors: dict[str, float], zeros: bool
) -> dict[str, Any]:
    is_right = zeros and all(error <= TOLERANCE for error in errors.values())
    texts = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    verdict = "right" if is_right else "WRONG"
    others = "other rows zero" if zeros else "other rows NOT zero"
    elements = tokens * size / 2**31
    finding = f"{verdict} at {elements:.3f} x 2^31 elements: errors {texts}; {others}"
    return {"tokens": tokens, "errors": errors, "is_right": is_right, "finding": finding}


def _other_rows_are_zero(grad: Tensor, rows: Tensor) -> bool:
    """`grad [S, ..]`, which is changed."""
    grad[rows] = 0
    return not any(bool(part.any()) for part in grad.split(65_536))


def large_mlp(scale: Scale) -> dict[str, Any]:
    """Llama's MLP."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    torch.manual_seed(0)
    config = scale.config(layers=1, tokens=16)
    with torch.device(scale.device):
        mlp = LlamaMLP(config).to(scale.dtype)
    hidden = _random(scale, 1, scale.large, scale.hidden).requires_grad_()
    rows = _samples(scale.large, 512, scale.device)
    grad = torch.zeros_like(hidden)
    grad[0, rows] = _random(scale, len(rows), scale.hidden)
    reference = [parameter.detach().float().requires_grad_() for parameter in mlp.parameters()]
    tile = hidden.detach()[0, rows].float().requires_grad_()
    gate, up, down = reference
    output = F.linear(F.silu(F.linear(tile, gate)) * F.linear(tile, up), down)
    output.backward(grad[0, rows].float())
    tile_mlp(mlp)
    with measured(scale) as found:
        result = mlp(hidden)
        result.backward(grad)
    assert hidden.grad is not None
    errors = {
        "output": relative_error(result.detach()[0, rows], output.detach().double()),
        "dX": relative_error(hidden.grad[0, rows], _grad(tile)),
        "dW": max(relative_error(_grad(p), _grad(r)) for p, r in zip(mlp.parameters(), reference)),
    }
    zeros = _other_rows_are_zero(hidden.grad[0], rows)
    return found | _result(scale, scale.large, scale.hidden, errors, zeros)


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad.double()


def large_loss(scale: Scale) -> dict[str, Any]:
    """Logits and loss; the tokens that are not sampled have weight zero, and are computed like the
    others.
    """
    torch.manual_seed(0)
    hidden = _random(scale, 1, scale.large, scale.hidden).requires_grad_()
    weight = nn.Parameter(_random(scale, scale.vocabulary, scale.hidden, factor=scale.hidden**-0.5))
    labels = torch.randint(scale.vocabulary, (1, scale.large), device=scale.device)
    rows = _samples(scale.large, 512, scale.device)
    weights = torch.zeros(1, scale.large, device=scale.device)
    weights[0, rows] = 1.0
    tile = hidden.detach()[0, rows].float().requires_grad_()
    wide = weight.detach().float().requires_grad_()
    expected = F.cross_entropy(F.linear(tile, wide), labels[0, rows], reduction="sum")
    expected.backward()
    with measured(scale) as found:
        total, _ = tiled_cross_entropy(
            hidden, weight, labels, token_weights=weights, tile_tokens=scale.loss_tile
        )
        total.backward()
    assert hidden.grad is not None
    errors = {
        "loss": relative_error(total.detach(), expected.detach().double()),
        "dX": relative_error(hidden.grad[0, rows], _grad(tile)),
        "dW": relative_error(_grad(weight), _grad(wide)),
    }
    zeros = _other_rows_are_zero(hidden.grad[0], rows)
    return found | _result(scale, scale.large, scale.hidden, errors, zeros)


def large_attention(scale: Scale) -> dict[str, Any]:
    """Causal attention with grouped heads, whose calls our strategy keeps below the limit; torch's
    one call beside.
    """
    torch.manual_seed(0)
    heads, key_heads, size = scale.heads, scale.key_heads, scale.hidden // scale.heads
    query = _random(scale, 1, heads, scale.large, size).requires_grad_()
    key, value = (
        _random(scale, 1, key_heads, scale.large, size).requires_grad_() for _ in range(2)
    )
    rows = _samples(scale.large, 64, scale.device)
    grad = torch.zeros_like(query)
    grad[0, :, rows] = _random(scale, heads, len(rows), size)
    with measured(scale) as found:
        output = usp_attention(query, key, value, None, None)
        output.backward(grad)
    errors = _attention_errors((query, key, value), output, grad, rows)
    assert query.grad is not None
    zeros = all(_other_rows_are_zero(of_head, rows) for of_head in query.grad[0])
    result = found | _result(scale, scale.large, heads * size, errors, zeros)
    result["finding"] += (
        f"; torch in one call: {_one_call(query, key, value, grad, output.detach(), rows)}"
    )
    return result


def _attention_errors(
    tensors: tuple[Tensor, ...], output: Tensor, grad: Tensor, rows: Tensor
) -> dict[str, float]:
    """Against plain float32 attention of the sampled queries, one key/value head at a time."""
    query, key, value = tensors
    group = query.shape[1] // key.shape[1]
    errors = dict.fromkeys(("output", "dQ", "dK", "dV"), 0.0)
    positions = torch.arange(key.shape[2], device=key.device)
    for head in range(key.shape[1]):
        heads = slice(head * group, (head + 1) * group)
        q = query.detach()[0, heads, rows].float().requires_grad_()
        k, v = (tensor.detach()[0, head].float().requires_grad_() for tensor in (key, value))
        scores = (q @ k.t()) * q.shape[-1] ** -0.5
        found = scores.masked_fill(positions > rows[:, None], float("-inf")).softmax(-1) @ v
        del scores
        found.backward(grad[0, heads, rows].float())
        pairs = {
            "output": (output.detach()[0, heads, rows], found.detach().double()),
            "dQ": (_rows_of(query, heads, rows), _grad(q)),
            "dK": (key.grad[0, head], _grad(k)),  # type: ignore[index]
            "dV": (value.grad[0, head], _grad(v)),  # type: ignore[index]
        }
        errors = {name: max(errors[name], relative_error(*pair)) for name, pair in pairs.items()}
    return errors


def _rows_of(query: Tensor, heads: slice, rows: Tensor) -> Tensor:
    assert query.grad is not None
    return query.grad[0, heads, rows].double()


def _one_call(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, ours: Tensor, rows: Tensor
) -> str:
    """What torch does without head chunks: for comparison only."""
    found = query.grad
    query.grad = None
    try:
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        output.backward(grad)
        error = relative_error(output.detach()[0, :, rows], ours[0, :, rows].double())
        return f"differs by {error:.1e}"
    except RuntimeError as error:
        return f"fails ({str(error).strip().splitlines()[0][:80]})"
    finally:
        query.grad = found
