"""Attaching to a stock Accelerator: any order and number of `prepare` calls, several models, every
launcher.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DummyOptim, DummyScheduler

from tests.helpers.batches import CASES
from tests.helpers.engine_jobs import (
    batches_of,
    error_of,
    numbers,
    own_numbers,
    train,
    worst_distance,
)
from tests.helpers.models import build
from tests.helpers.parity_jobs import Engine
from tests.helpers.ranks import run_ranks
from ulysses_accel import ParallelismConfig

EXACT = 1e-12
SAMPLES = 4
Prepared = tuple[Any, Any, Any]


def together(acc: Accelerator, model: Any, optimizer: Any, batches: Any) -> Prepared:
    prepared: Prepared = acc.prepare(model, optimizer, batches)
    return prepared


def backwards(acc: Accelerator, model: Any, optimizer: Any, batches: Any) -> Prepared:
    batches, optimizer, model = acc.prepare(batches, optimizer, model)
    return model, optimizer, batches


def loader_last(acc: Accelerator, model: Any, optimizer: Any, batches: Any) -> Prepared:
    model, optimizer = acc.prepare(model, optimizer)
    return model, optimizer, acc.prepare(batches)


def loader_first(acc: Accelerator, model: Any, optimizer: Any, batches: Any) -> Prepared:
    batches = acc.prepare(batches)
    model, optimizer = acc.prepare(model, optimizer)
    return model, optimizer, batches


ORDERS = (together, backwards, loader_last, loader_first)


def losses_in_order(engine: Engine, order: Callable[..., Prepared]) -> list[float]:
    model = build("llama", torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    acc = engine.accelerator(sp_size=2)
    return train(acc, *order(acc, model, optimizer, batches_of(SAMPLES)))


def every_order() -> dict[str, list[list[float]]]:
    engines = {"ddp": Engine("ddp"), "fsdp2": Engine("fsdp2"), "zero 2": Engine("deepspeed", 2)}
    return {
        name: [losses_in_order(engine, order) for order in ORDERS]
        for name, engine in engines.items()
    }


def test_any_order_of_prepare_trains_alike() -> None:
    plain = build("llama", torch.float32)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    expected = []
    for batch in batches_of(SAMPLES):
        loss = plain(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    for rank in run_ranks(every_order, 2, init=False):
        for name, orders in rank.items():
            assert len(orders) == len(ORDERS)
            for losses in orders:
                assert losses == pytest.approx(expected, rel=1e-5), name


def second_accelerator() -> dict[str, Any]:
    first = Engine("ddp").accelerator(sp_size=2)
    before = worst_distance(first, [CASES["packed"](0)])
    # Not reset: accelerate's state is shared by all accelerators of a process.
    second = Accelerator(cpu=True, parallelism_config=ParallelismConfig(sp_size=2))
    after = [worst_distance(acc, [CASES["padded left"](1)], "qwen2") for acc in (second, first)]
    plain = Accelerator(cpu=True)
    return {
        "worst": max(before, *after),
        "separate": first.sequence_parallel is not second.sequence_parallel,
        # One without a config gets the shared one, too.
        "shared": plain.sequence_parallel.groups.size,
        "other": error_of(Accelerator, cpu=True, parallelism_config=ParallelismConfig(sp_size=1)),
    }


def uninstalled() -> list[bool]:
    acc = Engine("ddp").accelerator(sp_size=2)
    stock = Accelerator.prepare
    attached = acc.prepare.__func__ is not stock
    acc.sequence_parallel.close()
    return [attached, acc.prepare.__func__ is stock, hasattr(acc, "sequence_parallel")]


def ring() -> float:
    AcceleratorState._reset_state(True)
    acc = Accelerator(cpu=True, parallelism_config=ParallelismConfig(cp_size=2))
    return worst_distance(acc, [CASES["packed"](0), CASES["plain"](1)])


def two_ranks() -> dict[str, Any]:
    AcceleratorState._reset_state(True)
    refused = {}
    for name, sizes in (
        ("product", {"sp_size": 3}),
        ("explicit", {"sp_size": 2, "dp_replicate_size": 2}),
    ):
        refused[name] = error_of(
            Accelerator, cpu=True, parallelism_config=ParallelismConfig(**sizes)
        )
        AcceleratorState._reset_state(True)
    found = {check.__name__: check() for check in (second_accelerator, uninstalled, ring)}
    AcceleratorState._reset_state(True)
    return {**found, **refused}


@pytest.fixture(scope="module")
def pair() -> list[dict[str, Any]]:
    """What each of two ranks saw; one fork for all of it."""
    found: list[dict[str, Any]] = run_ranks(two_ranks, 2, init=False)
    return found


def test_a_second_accelerator_and_model(pair: list[dict[str, Any]]) -> None:
    for rank in pair:
        assert rank["second_accelerator"]["worst"] <= EXACT
        assert rank["second_accelerator"]["separate"]
        assert rank["second_accelerator"]["shared"] == 2
        assert "was given cp_size=1, sp_size=1, tp_size=1" in rank["second_accelerator"]["other"]
        assert (
            "accelerate keeps the config of the first one in this process"
            in rank["second_accelerator"]["other"]
        )


def test_uninstall_gives_the_accelerator_back(pair: list[dict[str, Any]]) -> None:
    assert all(rank["uninstalled"] == [True, True, False] for rank in pair)


def test_a_ring_attaches_too(pair: list[dict[str, Any]]) -> None:
    assert max(rank["ring"] for rank in pair) <= EXACT


def test_a_wrong_product_names_the_legal_ones_on_every_rank(pair: list[dict[str, Any]]) -> None:
    for rank in pair:
        assert rank["product"].startswith("MeshError: ")
        assert "= 3, but the number of processes is 2" in rank["product"]
        assert "sp_size=3 (constructor)" in rank["product"]
        assert "such as: sp_size=2" in rank["product"]
        assert rank["explicit"].startswith("MeshError: ")
        assert "= 4, but the number of processes is 2" in rank["explicit"]


def alone() -> dict[str, Any]:
    """As `python train.py` runs a script, without a launcher."""
    for name in (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        os.environ.pop(name)
    refused = error_of(Accelerator, cpu=True, parallelism_config=ParallelismConfig(sp_size=2))
    AcceleratorState._reset_state(True)
    acc = Accelerator(cpu=True, parallelism_config=ParallelismConfig())
    model = build("llama")
    prepared, batches = acc.prepare(model, batches_of(2))
    return {
        "refused": refused,
        "same": prepared is model
        and not hasattr(acc, "sequence_parallel")
        and type(acc) is Accelerator,
        "stock": type(batches).__name__,
        "keys": sorted(next(iter(batches))),
        "attention": model.config._attn_implementation,
        "hooks": len(model._forward_pre_hooks) + len(model._forward_hooks),
    }


def test_one_process_is_refused_for_two_and_stock_for_one() -> None:
    (found,) = run_ranks(alone, 1, init=False)
    assert found["refused"].startswith("MeshError: ")
    assert "= 2, but the number of processes is 1" in found["refused"]
    assert "Start 2 processes" in found["refused"]
    assert found["same"]
    assert found["stock"] == "DataLoaderShard"
    assert found["keys"] == ["input_ids", "labels"]
    assert (found["attention"], found["hooks"]) == ("sdpa", 0)


def torchrun(kind: str, sp_size: int) -> dict[str, Any]:
    """As a script under torchrun builds it: nothing says that this is a CPU."""
    os.environ.pop("ACCELERATE_USE_CPU", None)
    AcceleratorState._reset_state(True)
    plugin = None
    if kind == "deepspeed":
        # Without sequence parallelism it is stock accelerate's, which refuses "auto" without a
        # loader.
        plugin = DeepSpeedPlugin(
            hf_ds_config=_zero(train_micro_batch_size_per_gpu="auto" if sp_size > 1 else 1)
        )
    acc = Accelerator(
        deepspeed_plugin=plugin, parallelism_config=ParallelismConfig(sp_size=sp_size)
    )
    model = build("llama", torch.float32)
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    batches = acc.prepare(batches_of(4))
    seen = [own_numbers(batch) for batch in batches]
    losses = train(acc, model, optimizer, batches)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    return {
        "processes": [
            acc.num_processes,
            acc.process_index,
            acc.local_process_index,
            int(acc.is_main_process),
        ],
        "engine": str(acc.distributed_type).rpartition(".")[2],
        "seen": [number for batch in seen for number in batch],
        "losses": losses,
    }


def _zero(**options: Any) -> dict[str, Any]:
    return {
        "train_batch_size": "auto",
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **options,
    }


def under_torchrun() -> dict[str, Any]:
    return {
        f"{kind} {sp_size}": torchrun(kind, sp_size)
        for kind in ("ddp", "deepspeed")
        for sp_size in (2, 1)
    }


def test_torchrun_without_cpu_flag_uses_each_sample_once() -> None:
    ranks = run_ranks(under_torchrun, 2, init=False)
    for name in ranks[0]:
        found = [rank[name] for rank in ranks]
        assert [one["processes"] for one in found] == [[2, 0, 0, 1], [2, 1, 1, 0]], name
        assert {one["engine"] for one in found} == {
            "DEEPSPEED" if "deepspeed" in name else "MULTI_CPU"
        }
        assert sorted(number for one in found for number in one["seen"]) == [0, 1, 2, 3], name
        assert [len(one["losses"]) for one in found] == [4, 4] if name.endswith("2") else [2, 2]
        assert all(loss == loss for one in found for loss in one["losses"])


def dummies() -> dict[str, Any]:
    """DeepSpeed's own optimizer and schedule, named in its config, for which the script passes
    placeholders.
    """
    AcceleratorState._reset_state(True)
    config = _zero(
        train_micro_batch_size_per_gpu="auto",
        optimizer={"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        scheduler={
            "type": "WarmupDecayLR",
            "params": {
                "warmup_num_steps": 2,
                "total_num_steps": "auto",
                "warmup_max_lr": 1e-2,
                "warmup_min_lr": 0.0,
            },
        },
    )
    plugin = DeepSpeedPlugin(hf_ds_config=config)
    acc = Accelerator(deepspeed_plugin=plugin, parallelism_config=ParallelismConfig(sp_size=2))
    model = build("llama", torch.float32)
    optimizer = DummyOptim(model.parameters(), lr=1e-2)
    scheduler = DummyScheduler(optimizer, total_num_steps=6, warmup_num_steps=2)
    model, optimizer, scheduler, batches = acc.prepare(model, optimizer, scheduler, batches_of(6))
    losses = train(acc, model, optimizer, batches, scheduler)
    engine = model.lr_scheduler
    return {
        "total": plugin.deepspeed_config["scheduler"]["params"]["total_num_steps"],
        "steps": engine.last_batch_iteration,
        "lr": float(model.optimizer.param_groups[0]["lr"]),
        "losses": losses,
        "batch": [plugin.deepspeed_config["train_batch_size"], numbers(next(iter(batches)))[0]],
    }


def test_deepspeed_own_optimizer_and_schedule() -> None:
    for rank in run_ranks(dummies, 2, init=False):
        assert rank["total"] == 6
        # Counted from 0: the sixth of six steps has iteration 5, one of four decay steps before the
        # end.
        assert rank["steps"] == 5
        assert rank["lr"] == pytest.approx(1e-2 / 4)
        assert len(rank["losses"]) == 6
        assert rank["losses"][-1] == rank["losses"][-1]
        assert rank["batch"][1] == 0
