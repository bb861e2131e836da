"""The list of features: its order is behaviour, and a technique is removed by removing its line."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tests.forward.test_router_loss import build_experts
from tests.helpers.engine_jobs import batches_of, error_of, train
from tests.helpers.models import build
from tests.helpers.ranks import run_ranks
from tests.helpers.trainer_jobs import Mode
from tests.helpers.trl_jobs import Case, make_trainer, plain_texts
from ulysses_accel import MemoryConfig, ParallelismConfig
from ulysses_accel.expert_parallel.feature import ExpertParallel
from ulysses_accel.installation import AcceleratorFeature
from ulysses_accel.integrations.attach import FEATURES, attach

WITHOUT_EXPERTS = tuple(feature for feature in FEATURES if feature is not ExpertParallel)
NAMES = ("memory", "expert_parallel", "tensor_parallel", "sequence_parallel")


def recording(feature: type[AcceleratorFeature], calls: list[str]) -> type[AcceleratorFeature]:
    """Returns a feature that also notes when it changes a model and sees what is prepared."""

    class Recording(feature):  # type: ignore[misc, valid-type]
        def prepare_model(self, model: Any, checked: Any) -> None:
            calls.append(f"before {self.name}")
            super().prepare_model(model, checked)

        def after_prepare(self, prepared: tuple[Any, ...]) -> tuple[Any, ...]:
            calls.append(f"after {self.name}")
            result: tuple[Any, ...] = super().after_prepare(prepared)
            return result

    return Recording


def accelerator_with(features: Sequence[type[AcceleratorFeature]], **sizes: Any) -> Accelerator:
    """Returns an accelerator whose config attaches a list of features."""

    class Config(ParallelismConfig):
        def _validate_accelerator(self, accelerator: Any) -> None:
            attach(self, accelerator, features)

    AcceleratorState._reset_state(True)
    return Accelerator(cpu=True, parallelism_config=Config(**sizes))


def calls_of(model: Any, **sizes: Any) -> list[str]:
    calls: list[str] = []
    accelerator = accelerator_with([recording(one, calls) for one in FEATURES], **sizes)
    accelerator.prepare(model)
    accelerator.sequence_parallel.close()
    return calls


def recorded() -> dict[str, list[str]]:
    saving = MemoryConfig(checkpoint=True)
    trainer: Any = make_trainer(Case("SFTTrainer", plain_texts), Mode(sp=2), "unused")
    return {
        "experts": calls_of(build_experts("Mixtral"), sp_size=2, ep_size=2, memory_config=saving),
        "weights": calls_of(build("llama"), tp_size=2, memory_config=saving),
        "trl": [feature.name for feature in trainer.accelerator.ulysses_accel.features],
    }


@pytest.fixture(scope="module")
def order() -> list[dict[str, list[str]]]:
    found: list[dict[str, list[str]]] = run_ranks(recorded, 2, init=False)
    return found


@pytest.mark.parametrize(("first", "second"), list(combinations(NAMES, 2)))
def test_models_pass_the_pair_in_order_and_come_back_in_reverse(
    first: str, second: str, order: list[dict[str, list[str]]]
) -> None:
    for found in order:
        assert [feature.name for feature in FEATURES] == list(NAMES)
        ran = 0
        for calls in (found["experts"], found["weights"]):
            if f"before {first}" in calls and f"before {second}" in calls:
                ran += 1
                assert calls.index(f"before {first}") < calls.index(f"before {second}")
                assert calls.index(f"after {second}") < calls.index(f"after {first}")
        # Expert and tensor parallelism are refused together.
        assert ran or {first, second} == {"expert_parallel", "tensor_parallel"}


def test_a_trl_trainer_comes_before_what_sees_shards(order: list[dict[str, list[str]]]) -> None:
    for found in order:
        assert found["trl"] == ["trl_trainer", "sequence_parallel"]


def without_experts() -> dict[str, Any]:
    losses = {}
    for name, features in (("all", FEATURES), ("without", WITHOUT_EXPERTS)):
        accelerator = accelerator_with(features, sp_size=2, memory_config=MemoryConfig.alst())
        model = build("llama", torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        prepared = accelerator.prepare(model, optimizer, batches_of(3))
        losses[name] = train(accelerator, *prepared)
        accelerator.sequence_parallel.close()
    refused = error_of(accelerator_with, WITHOUT_EXPERTS, sp_size=2, ep_size=2)
    return {**losses, "refused": refused}


def test_a_technique_without_its_line_is_refused_and_the_others_work() -> None:
    for found in run_ranks(without_experts, 2, init=False):
        assert len(found["all"]) == 3
        assert found["without"] == found["all"]
        assert found["refused"] == (
            "ConfigError: ep_size=2 (from constructor), but nothing in the list "
            "integrations.attach.FEATURES implements it. Use ep_size=1."
        )
