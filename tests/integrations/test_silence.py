"""What goes on without sharding says so: a whole batch in training, and a config that comes too
late.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from accelerate import Accelerator

from tests.helpers.ranks import run_ranks
from tests.parity.test_reaggregation import LABELS, TOKENS, build
from ulysses_accel import ParallelismConfig


def test_training_on_a_whole_batch_warns_once() -> None:
    def body() -> list[int]:
        accelerator = Accelerator(cpu=True, parallelism_config=ParallelismConfig(sp_size=2))
        model = build()
        model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        batch = {"input_ids": TOKENS, "labels": LABELS}
        counts = []
        for mode in (model.eval, model.train, model.train):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                mode()(**batch)
            counts.append(sum("nothing is sharded" in str(warning.message) for warning in caught))
        return counts

    assert run_ranks(body, 2, init=False) == [[0, 1, 0], [0, 1, 0]]


def test_a_config_after_an_accelerator_without_one_warns() -> None:
    def body() -> None:
        Accelerator(cpu=True)
        with pytest.warns(UserWarning, match="sp_size=2 and cp_size=1 come too late"):
            ParallelismConfig(sp_size=2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ParallelismConfig(sp_size=1)

    run_ranks(body, 1, init=False)
