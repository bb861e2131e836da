"""Leak police: a test leaves the environment, the process group and transformers' registries as it found them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

torch.set_num_threads(1)


def _registered() -> set[str]:
    return set(ALL_ATTENTION_FUNCTIONS._global_mapping)


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    before = dict(os.environ)
    registered = _registered()
    yield
    # accelerate keeps its state in the process, which forked ranks of later tests would inherit.
    if AcceleratorState._shared_state or PartialState._shared_state:
        AcceleratorState._reset_state(True)
    after = {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"}
    before.pop("PYTEST_CURRENT_TEST", None)
    leaked = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    for key in leaked:
        if key in before:
            os.environ[key] = before[key]
        else:
            del os.environ[key]
    assert _registered() == registered, "the test left attention functions in transformers' registry"
    assert not leaked, f"the test changed environment variables: {sorted(leaked)}"
    assert not dist.is_initialized(), "the test left a process group behind"
