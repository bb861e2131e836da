"""What is set right in accelerate's and torch's state."""

from __future__ import annotations

import atexit
import os

import pytest
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState

from tests.helpers.engine_jobs import error_of
from tests.helpers.ranks import run_ranks
from ulysses_accel import ParallelismConfig, use_fsdp_plugin
from ulysses_accel.integrations.accelerate import process_state as state


def _job(backend: str | None) -> bool:
    dist.init_process_group(backend)
    # The forked rank ends without these; only ours is of interest.
    atexit._clear()
    state.close_gloo_at_exit()
    atexit._run_exitfuncs()
    return dist.is_initialized()


@pytest.mark.parametrize("backend", ["gloo", None])
def test_gloo_rests_at_exit_whoever_chose_it(backend: str | None) -> None:
    # Without a backend's name torch calls it `undefined`, and it is gloo on CPUs all the same.
    assert run_ranks(_job, 2, backend, init=False) == [False, False]


@pytest.mark.parametrize(
    ("backends", "is_alone"),
    [
        ("cpu:gloo", True),
        ("cpu:gloo,cuda:gloo", True),
        ("cpu:gloo,cuda:nccl", False),
        ("cuda:nccl", False),
        ("undefined", False),
    ],
)
def test_gloo_alone(backends: str, is_alone: bool) -> None:
    assert state._only_gloo(backends) is is_alone


def _nccl_job() -> bool:
    dist.init_process_group("gloo")
    atexit._clear()

    class Config:
        def __str__(self) -> str:
            return "cpu:gloo,cuda:nccl"

    dist.get_backend_config = lambda _group: Config()  # type: ignore[assignment]
    state.close_gloo_at_exit()
    is_registered = atexit._ncallbacks() > 0
    dist.destroy_process_group()
    return is_registered


def test_nothing_sleeps_at_exit_where_nccl_is_used() -> None:
    assert run_ranks(_nccl_job, 2, init=False) == [False, False]


def _plugin_job() -> dict[str, str]:
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    AcceleratorState._reset_state(True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    config = ParallelismConfig(sp_size=2)
    found = {
        "passed alone": error_of(
            Accelerator, cpu=True, parallelism_config=config, fsdp_plugin=plugin
        )
    }
    AcceleratorState._reset_state(True)
    os.environ.pop("ACCELERATE_USE_FSDP")
    config = ParallelismConfig(sp_size=2)
    accelerator = Accelerator(
        cpu=True, parallelism_config=config, fsdp_plugin=use_fsdp_plugin(config, plugin)
    )
    found["same"] = str(accelerator.state.fsdp_plugin is plugin)
    AcceleratorState._reset_state(True)
    # The launcher's variables come before the config.
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    accelerator = Accelerator(cpu=True, parallelism_config=ParallelismConfig(sp_size=2))
    found["launcher"] = str(accelerator.is_fsdp2)
    return found


def test_the_fsdp_plugin_of_cpu_ranks_is_named() -> None:
    for found in run_ranks(_plugin_job, 2, init=False):
        assert "accelerate keeps it nowhere" in found["passed alone"]
        assert "use_fsdp_plugin(config, plugin)" in found["passed alone"]
        assert (found["same"], found["launcher"]) == ("True", "True")
