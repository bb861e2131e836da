"""Tiled blocks and norms on two ranks that share sequences, under every engine: one reduction per
parameter.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import MixtralConfig

from tests.helpers.batches import CASES, Sample, loader
from tests.helpers.models import VOCAB, build
from tests.helpers.parity_jobs import (
    EXACT,
    Engine,
    Grads,
    Report,
    assert_parity,
    compare,
    full_gradients,
    plain_step,
    report,
    zero_gradients,
)
from tests.helpers.ranks import run_ranks
from tests.parity.test_engines import FLOAT32, keep_gradients
from ulysses_accel.errors import UnsupportedModelError
from ulysses_accel.memory import tile_mlps, tile_norms
from ulysses_accel.memory.tiling import mlp as tiled_mlp

Step = tuple[str, list[Sample], list[float], Grads]
# Three rows of the widest intermediate, of the eight that a rank has.
TILE = 3 * 48 * 8
CASE_NAMES = ("packed", "odd length")


def mixtral() -> Any:
    return MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        experts_implementation="eager",
    )


def config_of(name: str) -> Any:
    return mixtral() if name == "mixtral" else None


def expected_steps(name: str) -> list[Step]:
    model = build(name, config=config_of(name))
    steps = []
    for number, case in enumerate(CASE_NAMES):
        samples = [CASES[case](number)]
        steps.append((case, samples, *plain_step(model, samples)))
    return steps


def tile(model: nn.Module) -> None:
    tile_mlps(model, tile_bytes=TILE)
    # The parity models have norms in their own dtype.
    tile_norms(model, tile_bytes=TILE)


def engine_steps(name: str, engine: Engine, steps: list[Step], *, tile_first: bool) -> Report:
    accelerator = engine.accelerator(2)
    dtype = torch.float32 if engine.name == "deepspeed" else torch.float64
    model = build(name, dtype, config=config_of(name))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    if tile_first:
        tile(model)
    model, optimizer, batches = accelerator.prepare(
        model, optimizer, loader([it for step in steps for it in step[1]])
    )
    if not tile_first:
        tile(model)
    gradients = keep_gradients(model)
    way = "tile_rows" if name == "mixtral" else "tile_projections"
    results = {}
    for (case, _, losses, grads), batch in zip(steps, batches, strict=True):
        # By the formula where there is one; under ZeRO-3 too, whose hooks are on every child.
        with mock.patch.object(tiled_mlp, way, wraps=getattr(tiled_mlp, way)) as spy:
            loss = model(**batch).loss
        assert spy.call_count == 2, f"{engine}: {spy.call_count} blocks by {way}"
        accelerator.backward(loss)
        found = compare(float(loss.detach()), gradients(), losses[0], grads)
        results[f"{name} {engine} {tile_first}: {case}"] = report(found)
        zero_gradients(model)
    return results


def all_engines(engines: list[Engine], steps: dict[str, list[Step]]) -> Report:
    results: Report = {}
    for name, engine in [(name, engine) for name in steps for engine in engines]:
        for tile_first in (True, False):
            results.update(engine_steps(name, engine, steps[name], tile_first=tile_first))
    return results


def test_ddp_and_fsdp2() -> None:
    steps = {name: expected_steps(name) for name in ("llama", "gpt2", "mixtral")}
    engines = [Engine(), Engine("fsdp2")]
    reports = run_ranks(all_engines, 2, engines, steps, init=False)
    assert_parity(reports, EXACT, 2 * 2 * 3 * len(CASE_NAMES))


def test_deepspeed() -> None:
    steps = {name: expected_steps(name) for name in ("llama", "mixtral")}
    engines = [Engine("deepspeed", stage) for stage in (1, 2, 3)]
    reports = run_ranks(all_engines, 2, engines, steps, init=False)
    assert_parity(reports, FLOAT32, 2 * 3 * 2 * len(CASE_NAMES))


# DDP reads the annotations of a hook, and does not understand strings.
def count_and_reduce(sent, bucket):  # type: ignore[no-untyped-def]
    sent.append(bucket.buffer().numel())
    work = dist.all_reduce(bucket.buffer().div_(2), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def reduced_elements() -> tuple[list[int], list[int], float]:
    """Elements of every all-reduce of DDP's backward, of the plain and of the tiled model, and how
    gradients differ.
    """
    numbers: list[list[int]] = []
    grads: list[Grads] = []
    for tiled in (False, True):
        model = build("llama")
        if tiled:
            tile(model)
        parallel = DistributedDataParallel(model)
        sent: list[int] = []

        parallel.register_comm_hook(sent, count_and_reduce)
        ids = torch.randint(
            3, VOCAB, (2, 16), generator=torch.Generator().manual_seed(dist.get_rank())
        )
        parallel(input_ids=ids, labels=ids).loss.backward()
        numbers.append(sent)
        grads.append(full_gradients(model))
    difference = max(
        float((grads[1][name] - grad).norm() / grad.norm()) for name, grad in grads[0].items()
    )
    return numbers[0], numbers[1], difference


def test_each_parameter_is_reduced_once() -> None:
    num_parameters = sum(parameter.numel() for parameter in build("llama").parameters())
    for plain, tiled, difference in run_ranks(reduced_elements, 2):
        assert tiled == plain
        assert sum(tiled) == num_parameters
        assert difference <= EXACT


def error_of_sharded_children() -> str:
    """What a model says whose linear layers are sharded one by one."""
    model, mesh = build("llama"), init_device_mesh("cpu", (2,))
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            fully_shard(module, mesh=mesh)
    tile(model)
    try:
        model(input_ids=torch.ones(1, 16, dtype=torch.int64))
    except UnsupportedModelError as error:
        return str(error)
    return ""


def test_linear_layers_sharded_one_by_one_are_refused() -> None:
    for message in run_ranks(error_of_sharded_children, 2):
        assert "LlamaMLP.gate_proj is sharded by FSDP2 on its own" in message
        assert "Shard the whole LlamaMLP" in message
