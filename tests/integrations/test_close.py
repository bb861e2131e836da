"""`close` restores everything: accelerator, models and Trainers have the attributes that they had,
and no others.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from transformers import Trainer

from tests.forward.test_router_loss import build_experts
from tests.helpers.engine_jobs import batches_of, train
from tests.helpers.models import build
from tests.helpers.ranks import run_ranks
from tests.helpers.trainer_jobs import Mode, pad, samples
from tests.helpers.trl_jobs import Case, make_trainer, pairs, plain_texts
from ulysses_accel import MemoryConfig, ParallelismConfig

Snapshot = dict[str, Any]
OURS = {
    "overrides_of_ulysses_accel",
    "ulysses_accel",
    "sequence_parallel",
    "expert_parallel",
    "memory",
}


def snapshot(thing: Any) -> Snapshot:
    """Returns an object's class and attributes; of containers, such as hooks, the entries."""
    attributes: Snapshot = {"__class__": type(thing)}
    for name, value in vars(thing).items():
        attributes[name] = _entries(value)
    return attributes


def _entries(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(value.items())
    return tuple(value) if isinstance(value, (list, set, tuple)) else value


def changed(before: Snapshot, after: Snapshot) -> list[str]:
    """Returns the names of attributes that came, went or are another object."""
    names = set(before) ^ set(after)
    names |= {name for name in set(before) & set(after) if not _same(before[name], after[name])}
    return sorted(names)


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, tuple) and isinstance(new, tuple):
        return len(old) == len(new) and all(map(_same, old, new))
    # A bound method is made anew each time that it is read.
    is_value = isinstance(old, (str, int, float)) or hasattr(old, "__func__")
    return old is new or (is_value and bool(old == new))


def snapshots(model: nn.Module) -> dict[str, Snapshot]:
    return {name: snapshot(module) for name, module in model.named_modules()}


def changed_modules(before: dict[str, Snapshot], after: dict[str, Snapshot]) -> list[str]:
    """Returns what changed of each module, and modules that came or went."""
    found = sorted(set(before) ^ set(after))
    for name in set(before) & set(after):
        found += [f"{name}.{attribute}" for attribute in changed(before[name], after[name])]
    return found


JOBS: dict[str, dict[str, Any]] = {
    "sp": {"sp_size": 2},
    "cp": {"cp_size": 2},
    "memory": {"sp_size": 2, "memory_config": MemoryConfig.alst()},
    "ep": {"sp_size": 2, "ep_size": 2},
}


def accelerator_job(name: str, attaches: bool) -> dict[str, list[str]]:
    """Returns what is not as it was before `prepare`, after a training and `close`."""
    AcceleratorState._reset_state(True)
    config = ParallelismConfig(**JOBS[name]) if attaches else None
    acc = Accelerator(cpu=True, parallelism_config=config)
    model = build_experts("Mixtral") if name == "ep" else build("llama", torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = snapshot(acc), snapshot(acc.state), snapshots(model), snapshot(optimizer)
    prepared, stepping, batches = acc.prepare(model, optimizer, batches_of(2))
    assert len(train(acc, prepared, stepping, batches)) in (1, 2)
    if attaches:
        acc.sequence_parallel.close()
    optimizer.zero_grad()
    acc.free_memory()
    return {
        "attributes": sorted(vars(acc)),
        "accelerator": sorted(set(changed(before[0], snapshot(acc))) - OURS - {"__class__"}),
        "class": [type(acc).__qualname__, str(type(acc) is Accelerator)],
        "state": changed(before[1], snapshot(acc.state)),
        "model": changed_modules(before[2], snapshots(model)),
        "optimizer": changed(before[3], snapshot(optimizer)),
    }


def accelerator_jobs() -> dict[str, Any]:
    return {name: [accelerator_job(name, attaches) for attaches in (True, False)] for name in JOBS}


def test_accelerator_and_model_are_as_accelerate_leaves_them() -> None:
    for found in run_ranks(accelerator_jobs, 2, init=False):
        assert len(found) == len(JOBS)
        for name, (ours, stock) in found.items():
            if name == "ep":
                # Each rank has all experts again, in new parameters.
                assert [change for change in ours["model"] if "experts" in change]
                ours["model"] = [change for change in ours["model"] if "experts" not in change]
            # transformers installs hooks of its own in a forward that it computes alone.
            assert set(ours.pop("model")) <= set(stock.pop("model")), name
            assert ours == stock, name


def trainer_job(kind: str, folder: str) -> list[str]:
    """Returns what is not as in a Trainer that never was attached."""
    AcceleratorState._reset_state(True)
    if kind == "Trainer":
        arguments = Mode(sp=2).arguments(folder, 2)
        trainer = Trainer(build("llama"), arguments, pad, samples(4, (16, 13)))  # type: ignore[arg-type]
    else:
        data = pairs if kind == "DPOTrainer" else plain_texts
        trainer = make_trainer(Case(kind, data, steps=1), Mode(sp=2), folder)
    attached = snapshot(trainer)
    base = type(trainer).__base__
    trainer.accelerator.sequence_parallel.close()
    after = snapshot(trainer)
    assert after["__class__"] is base
    return sorted(set(changed(attached, after)) - OURS - {"__class__"})


def trainer_jobs(folder: str) -> dict[str, list[str]]:
    kinds = ("Trainer", "SFTTrainer", "DPOTrainer")
    return {kind: trainer_job(kind, folder) for kind in kinds}


def test_one_close_restores_the_trainer_too(tmp_path: Any) -> None:
    for found in run_ranks(trainer_jobs, 2, str(tmp_path), init=False):
        # It stored a method of the accelerator.
        assert len(found) == 3
        assert all(names == ["gather_function"] for names in found.values()), found
