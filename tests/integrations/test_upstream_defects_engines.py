"""Defects of accelerate + DeepSpeed's sequence parallelism, each shown to be absent here: engines,
launcher, groups.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.nn.functional
from accelerate.utils.launch import prepare_deepspeed_cmd_env

from tests.helpers.batches import CASES, Sample, loader
from tests.helpers.engine_jobs import worst_distance
from tests.helpers.models import build
from tests.helpers.parity_jobs import (
    Engine,
    Grads,
    counted_linear_tokens,
    data_rank,
    full_parameters,
    plain_step,
    zero_gradients,
)
from tests.helpers.ranks import run_ranks
from ulysses_accel.cli.launch import plan_launch
from ulysses_accel.config.parallelism import ParallelismConfig

EXACT = 1e-12
# DeepSpeed computes in float32, and a difference of parameters has some thousand roundings of 6e-8
# of a parameter.
FLOAT32 = 1e-3
CONFIGS = Path(__file__).parents[2] / "configs"
ENGINES = {
    "ddp": Engine("ddp"),
    "fsdp2": Engine("fsdp2"),
    "zero 0": Engine("deepspeed", 0),
    "zero 2": Engine("deepspeed", 2),
    "zero 3": Engine("deepspeed", 3),
    "zero 3 without reduce_scatter": Engine("deepspeed", 3, reduce_scatter=False),
}
STEPS = 3


def on_engine(engine: Engine, model: Any, samples: list[Sample], grads: Grads) -> dict[str, Any]:
    """Makes some plain SGD steps; returns the first step's size over what it should be, and what
    else was seen.
    """
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    acc = engine.accelerator(sp_size=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    model, optimizer, batches, scheduler = acc.prepare(model, optimizer, loader(samples), scheduler)
    after: list[Grads] = []
    with counted_linear_tokens(model) as tokens:
        for batch in batches:
            acc.backward(model(**batch).loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            after.append(full_parameters(model))
    step = {name: before[name] - value for name, value in after[0].items()}
    product = sum(float((step[name] * grad).sum()) for name, grad in grads.items())
    return {
        "ratio": product / sum(float(grad.square().sum()) for grad in grads.values()),
        "pace": scheduler.scheduler.last_epoch,
        "group": acc.torch_device_mesh["sp"].get_group().size(),
        "tokens": [max(tokens), min(tokens)],
    }


def on_all_engines() -> dict[str, Any]:
    samples = [CASES["plain"](seed) for seed in range(STEPS)]
    # Built before any engine exists: while ZeRO 3 does, transformers builds models in pieces.
    models = {name: build("llama", torch.float32) for name in ENGINES}
    _, grads = plain_step(build("llama", torch.float32), samples[:1])
    return {
        name: on_engine(engine, models[name], samples, grads) for name, engine in ENGINES.items()
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What was seen on each engine by each of two ranks that share a sequence; one fork for all of
    them.
    """
    found: list[dict[str, Any]] = run_ranks(on_all_engines, 2, init=False)
    return found


def test_b01_no_engine_scales_the_gradient(ranks: list[dict[str, Any]]) -> None:
    ratios = {name: seen["ratio"] for rank in ranks for name, seen in rank.items()}
    assert set(ratios) == set(ENGINES)
    assert all(abs(ratio - 1) <= FLOAT32 for ratio in ratios.values()), ratios


def test_b02_flags_reach_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--use_deepspeed", "--parallelism-config-sp-size", "8", "--num_processes", "8"]
    for argv in (
        flags,
        ["--use_deepspeed", "--config_file", str(CONFIGS / "deepspeed_zero2_sp2.yaml")],
    ):
        plan = plan_launch([*argv, "train.py"])
        with monkeypatch.context() as patch:
            for name, value in plan.environment.items():
                patch.setenv(name, value)
            _, environment = prepare_deepspeed_cmd_env(plan.arguments)
            expected = 8 if argv is flags else 2
            assert environment["PARALLELISM_CONFIG_SP_SIZE"] == str(expected)
            assert ParallelismConfig().sp_size == expected


def test_b03_the_mesh_has_the_sequence_axis(ranks: list[dict[str, Any]]) -> None:
    assert all(seen["group"] == 2 for rank in ranks for seen in rank.values())


def test_b12_the_schedule_takes_one_step_for_each_batch(ranks: list[dict[str, Any]]) -> None:
    assert all(seen["pace"] == STEPS for rank in ranks for seen in rank.values())


def test_b17_every_engine_computes_on_shards(ranks: list[dict[str, Any]]) -> None:
    # Two rows of 16 tokens, over two ranks; what ZeRO 3 counts is the same.
    assert all(seen["tokens"] == [16, 16] for rank in ranks for seen in rank.values())


def upstream_loop() -> dict[str, Any]:
    """The loop of accelerate's documentation, on groups that do and do not hold global rank 0."""
    accelerator = Engine("ddp").accelerator(sp_size=2, dp_size=2)
    kinds = ("plain", "first ranks masked", "packed", "last ranks masked")
    samples = [CASES[kinds[seed % 4]](seed) for seed in range(8)]
    model, batches = accelerator.prepare(build("llama"), loader(samples))
    unwrapped_model = accelerator.unwrap_model(model)
    sp_group = accelerator.torch_device_mesh["sp"].get_group()
    sp_world_size = accelerator.parallelism_config.sp_size
    reference, worst = build("llama"), 0.0
    for step, batch in enumerate(batches):
        zero_gradients(model)
        shift_labels = batch["shift_labels"]
        outputs = model(**batch)
        loss = unwrapped_model.loss_function(
            logits=outputs.logits,
            labels=None,
            shift_labels=shift_labels,
            vocab_size=unwrapped_model.config.vocab_size,
        )
        losses_per_rank = torch.distributed.nn.functional.all_gather(loss, group=sp_group)
        good_tokens = (shift_labels != -100).view(-1).sum()
        good_tokens_per_rank = torch.distributed.nn.functional.all_gather(
            good_tokens, group=sp_group
        )
        total_loss = sum(
            losses_per_rank[rank] * good_tokens_per_rank[rank]
            for rank in range(sp_world_size)
            if good_tokens_per_rank[rank] > 0
        )
        total_good_tokens = sum(good_tokens_per_rank)
        loss = total_loss / max(total_good_tokens, 1)
        accelerator.backward(loss)
        losses, grads = plain_step(reference, samples[2 * step : 2 * step + 2])
        worst = max(
            worst,
            abs(float(loss) - losses[data_rank(accelerator)]) / losses[data_rank(accelerator)],
        )
        for name, parameter in unwrapped_model.named_parameters():
            worst = max(worst, float((parameter.grad - grads[name]).norm() / grads[name].norm()))
    return {"worst": worst, "members": torch.distributed.get_process_group_ranks(sp_group)}


def without_deprecated_calls() -> float:
    accelerator = Engine("ddp").accelerator(sp_size=2, dp_size=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*torch.distributed.nn")
        # Both data parallel ranks get the same sample, so that one process's gradient is the mean
        # of both.
        return worst_distance(accelerator, [CASES["packed"](0)])


def groups_of_four() -> list[Any]:
    return [without_deprecated_calls(), upstream_loop()]


def test_b20_groups_without_global_rank_0_work() -> None:
    found = run_ranks(groups_of_four, 4, init=False)
    assert max(own for own, _ in found) <= EXACT
    assert max(loop["worst"] for _, loop in found) <= EXACT
    assert [loop["members"] for _, loop in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
