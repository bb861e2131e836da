"""Adapters of PEFT on sharded sequences: loss and adapter gradients, alone and with everything that
saves memory.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch.distributed.tensor import DTensor

import ulysses_accel
from tests.helpers.batches import CASES, Sample, loader
from tests.helpers.engine_jobs import error_of
from tests.helpers.models import build
from tests.helpers.parity_jobs import (
    EXACT,
    Engine,
    Report,
    assert_parity,
    compare,
    counted_linear_tokens,
    plain_step,
    report,
    zero_gradients,
)
from tests.helpers.ranks import run_ranks
from tests.helpers.support import Support
from tests.helpers.trl_jobs import LORA
from ulysses_accel.errors import UnsupportedModelError
from ulysses_accel.memory.apply import apply_memory

KINDS = ("plain", "packed", "padded right")
# DeepSpeed computes in float32.
FLOAT32 = 1e-5
EVERYTHING = {
    "tiled_mlp": True,
    "tiled_loss": True,
    "checkpoint": True,
    "tiled_mlp_bytes": 4096,
    "tiled_loss_tokens": 5,
}


def adapted(**options: Any) -> Any:
    """Returns a model with an adapter that is far from zero; the same on every rank."""
    torch.manual_seed(5)
    return get_peft_model(
        build("llama"), LoraConfig(**{**LORA, **options}, init_lora_weights=False)
    ).train()


def adapter_gradients(model: Any) -> dict[str, torch.Tensor]:
    """Returns whole gradients of what is trained, by the plain model's names; every rank must call
    it.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = (
                safe_get_full_grad(parameter)
                if hasattr(model, "zero_optimization")
                else parameter.grad
            )
            assert grad is not None, name
            whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
            found[name.removeprefix("module.")] = whole.clone()
    return found


def references() -> dict[str, tuple[list[float], dict[str, torch.Tensor]]]:
    """Returns one process's losses and adapter gradients of every kind of batch."""
    model = adapted()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert 0 < len(trained) < len(list(model.parameters()))
    found = {}
    for kind in KINDS:
        losses, grads = plain_step(model, [CASES[kind](0)])
        found[kind] = (losses, {name: grads[name] for name in trained})
    return found


def steps(
    engine: Engine, sizes: dict[str, int], expected: Any, memory: dict[str, Any] | None
) -> Report:
    """Runs every kind of batch through one prepared model."""
    accelerator = engine.accelerator(**sizes)
    samples: list[Sample] = [CASES[kind](0) for kind in KINDS]
    model = adapted()
    if engine.name == "deepspeed":
        model.float()
    if memory:
        apply_memory(model, ulysses_accel.MemoryConfig(**memory), shares_sequence=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    model, optimizer, batches = accelerator.prepare(model, optimizer, loader(samples))
    kept: list[dict[str, torch.Tensor]] = []
    step = getattr(model, "step", lambda: None)
    # DeepSpeed's gradients are gone once its engine made the step, which it makes in backward.
    model.step = lambda: (kept.append(adapter_gradients(model)), step())
    found = {}
    for kind, sample, batch in zip(KINDS, samples, batches, strict=True):
        zero_gradients(model)
        with counted_linear_tokens(model) as tokens:
            loss = model(**batch).loss
        assert max(tokens) < sample.plain["input_ids"].numel(), "every rank computed all tokens"
        accelerator.backward(loss)
        losses, grads = expected[kind]
        own = kept.pop() if engine.name == "deepspeed" else adapter_gradients(model)
        found[kind] = report(compare(float(loss.detach()), own, losses[0], grads))
    return found


ON_TWO_RANKS: dict[str, tuple[Engine, dict[str, int], dict[str, Any] | None]] = {
    "sp": (Engine(), {"sp_size": 2}, None),
    "cp": (Engine(), {"sp_size": 1, "cp_size": 2}, None),
    "sp, everything": (Engine(), {"sp_size": 2}, EVERYTHING),
    "sp, FSDP2": (Engine("fsdp2"), {"sp_size": 2}, None),
    "sp, FSDP2, everything": (Engine("fsdp2"), {"sp_size": 2}, EVERYTHING),
    "sp, ZeRO-2": (Engine("deepspeed", 2), {"sp_size": 2}, None),
}


def all_steps(expected: Any) -> Report:
    """Returns how far each engine's steps are from one process's."""
    return {
        f"{name}, {kind}": difference
        for name, (engine, sizes, memory) in ON_TWO_RANKS.items()
        for kind, difference in steps(engine, sizes, expected, memory).items()
    }


def test_adapters_train_as_on_one_process(support: Support) -> None:
    found = run_ranks(all_steps, 2, references(), init=False)
    assert all(len(cases) == len(ON_TWO_RANKS) * len(KINDS) for cases in found)
    for name, tolerance in (("ZeRO", FLOAT32), ("", EXACT)):
        chosen = [
            {case: d for case, d in cases.items() if ("ZeRO" in case) == bool(name)}
            for cases in found
        ]
        assert_parity(chosen, tolerance)
    for name, (engine, _, _) in ON_TWO_RANKS.items():
        support(
            "system",
            "PEFT LoRA",
            "cp" if name == "cp" else "sp",
            code="model = accelerator.prepare(get_peft_model(model, LoraConfig(...)))",
            engine={"fsdp2": "FSDP2", "deepspeed": "ZeRO-2"}.get(engine.name, "DDP"),
        )


@pytest.mark.parametrize(
    "options", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_an_adapter_on_the_output_layer_is_named_where_the_loss_is_tiled(
    options: dict[str, Any],
) -> None:
    model = adapted(**options)
    with pytest.raises(UnsupportedModelError, match=r"output layer \(found: peft\..*\)"):
        apply_memory(model, ulysses_accel.MemoryConfig(tiled_loss=True))


def virtual_tokens() -> list[str]:
    """Returns what preparing each model that adds tokens of its own says."""
    kinds: dict[str, Any] = {
        "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    }
    accelerator = Engine().accelerator(2)
    return [
        error_of(accelerator.prepare, get_peft_model(build("llama"), config))
        for config in kinds.values()
    ]


def test_virtual_tokens_are_refused(support: Support) -> None:
    for errors in run_ranks(virtual_tokens, 2, init=False):
        for name, error in zip(("PROMPT_TUNING", "PREFIX_TUNING"), errors, strict=True):
            assert error.startswith("UnsupportedModelError")
            assert name in error
            assert "LoRA" in error
    support.refused(
        "system",
        "PEFT prompt and prefix tuning",
        "sp",
        "its tokens would be put before every shard",
    )
