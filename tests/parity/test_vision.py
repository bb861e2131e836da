"""Models of images or sound against one process: loss, all gradients (towers' too), and what the
decoder sees.

In float64; tolerance 1e-12, for the reason that `jobs` states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from tests.helpers.architectures import Batch, InDouble
from tests.helpers.parity_jobs import EXACT, Engine, Grads, compare, zero_gradients
from tests.helpers.ranks import run_ranks
from tests.helpers.support import Support
from tests.helpers.vision_models import KINDS, MERGERS, build, make_batch
from ulysses_accel.sequence.layout import multiple_of
from ulysses_accel.sequence.sharding import next_multiple

# Of each model a batch without images among others; by layouts and engines, ring and Ulysses degree
# first.
ALL = tuple(KINDS)
MOST, FEW = ("border", "text", "all ranks", "right"), ("border", "right")
MROPE = ("qwen2_vl", "qwen2_5_vl")
DDP, FSDP2 = Engine(), Engine("fsdp2")
RUNS: dict[str, tuple[Engine, tuple[int, int], dict[str, tuple[str, ...]]]] = {
    "sp": (DDP, (1, 2), {"qwen2_vl": ALL, "qwen2_5_vl": MOST}),
    "cp": (DDP, (2, 1), {"qwen2_vl": MOST, "qwen2_5_vl": ALL, "qwen3_vl": ("border", "left")}),
    "cp × sp": (DDP, (2, 2), {**dict.fromkeys(MERGERS, FEW), **dict.fromkeys(MROPE, MOST)}),
    "sp on FSDP2": (
        FSDP2,
        (1, 2),
        {"qwen2_vl": ("one rank", "text", "all ranks"), "qwen3_vl": ("border",)},
    ),
}
NAMES = {
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL (deepstack)",
    "qwen2_vl_video": "Qwen2-VL with videos",
    "glm4v": "GLM-4V",
    "llava": "Llava",
    "mistral3": "Mistral 3",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "internvl": "InternVL",
    "gemma3": "Gemma 3 (without token_type_ids)",
    "voxtral": "Voxtral",
}
Expected = dict[str, dict[str, tuple[float, Grads]]]


def one_process(name: str, kinds: Sequence[str]) -> dict[str, tuple[float, Grads]]:
    model, found = build(name), {}
    for kind in kinds:
        zero_gradients(model)
        with InDouble():
            loss = model(**make_batch(name, kind)).loss
            loss.backward()
        grads = {
            key: own.grad.clone() for key, own in model.named_parameters() if own.grad is not None
        }
        found[kind] = float(loss.detach()), grads
    return found


@pytest.fixture(scope="module")
def expected() -> Expected:
    """Returns what one process computes of every batch that some run needs."""
    kinds = {
        name: {kind for _, _, cases in RUNS.values() for kind in cases.get(name, ())}
        for name in MERGERS
    }
    return {name: one_process(name, sorted(some)) for name, some in kinds.items()}


def first(samples: list[Batch]) -> Batch:
    return samples[0]


def sharded(expected: Expected, run: str) -> dict[str, list[float]]:
    engine, (cp_size, sp_size), cases = RUNS[run]
    multiple, found = multiple_of(cp_size, "zigzag", sp_size), {}
    for name, kinds in cases.items():
        # A batch of text alone does not use the tower.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        accelerator = engine.accelerator(sp_size, 1, cp_size=cp_size, kwargs_handlers=[unused])
        whole: Any = [make_batch(name, kind) for kind in kinds]
        model = build(name)
        # FSDP2 wants an optimizer, which takes no step here.
        optimizer = torch.optim.SGD(model.parameters())
        loader = DataLoader(whole, batch_size=1, collate_fn=first)
        model, _, batches = accelerator.prepare(model, optimizer, loader)
        seen = tokens_seen(accelerator.unwrap_model(model))
        for kind, batch in zip(kinds, batches, strict=True):
            zero_gradients(model)
            seen.clear()
            with InDouble():
                loss = model(**batch).loss
                accelerator.backward(loss)
            own_loss, grads = expected[name][kind]
            difference = compare(float(loss.detach()), gradients(model, grads), own_loss, grads)
            assert set(seen) == {next_multiple(KINDS[kind][0], multiple) // (cp_size * sp_size)}
            found[f"{name}: {kind}"] = [difference.loss, difference.grad, abs(difference.ratio)]
    return found


def tokens_seen(model: Any) -> list[int]:
    """Returns a list to which each of the decoder's layers and the head add the tokens that they
    are given.
    """
    seen: list[int] = []

    def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].shape[1])

    for module in (*model.get_decoder().layers, model.get_output_embeddings()):
        module.register_forward_pre_hook(note)
    return seen


def gradients(model: nn.Module, like: Grads) -> Grads:
    """Returns the gradients of those parameters that have some in one process; the others' must be
    none or zero.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        grad = (
            torch.zeros(parameter.shape, dtype=parameter.dtype)
            if parameter.grad is None
            else parameter.grad
        )
        found[name.removeprefix("module.")] = (
            grad.full_tensor() if isinstance(grad, DTensor) else grad
        )
    assert not {name for name, grad in found.items() if name not in like and bool(grad.any())}
    return {name: found[name] for name in like}


@pytest.mark.parametrize("run", RUNS)
def test_loss_and_gradients(expected: Expected, run: str, support: Support) -> None:
    engine, layout, cases = RUNS[run]
    for rank in run_ranks(sharded, math.prod(layout), expected, run, init=False):
        assert len(rank) == sum(map(len, cases.values()))
        wrong = {case: errors for case, errors in rank.items() if not max(errors) <= EXACT}
        assert not wrong
    mode, name = run.partition(" on ")[0], "FSDP2" if engine is FSDP2 else "DDP"
    for case in cases:
        (key, *_) = MERGERS[case].make(((0,),), torch.Generator())
        code = f"{MERGERS[case].model.__name__}.from_pretrained(name)(**batch)  # with {key}"
        support("model", f"{NAMES[case]}, images or sound merged", mode, code=code, engine=name)
