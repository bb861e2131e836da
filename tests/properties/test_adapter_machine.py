"""Any order of stepping, breaking, saving, loading and changing epochs, against a list that is
walked by hand.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch.utils.data import DistributedSampler

from tests.helpers.loader_samples import Samples, adapt, ids, loader, sample


def order_of(kind: str, count: int, epoch: int) -> list[int]:
    if kind == "plain":
        return list(range(count))
    sampler: Any = DistributedSampler(range(count), num_replicas=1, rank=0, seed=1)  # type: ignore[arg-type]
    sampler.set_epoch(epoch)
    return list(sampler)


class Machine(RuleBasedStateMachine):
    """`place` is the model: how many steps of `epoch` were taken; None between epochs."""

    @initialize(
        kind=st.sampled_from(["plain", "sampler"]), count=st.integers(1, 5), skip=st.integers(0, 2)
    )
    def begin(self, kind: str, count: int, skip: int) -> None:
        self.kind, self.count, self.skip = kind, count, skip
        self.sampler_epoch = 0
        self.epoch = 0
        self.place = skip
        self.resumed = False
        self.iterator: Any = None
        self.saved: list[tuple[str, int, int, int]] = []
        self.adapter = self.fresh()

    def fresh(self) -> Any:
        sampler: Any = None
        if self.kind == "sampler":
            sampler = DistributedSampler(range(self.count), num_replicas=1, rank=0, seed=1)  # type: ignore[arg-type]
        dl = loader(Samples(self.count), sampler=sampler)
        return adapt(dl).skip_first_batches(self.skip)

    def order(self) -> list[int]:
        return order_of(self.kind, self.count, self.sampler_epoch)

    @rule()
    def iterate_anew(self) -> None:
        self.iterator = iter(self.adapter)
        if not self.resumed:
            self.place = self.skip
        self.resumed = False

    @precondition(lambda self: self.iterator is not None)
    @rule(steps=st.integers(1, 3))
    def take_steps(self, steps: int) -> None:
        for _ in range(steps):
            batch = next(self.iterator, None)
            if self.place >= self.count:
                assert batch is None
                self.iterator = None
                self.epoch, self.place, self.resumed = self.epoch + 1, self.skip, False
                return
            index = self.order()[self.place]
            assert batch is not None
            assert ids(batch) == [sample(index, 4)["input_ids"].tolist()]
            self.place += 1
            assert self.adapter.end_of_dataloader == (self.place == self.count)

    @precondition(lambda self: self.iterator is not None)
    @rule()
    def break_off(self) -> None:
        self.iterator = None

    @precondition(lambda self: self.iterator is None)
    @rule(epoch=st.integers(0, 3))
    def set_epoch(self, epoch: int) -> None:
        self.adapter.set_epoch(epoch)
        if self.resumed and epoch != self.epoch:
            self.resumed, self.place = False, self.skip
        self.sampler_epoch = self.epoch = epoch

    @rule()
    def save(self) -> None:
        self.saved.append(
            (json.dumps(self.adapter.state_dict()), self.epoch, self.sampler_epoch, self.place)
        )

    @precondition(lambda self: self.saved)
    @rule(pick=st.integers(0, 100), anew=st.booleans())
    def load(self, pick: int, anew: bool) -> None:
        state, epoch, sampler_epoch, place = self.saved[pick % len(self.saved)]
        told = json.loads(state)["set_epoch"]
        if anew or not told:
            # A sampler that was told an epoch can't be told that it was never told one: take a new
            # one.
            self.adapter = self.fresh()
        self.adapter.load_state_dict(json.loads(state))
        self.iterator = None
        self.epoch, self.sampler_epoch, self.place, self.resumed = epoch, sampler_epoch, place, True

    @invariant()
    def state_shows_the_place(self) -> None:
        if hasattr(self, "adapter"):
            state = self.adapter.state_dict()
            assert (state["batches"], state["micro_step"], state["epoch"]) == (
                self.place,
                0,
                self.epoch,
            )


Machine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestAdapterMachine = Machine.TestCase


def test_the_model_itself_knows_more_than_one_order() -> None:
    assert order_of("sampler", 5, 0) != order_of("sampler", 5, 1)
    assert torch.equal(torch.tensor(sorted(order_of("sampler", 5, 2))), torch.arange(5))
