"""Settings of the attention reach a stock accelerator's model and loader, and change no number of
the training.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers.batches import CASES, loader
from tests.helpers.models import build
from tests.helpers.parity_jobs import Engine, Report, assert_parity
from tests.helpers.ranks import run_ranks
from tests.parity.test_models import Step, expected_steps, sharded_steps
from ulysses_accel.sequence.layout import LAYOUTS, ring_order

PREFIX = "PARALLELISM_CONFIG_"
Installed = list[str | int | None]


def installed(layout: tuple[int, int, int]) -> Installed:
    """Returns layout, exchange, stride and chunks, as model and loader work with them."""
    dp_size, cp_size, sp_size = layout
    accelerator = Engine("ddp").accelerator(sp_size, dp_size, cp_size=cp_size)
    sample = CASES["plain"](0)
    _, batches = accelerator.prepare(build("llama"), loader([sample]))
    attention = next(iter(accelerator.sequence_parallel.forwards.values())).attention.attention
    (batch,) = batches
    dealt = layouts_of(sample.plain["input_ids"], batch["input_ids"], cp_size, cp_size * sp_size)
    return [dealt, attention.exchange, attention.head_stride, attention.head_chunks]


def layouts_of(whole: Tensor, shard: Tensor, ring_size: int, size: int) -> str:
    """Returns the layouts of a ring in which this rank would have these tokens."""
    found: list[str] = []
    for layout in LAYOUTS if ring_size > 1 else ():
        order = ring_order(whole.shape[1], ring_size, layout)
        tokens = whole if order is None else whole[:, order]
        if torch.equal(tokens.chunk(size, dim=1)[dist.get_rank()], shard):
            found.append(layout)
    return " ".join(found)


def train(plans: dict[str, list[Step]], layout: tuple[int, int, int]) -> tuple[Installed, Report]:
    return installed(layout), sharded_steps(plans, layout)


@pytest.mark.parametrize(
    ("layout", "settings", "wanted"),
    [
        ((1, 2, 1), {"CP_LAYOUT": "striped"}, ["striped", "p2p", None, 1]),
        (
            (1, 2, 1),
            {"CP_LAYOUT": "contiguous", "CP_EXCHANGE": "all_gather", "CP_HEAD_STRIDE": "1"},
            ["contiguous", "all_gather", 1, 1],
        ),
        ((1, 1, 2), {"SP_HEAD_CHUNKS": "2"}, [None, "p2p", None, 2]),
        (
            (1, 2, 2),
            {"SP_HEAD_CHUNKS": "2", "CP_COMM_STRATEGY": "allgather"},
            ["zigzag", "all_gather", None, 2],
        ),
    ],
    ids=["striped", "gathered", "chunks", "chunks in a ring"],
)
def test_settings_train_the_same(
    layout: tuple[int, int, int], settings: dict[str, str], wanted: Installed
) -> None:
    plans = {"llama": expected_steps("llama", layout[0], True)}
    env = {PREFIX + name: value for name, value in settings.items()}
    ranks = run_ranks(train, math.prod(layout), plans, layout, init=False, env=env)
    for (layouts, *rest), _ in ranks:
        # Some ranks have the same tokens in two layouts.
        assert wanted[0] in (None, *str(layouts).split())
        assert rest == wanted[1:]
    if layout[1] > 1:
        assert set.intersection(*(set(str(found[0]).split()) for found, _ in ranks)) == {wanted[0]}
    assert_parity([report for _, report in ranks], count=len(plans["llama"]))
