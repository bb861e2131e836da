"""The working set of a layer: two layers of a Llama under checkpointing, features one at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.memory.measure import Forward, Problem, measure
from benchmarks.memory.models import has_deepspeed, install, llama_config, on_host

HIDDEN, HEADS, KEY_HEADS, LAYERS = 128, 4, 1, 2

CONTENDERS: dict[str, tuple[str, ...]] = {
    "transformers, checkpoint": ("checkpoint",),
    "transformers, offload": ("offload",),
    "transformers, checkpoint + DeepSpeed TiledMLP": ("checkpoint", "DeepSpeed TiledMLP"),
    "ours: checkpoint": ("our checkpoint",),
    "ours: + TiledMLP": ("our checkpoint", "our TiledMLP"),
    "ours: + norms": ("our checkpoint", "our TiledMLP", "our norms"),
    "ours: + offload": ("our offload", "our TiledMLP", "our norms"),
}


class _Sink(torch.autograd.Function):
    """Stands for what follows: takes the hidden states and lets them go; its gradient is what it
    was given.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient, None


def _forward(model: Any, names: list[str], gradient: Tensor) -> Forward:
    def forward(hidden: Tensor, *weights: Tensor) -> Tensor:
        for name, weight in zip(names, weights):
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = weight
        output = model(inputs_embeds=hidden).last_hidden_state
        return _Sink.apply(output, gradient.to(output.dtype))  # type: ignore[no-any-return, no-untyped-call]

    return forward


def layer_rows(tokens: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each contender of `CONTENDERS`."""
    from transformers import LlamaModel

    config = llama_config(HIDDEN, LAYERS, HEADS, KEY_HEADS, 8, tokens)

    def make() -> nn.Module:
        torch.manual_seed(0)
        return LlamaModel(config).train()  # type: ignore[no-any-return]

    named = {name: nn.Parameter(p.detach().bfloat16()) for name, p in make().named_parameters()}
    # The embedding is not used.
    named.pop("embed_tokens.weight")
    hidden = torch.randn(1, tokens, HIDDEN).bfloat16().requires_grad_()
    gradient = torch.randn(1, tokens, HIDDEN).bfloat16()
    product_flops = 2 * tokens * HIDDEN * config.intermediate_size
    problem = Problem(
        {"hidden": hidden, **named}, torch.tensor(1.0), tokens * HIDDEN * 2, product_flops
    )
    names = list(named)
    problem.refer_to(_forward(make().double(), names, gradient))
    contenders: dict[str, Forward] = {}
    hosts = {}
    for name, features in CONTENDERS.items():
        if has_deepspeed() or not any("DeepSpeed" in feature for feature in features):
            model = make()
            installed = install(model, features)
            contenders[name] = _forward(model, names, gradient)
            hosts[name] = partial(on_host, installed)
    rows = measure(problem, contenders, rounds, hosts)
    for row in rows:
        if "refused" not in row:
            _complete(row)
    return rows


def _complete(row: dict[str, Any]) -> None:
    """Adds what a layer needs beside the kept inputs, and the MLP's share of the products."""
    # The first layer's input was there before; the last one's stays on the device in any case.
    kept = LAYERS - 1
    row["working_set_u"] = row["backward_peak_u"] - kept
    # Query, key, value and output projection: forward, recompute, and two products each in
    # backward.
    projections = (
        4
        * LAYERS
        * HIDDEN
        * (2 * HIDDEN + 2 * HIDDEN // HEADS * KEY_HEADS)
        / (HIDDEN * HIDDEN * 7 / 2)
    )
    total = row["forward_products"] + row["backward_products"]
    row["mlp_products"] = (total - projections) / LAYERS
    found = row["errors"]
    row["weight_error"] = max(
        value for name, value in found.items() if name not in ("hidden", "output")
    )
