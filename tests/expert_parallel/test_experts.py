"""Experts dealt to ranks: loss, every gradient, clipping and AdamW's steps equal one process's that
has all experts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from tests.forward.test_router_loss import (
    MODELS,
    build_experts,
    keep_float64,
    reference_loss,
    seen_rows,
)
from tests.helpers.batches import CASES, Sample, loader
from tests.helpers.engine_jobs import error_of
from tests.helpers.models import HIDDEN, VOCAB, build
from tests.helpers.parity_jobs import (
    Engine,
    Grads,
    Report,
    assert_parity,
    compare,
    data_rank,
    full_gradients,
    full_parameters,
    plain_loss,
    plain_step,
    report,
)
from tests.helpers.ranks import run_ranks
from ulysses_accel import MemoryConfig
from ulysses_accel.memory.apply import apply_memory

Sizes = tuple[int, int, int]
Step = tuple[list[Sample], list[float], Grads]
NUM_EXPERTS = 4
_LATENT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": NUM_EXPERTS,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LATENT: dict[str, Callable[[], Any]] = {
    "DeepSeek-V2": lambda: hf.DeepseekV2Config(**_LATENT, topk_method="greedy"),
    "DeepSeek-V3": lambda: hf.DeepseekV3Config(**_LATENT),
}


@pytest.fixture(autouse=True)
def _float64_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_float64(monkeypatch.setattr)


def build_model(name: str) -> Any:
    if name not in LATENT:
        return build_experts(name)
    config = LATENT[name]()
    config._experts_implementation = "eager"
    model = build(name, config=config)
    if name == "DeepSeek-V3":
        for module in model.modules():
            if hasattr(module, "e_score_correction_bias"):
                # Nobody chooses the last experts: their owner computes nothing, and must take part
                # all the same.
                module.e_score_correction_bias[2:] = -100.0
    return model


def expected_steps(names: list[str], case: str, dp_size: int) -> dict[str, Step]:
    samples = [CASES[case](rank) for rank in range(dp_size)]
    return {
        name: (
            samples,
            *plain_step(
                build_model(name), samples, plain_loss if name in LATENT else reference_loss
            ),
        )
        for name in names
    }


def accelerator_of(
    engine: str, sp_size: int, dp_size: int, ep_size: int, **kwargs: Any
) -> Accelerator:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARALLELISM_CONFIG_EP_SIZE", str(ep_size))
        return Engine(engine).accelerator(sp_size, dp_size, **kwargs)


def parity_job(
    engine: str, steps: dict[str, Step], sizes: Sizes, prepare: Callable[[Any], Any]
) -> Report:
    sp_size, dp_size, ep_size = sizes
    found: Report = {}
    for name, (samples, losses, grads) in steps.items():
        accelerator = accelerator_of(engine, sp_size, dp_size, ep_size)
        model = build_model(name)
        prepare(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        rows = seen_rows(model)
        model, _, batches = accelerator.prepare(
            model, optimizer, loader(samples, plain=sp_size == 1)
        )
        (batch,) = batches
        loss = model(**batch).loss
        accelerator.backward(loss)
        dealt = [parameter for key, parameter in model.named_parameters() if ".experts." in key]
        assert {len(parameter.to_local()) for parameter in dealt} == {NUM_EXPERTS // ep_size}
        assert rows[0] == samples[0].plain["input_ids"].numel() // sp_size
        own = losses[data_rank(accelerator)]
        found[f"{engine}, {name}, {sizes}"] = report(
            compare(float(loss.detach()), full_gradients(model), own, grads)
        )
    return found


def plain(model: Any) -> None:
    """Leaves the model as it is."""


ENGINES = {"ddp": "DDP", "fsdp2": "FSDP2"}
FAMILIES = ["Mixtral", "Qwen2-MoE", "Qwen3-MoE", "OLMoE", *LATENT]
CODE = "ParallelismConfig(sp_size=2, ep_size=2)"


def test_families(support: Any) -> None:
    steps = expected_steps(FAMILIES, "padded right", 1)
    assert_parity(run_ranks(parity_job, 2, "ddp", steps, (2, 1, 2), plain), count=len(FAMILIES))
    for name in FAMILIES:
        support("model", f"{name}, experts dealt to ranks", "ep × sp", code=CODE)


def four_ranks_job(steps: dict[str, Step]) -> Report:
    found: Report = {}
    # Four parts of the experts, and two that two ranks each have copies of.
    for engine, ep_size in (("ddp", 4), ("fsdp2", 2)):
        found |= parity_job(engine, steps, (2, 2, ep_size), plain)
    return found


def test_over_sequence_and_data_parallel_ranks(support: Any) -> None:
    steps = expected_steps(["Mixtral", "DeepSeek-V3"], "packed", 2)
    assert_parity(run_ranks(four_ranks_job, 4, steps), count=4)
    for engine in ("DDP", "FSDP2"):
        support("system", "expert parallelism over dp × sp", "ep × sp", code=CODE, engine=engine)


def test_over_data_parallel_ranks_alone(support: Any) -> None:
    steps = expected_steps(list(LATENT), "padded right", 2)
    for engine in ("ddp", "fsdp2"):
        assert_parity(run_ranks(parity_job, 2, engine, steps, (1, 2, 2), plain), count=2)
        support(
            "system",
            "expert parallelism",
            "ep",
            code="ParallelismConfig(ep_size=2)",
            engine=ENGINES[engine],
        )


def test_recompute() -> None:
    ways: list[Callable[[Any], Any]] = [
        lambda model: model.gradient_checkpointing_enable(),
        lambda model: apply_memory(model, MemoryConfig(checkpoint=True), shares_sequence=True),
    ]
    steps = expected_steps(["Qwen3-MoE"], "packed", 1)
    for way in ways:
        assert_parity(run_ranks(parity_job, 2, "ddp", steps, (2, 1, 2), way), count=1)


def accumulation_job(samples: list[Sample], losses: list[float], grads: Grads) -> Report:
    accelerator = accelerator_of("ddp", 1, 1, 2, cp_size=2)
    accelerator.gradient_accumulation_steps = len(samples)
    model, batches = accelerator.prepare(build_model("Mixtral"), loader(samples))
    total = 0.0
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
        total += float(loss.detach()) / len(samples)
    return {
        "step": report(compare(total, full_gradients(model), sum(losses) / len(samples), grads))
    }


def test_accumulation() -> None:
    samples = [CASES["packed"](seed) for seed in range(2)]
    losses, grads = plain_step(build_model("Mixtral"), samples, reference_loss)
    assert_parity(run_ranks(accumulation_job, 2, samples, losses, grads), count=1)


MAX_NORM = 0.05


def plain_training(samples: list[Sample]) -> tuple[float, Grads]:
    """Returns the first gradient norm and the parameters after two clipped steps of AdamW."""
    model = build_model("Mixtral")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    norms = []
    for sample in samples:
        optimizer.zero_grad()
        reference_loss(model, sample).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
    return norms[0], {
        name: parameter.detach().clone() for name, parameter in model.named_parameters()
    }


def training_job(engine: str, samples: list[Sample], folder: str) -> dict[str, Any]:
    """Trains two steps, of which the second is made by another accelerator from the first one's
    checkpoint.
    """
    norms: list[float] = []

    def prepared() -> tuple[Accelerator, Any, Any, Any]:
        accelerator = accelerator_of(engine, 2, 1, 2)
        model = build_model("Mixtral")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if engine == "ddp":
            # In a call of its own, before the experts are dealt; FSDP2 wants both together.
            optimizer = accelerator.prepare(optimizer)
            return (
                accelerator,
                accelerator.prepare(model),
                optimizer,
                accelerator.prepare(loader(samples)),
            )
        return accelerator, *accelerator.prepare(model, optimizer, loader(samples))

    def step(accelerator: Accelerator, model: Any, optimizer: Any, batch: Any) -> None:
        optimizer.zero_grad()
        accelerator.backward(model(**batch).loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
        norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
        optimizer.step()

    accelerator, model, optimizer, batches = prepared()
    first, second = list(batches)
    step(accelerator, model, optimizer, first)
    accelerator.save_state(folder, safe_serialization=True)
    accelerator, model, optimizer, _ = prepared()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(folder)
    step(accelerator, model, optimizer, second)
    whole = full_parameters(model)
    saved = accelerator.get_state_dict(model)
    same = all(torch.equal(value, whole[name]) for name, value in saved.items())
    alone = error_of(model.state_dict) if engine == "ddp" else error_of(lambda: None)
    return {"norm": norms[0], "whole": whole, "saved": sorted(saved), "same": same, "alone": alone}


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_clipped_steps_and_resume(engine: str, tmp_path: Path, support: Any) -> None:
    samples = [CASES["packed"](seed) for seed in range(2)]
    norm, whole = plain_training(samples)
    reports = run_ranks(training_job, 2, engine, samples, str(tmp_path))
    for rank, found in enumerate(reports):
        assert found["norm"] == pytest.approx(norm, rel=1e-12)
        for name, expected in whole.items():
            # AdamW divides by the root of a squared gradient, which magnifies roundings of small
            # ones.
            torch.testing.assert_close(found["whole"][name], expected, rtol=0, atol=1e-9, msg=name)
        assert found["same"]
        assert rank > 0 or set(found["saved"]) == set(whole)
        assert engine == "fsdp2" or "accelerator.get_state_dict(model)" in found["alone"]
    if engine == "ddp":
        assert (
            load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.experts.down_proj"].shape[
                0
            ]
            == NUM_EXPERTS
        )
    support(
        "system",
        "expert parallelism, clipping and resume",
        "ep × sp",
        code=CODE,
        engine=ENGINES[engine],
    )


def refusals_job() -> dict[str, str]:
    def prepare(name: str, config: Any = None) -> None:
        model = build(name, config=config)
        accelerator_of("ddp", 2, 1, 2).prepare(model)

    def tiled() -> None:
        model = build_experts("Mixtral")
        apply_memory(model, MemoryConfig(tiled_mlp=True), shares_sequence=True)
        accelerator_of("ddp", 2, 1, 2).prepare(model)

    def stepped() -> None:
        model = build_experts("Mixtral")
        optimizer = torch.optim.AdamW(model.parameters())
        reference_loss(model, CASES["plain"](0)).backward()
        optimizer.step()
        accelerator_of("ddp", 2, 1, 2).prepare(model, optimizer)

    odd = MODELS["Qwen3-MoE"]()
    odd.num_experts = 3
    return {
        "dense": error_of(prepare, "llama"),
        "odd": error_of(prepare, "odd", odd),
        "tiled": error_of(tiled),
        "stepped": error_of(stepped),
        "world": error_of(accelerator_of, "ddp", 2, 1, 3),
        "deepspeed": error_of(accelerator_of, "deepspeed", 2, 1, 2),
        "half": error_of(accelerator_of, "ddp", 2, 1, 2, mixed_precision="fp16"),
    }


def test_refusals(support: Any) -> None:
    first, second = run_ranks(refusals_job, 2)
    assert first == second
    assert "LlamaForCausalLM has no experts" in first["dense"]
    assert (
        "ep_size=2 does not divide the 3 experts of model.layers.0.mlp.experts. Use one of [1, 3]."
        in first["odd"]
    )
    assert "MixtralExperts" in first["tiled"]
    assert "tiled_mlp=True" in first["tiled"]
    assert "has made steps" in first["stepped"]
    assert "ep_size=3 does not divide 2 launched processes. Use one of [1, 2]." in first["world"]
    assert "from env PARALLELISM_CONFIG_EP_SIZE) with DeepSpeed" in first["deepspeed"]
    assert "mixed_precision='fp16'" in first["half"]
    support.refused(
        "system", "expert parallelism, DeepSpeed", "ep × sp", "its engines average over all ranks"
    )


def uninstall_job() -> bool:
    accelerator = accelerator_of("ddp", 2, 1, 2)
    model = accelerator.unwrap_model(accelerator.prepare(build_experts("Mixtral")))
    # Takes off what lies on top of it first, the experts' part.
    accelerator.sequence_parallel.close()
    assert type(accelerator) is Accelerator
    assert not hasattr(accelerator, "expert_parallel")
    # A DDP that is made of it now averages all parameters.
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")
    before = dict(build_experts("Mixtral").named_parameters())
    same = all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    experts = model.model.layers[0].mlp.experts
    return same and experts.num_experts == NUM_EXPERTS and "forward" not in vars(experts)


def test_uninstall_gives_every_rank_all_experts() -> None:
    assert run_ranks(uninstall_job, 2) == [True, True]
