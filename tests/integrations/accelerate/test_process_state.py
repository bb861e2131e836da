"""What is set right in accelerate's and torch's state."""

from __future__ import annotations

import atexit

import pytest
import torch.distributed as dist

from tests.helpers.ranks import run_ranks
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
