"""Blocks that hold less, beside their peers: a gated MLP, an RMS norm, and logits with their
loss.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.memory.measure import Forward, Problem, errors, measure
from ulysses_accel.memory.tiled_loss.cross_entropy import tiled_cross_entropy
from ulysses_accel.memory.tiling.mlp import tile_mlp
from ulysses_accel.memory.tiling.norm import tile_norm

HIDDEN, INTERMEDIATE, VOCABULARY = 256, 896, 8192
LOSS_HIDDEN, LOSS_VOCABULARY, LOSS_TILE = 128, 4096, 256
IGNORED_SHARE = 0.25
# The width of a tile in TRL's trainer.
TRL_CHUNK = 32_768

Row = dict[str, Any]


def _random(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(torch.bfloat16)


def _functional(module: nn.Module, names: list[str]) -> Forward:
    """The module as a function of its input and its parameters, which are put into it first."""

    def forward(hidden: Tensor, *weights: Tensor) -> Tensor:
        for name, weight in zip(names, weights):
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._parameters[leaf] = weight  # type: ignore[assignment]
        output: Tensor = module(hidden)
        return output

    return forward


def _llama(**sizes: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, vocab_size=VOCABULARY, **sizes
    )


def _problem(
    make: Callable[[], nn.Module], tokens: int, product_flops: int
) -> tuple[Problem, list[str]]:
    torch.manual_seed(0)
    module = make()
    parameters = {
        name: nn.Parameter(p.detach().to(torch.bfloat16)) for name, p in module.named_parameters()
    }
    leaves: dict[str, Tensor] = {
        "hidden": _random(1, tokens, HIDDEN).requires_grad_(),
        **parameters,
    }
    problem = Problem(leaves, _random(1, tokens, HIDDEN), tokens * HIDDEN * 2, product_flops)
    problem.refer_to(_functional(make().double(), list(parameters)))
    return problem, list(parameters)


def _worst_weight(row: Row) -> None:
    found = row.get("errors")
    if found is not None:
        row["weight_error"] = max(
            value for name, value in found.items() if name not in ("hidden", "output")
        )


def mlp_rows(tokens: int, rounds: int) -> list[Row]:
    """The gated MLP of a Llama."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    def make() -> nn.Module:
        return LlamaMLP(_llama())  # type: ignore[no-any-return]

    problem, names = _problem(make, tokens, 2 * tokens * HIDDEN * INTERMEDIATE)

    def ours() -> Forward:
        module = make()
        tile_mlp(module)
        return _functional(module, names)

    plain = _functional(make(), names)
    contenders: dict[str, Forward] = {
        "plain": plain,
        "torch checkpoint": lambda *leaves: checkpoint(plain, *leaves, use_reentrant=False),
        "ours": ours(),
    }
    if importlib.util.find_spec("deepspeed"):
        contenders["DeepSpeed TiledMLP"] = deepspeed_mlp(make(), names)
    rows = measure(problem, contenders, rounds)
    for row in rows:
        _worst_weight(row)
    return rows


def tiled_by_deepspeed(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """DeepSpeed's TiledMLP on a Llama's MLP, with as many tiles as its documentation takes."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    def plain(mlp: Any, rows: Tensor) -> Tensor:
        output: Tensor = mlp.down_proj(mlp.act_fn(mlp.gate_proj(rows)) * mlp.up_proj(rows))
        return output

    def forward(hidden: Tensor) -> Tensor:
        shards = math.ceil(hidden.shape[-2] / hidden.shape[-1])
        output: Tensor = TiledMLP.apply(plain, module, hidden, shards, list(module.parameters()))
        return output

    return forward


def deepspeed_mlp(module: nn.Module, names: list[str]) -> Forward:
    """The same as a function of its parameters too."""
    module.forward = tiled_by_deepspeed(module)
    return _functional(module, names)


def norm_rows(tokens: int, rounds: int) -> list[Row]:
    """The RMS norm of a Llama."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def make() -> nn.Module:
        return LlamaRMSNorm(HIDDEN)  # type: ignore[no-any-return]

    problem, names = _problem(make, tokens, 1)

    def ours() -> Forward:
        module = make()
        tile_norm(module)
        return _functional(module, names)

    contenders = {
        "plain": _functional(make(), names),
        "torch nn.RMSNorm": _functional(nn.RMSNorm(HIDDEN, eps=1e-6), names),
        "ours": ours(),
    }
    rows = measure(problem, contenders, rounds)
    for row in rows:
        _worst_weight(row)
    return rows


def loss_rows(tokens: int, rounds: int) -> list[Row]:
    """The mean cross-entropy of the tokens that count, from hidden states and the head's weight."""
    torch.manual_seed(0)
    labels = torch.randint(LOSS_VOCABULARY, (1, tokens))
    labels[torch.rand(1, tokens) < IGNORED_SHARE] = -100
    leaves = {
        "hidden": _random(1, tokens, LOSS_HIDDEN).requires_grad_(),
        "weight": _random(LOSS_VOCABULARY, LOSS_HIDDEN, scale=LOSS_HIDDEN**-0.5).requires_grad_(),
    }
    flops = 2 * tokens * LOSS_HIDDEN * LOSS_VOCABULARY
    problem = Problem(leaves, torch.tensor(1.0), tokens * LOSS_HIDDEN * 2, flops)
    problem.refer_to(_mean_of_tiles(labels))
    rows = measure(problem, loss_contenders(labels), rounds)
    # A loss that is weighted afterwards: gradients accumulated over 32 micro-batches, say.
    scaled = Problem(leaves, torch.tensor(1 / 32), problem.unit_bytes)
    scaled.reference = {name: value / 32 for name, value in problem.reference.items()}
    scaled.reference["output"] = problem.reference["output"]
    for row in rows:
        if "refused" not in row:
            later = _gradient_errors(scaled, loss_contenders(labels)[row["implementation"]])
            row["scaled_errors"] = later
    return rows


def _gradient_errors(problem: Problem, forward: Forward) -> dict[str, float]:
    return {name: value for name, value in errors(problem, forward).items() if name != "output"}


def _mean_of_tiles(labels: Tensor) -> Forward:
    """Plain torch, tile by tile so that the float64 reference fits."""

    def forward(hidden: Tensor, weight: Tensor) -> Tensor:
        rows = zip(hidden.view(-1, LOSS_HIDDEN).split(LOSS_TILE), labels.view(-1).split(LOSS_TILE))
        sums = [
            checkpoint(_tile_sum, tile, weight, goals, use_reentrant=False) for tile, goals in rows
        ]
        return torch.stack(sums).sum() / (labels != -100).sum()

    return forward


def _tile_sum(tile: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(tile, weight), labels, reduction="sum")


def loss_contenders(labels: Tensor) -> dict[str, Forward]:
    """By name: functions of hidden states `[1, S, D]` and weight `[V, D]` that return the mean
    loss.
    """
    num_counted = (labels != -100).sum()

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        from transformers.loss.loss_utils import ForCausalLMLoss

        logits = F.linear(hidden, weight)
        loss: Tensor = ForCausalLMLoss(logits, None, LOSS_VOCABULARY, shift_labels=labels)
        return loss

    def native(hidden: Tensor, weight: Tensor) -> Tensor:
        options = nn.LinearCrossEntropyOptions()
        flat = hidden.view(-1, LOSS_HIDDEN)
        return F.linear_cross_entropy(flat, weight, labels.view(-1), options=options)

    def ours(hidden: Tensor, weight: Tensor, recompute: bool = False) -> Tensor:
        total, count = tiled_cross_entropy(
            hidden, weight, labels, tile_tokens=LOSS_TILE, recompute=recompute
        )
        return total / count

    found: dict[str, Forward] = {"plain": plain}
    if hasattr(F, "linear_cross_entropy"):
        found["torch linear_cross_entropy"] = native
    if importlib.util.find_spec("deepspeed"):
        found |= _deepspeed_losses(labels, num_counted)
    if importlib.util.find_spec("trl"):
        found["TRL chunked"] = _trl_loss(labels, num_counted)
    found["ours"] = ours
    found["ours, recompute"] = lambda hidden, weight: ours(hidden, weight, recompute=True)
    return found


class _Head(nn.Module):
    """What DeepSpeed's loss function is given: an output layer."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight


def _deepspeed_losses(labels: Tensor, num_counted: Tensor) -> dict[str, Forward]:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss
    from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy

    def fused(hidden: Tensor, weight: Tensor, reduction: str = "mean") -> Tensor:
        def of_tile(head: _Head, rows: Tensor, goals: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(rows, head.weight).float(), goals, reduction=reduction)

        shards = math.ceil(labels.numel() / LOSS_TILE)
        arguments = (of_tile, _Head(weight), hidden, labels, None, shards, [weight], reduction)
        loss: Tensor = TiledFusedLogitsLoss.apply(*arguments)
        return loss if reduction == "mean" else loss / num_counted

    def vocabulary_parallel(hidden: Tensor, weight: Tensor) -> Tensor:
        return vocab_parallel_linear_cross_entropy(hidden, weight, labels)  # type: ignore[no-any-return]

    return {
        "DeepSpeed TiledFusedLogitsLoss, mean of tiles": fused,
        "DeepSpeed TiledFusedLogitsLoss, sum / count": lambda hidden, weight: fused(
            hidden, weight, "sum"
        ),
        "DeepSpeed vocab-parallel": vocabulary_parallel,
    }


def import_trl() -> Any:
    """TRL's kernels, which import its trainers' utilities: these ask for data packages that the
    loss does without.
    """
    unused = {"pandas": ("DataFrame",), "datasets": ("Dataset", "IterableDataset")}
    stand_ins = {
        name: types.ModuleType(name) for name in unused if importlib.util.find_spec(name) is None
    }
    for name, module in stand_ins.items():
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(dict.fromkeys(unused[name], object))
    sys.modules.update(stand_ins)
    try:
        importlib.import_module("trl.trainer.utils")
        return importlib.import_module("trl.kernels")
    finally:
        for name in stand_ins:
            del sys.modules[name]


def _trl_loss(labels: Tensor, num_counted: Tensor) -> Forward:
    """TRL's kernel as its trainer calls it, on this device with its torch operations instead of
    Triton's.
    """
    function = import_trl().ChunkedLogProbFunction
    ignored = labels == -100

    def forward(hidden: Tensor, weight: Tensor) -> Tensor:
        goals = labels.clamp(min=0).reshape(-1)
        found = function.apply(
            hidden.reshape(-1, LOSS_HIDDEN), weight, None, goals, 1.0, TRL_CHUNK, None, 1.0, ()
        )
        log_probs: Tensor = found[0].view(labels.shape).masked_fill(ignored, 0)
        return -log_probs.sum() / num_counted

    return forward
