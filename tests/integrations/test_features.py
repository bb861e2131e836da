"""The list of features: what happens without one of them, and the order of each pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from tests.forward.test_router_loss import build_experts
from tests.helpers.engine_jobs import batches_of, error_of, train
from tests.helpers.models import build
from tests.helpers.ranks import run_ranks
from tests.helpers.trainer_jobs import Mode
from tests.helpers.trl_jobs import Case, make_trainer, plain_texts
from ulysses_accel import MemoryConfig, ParallelismConfig
from ulysses_accel.expert_parallel.feature import ExpertParallel
from ulysses_accel.integrations.attach import FEATURES, attach


class WithoutExperts(ParallelismConfig):
    """A config of a package whose list of features lacks expert parallelism."""

    def _validate_accelerator(self, accelerator: Any) -> None:
        attach(self, accelerator, tuple(each for each in FEATURES if each is not ExpertParallel))


def accelerator_of(config: ParallelismConfig) -> Accelerator:
    AcceleratorState._reset_state(True)
    return Accelerator(cpu=True, parallelism_config=config)


def losses_of(config: ParallelismConfig) -> list[float]:
    accelerator = accelerator_of(config)
    model = build_experts("Mixtral")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return train(accelerator, *accelerator.prepare(model, optimizer, batches_of(3)))


def without_experts() -> dict[str, Any]:
    saving = MemoryConfig(checkpoint=True)
    return {
        "all": losses_of(ParallelismConfig(sp_size=2, memory_config=saving)),
        "less": losses_of(WithoutExperts(sp_size=2, memory_config=saving)),
        "refused": error_of(accelerator_of, WithoutExperts(sp_size=2, ep_size=2)),
    }


def test_expert_parallelism_can_be_removed_from_the_list() -> None:
    for found in run_ranks(without_experts, 2, init=False):
        assert len(found["less"]) == 3
        assert found["less"] == found["all"]
        assert found["refused"].startswith("ConfigError: ep_size=2 (from constructor), but nothing")
        assert found["refused"].endswith("implements it. Use ep_size=1.")


def calls_of(accelerator: Any, prepare: Callable[[], object]) -> list[str]:
    """Returns the features in the order in which a model passed through them, and back."""
    calls: list[str] = []
    for feature in accelerator.ulysses_accel.features:
        for method in ("check_model", "prepare_model", "around_engine", "after_prepare"):
            _record(feature, method, calls)
    prepare()
    return calls


def _record(feature: Any, method: str, calls: list[str]) -> None:
    stock = getattr(feature, method)

    def recording(*args: Any) -> Any:
        calls.append(f"{method} {feature.name}")
        return stock(*args)

    setattr(feature, method, recording)


ORDERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "memory, sequence": (
        {"sp_size": 2, "memory_config": MemoryConfig(checkpoint=True)},
        ["memory", "sequence_parallel"],
    ),
    "memory, experts": (
        {"ep_size": 2, "memory_config": MemoryConfig(checkpoint=True)},
        ["memory", "expert_parallel"],
    ),
    "experts, sequence": (
        {"sp_size": 2, "ep_size": 2},
        ["expert_parallel", "sequence_parallel"],
    ),
    "tensor, sequence": ({"tp_size": 2}, ["tensor_parallel", "sequence_parallel"]),
    "memory, tensor": (
        {"tp_size": 2, "memory_config": MemoryConfig(checkpoint=True)},
        ["memory", "tensor_parallel", "sequence_parallel"],
    ),
}


def call_orders() -> dict[str, list[str]]:
    found = {}
    for name, (sizes, _) in ORDERS.items():
        accelerator = accelerator_of(ParallelismConfig(**sizes))
        model: nn.Module = build_experts("Mixtral") if "ep_size" in sizes else build("llama")
        found[name] = calls_of(accelerator, lambda: accelerator.prepare_model(model))  # noqa: B023
    return found


def test_a_model_passes_through_each_pair_in_order() -> None:
    for found in run_ranks(call_orders, 2, init=False):
        for name, (_, features) in ORDERS.items():
            assert found[name] == [
                *(f"check_model {feature}" for feature in features),
                *(f"prepare_model {feature}" for feature in features),
                *(f"around_engine {feature}" for feature in features),
                *(f"after_prepare {feature}" for feature in reversed(features)),
            ]


def trl_order(folder: str) -> list[str]:
    names = []
    for memory in (None, MemoryConfig(checkpoint=True)):
        case = Case("SFTTrainer", plain_texts, steps=1, memory=memory)
        session = make_trainer(case, Mode(sp=2), folder).accelerator.ulysses_accel
        names.append(" ".join(feature.name for feature in session.features))
    return names


def test_a_trl_trainer_is_before_what_sees_shards(tmp_path: Any) -> None:
    expected = ["trl_trainer sequence_parallel", "memory trl_trainer sequence_parallel"]
    assert run_ranks(trl_order, 2, str(tmp_path), init=False) == [expected, expected]


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_says_what_requests_it(feature: Any) -> None:
    fields = vars(ParallelismConfig())
    assert set(feature.settings) <= set(fields)
    assert not feature.is_requested(ParallelismConfig())
