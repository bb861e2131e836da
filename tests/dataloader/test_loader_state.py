"""Resume: the continuation after `load_state_dict` is bit-identical to the run that was not
interrupted.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler

from tests.helpers.loader_samples import (
    Samples,
    Stream,
    adapt,
    error_of,
    from_list,
    ids,
    loader,
    plain,
    sample,
)
from tests.helpers.ranks import run_ranks
from ulysses_accel.errors import CheckpointError

EPOCHS = 2


def shuffled(data: Any, kind: str, workers: int = 0) -> DataLoader[Any]:
    """A loader whose order comes from torch's generator, its own generator, or the epoch number."""
    kept = kind.endswith("-kept")  # workers that live from one epoch to the next
    if kind.startswith("global"):
        return loader(data, shuffle=True, num_workers=workers, persistent_workers=kept)
    if kind.startswith("generator"):
        generator = torch.Generator().manual_seed(7)
        return loader(
            data, shuffle=True, num_workers=workers, generator=generator, persistent_workers=kept
        )
    if kind == "epoch":
        sampler: Any = DistributedSampler(data, num_replicas=1, rank=0, seed=3)
        return loader(data, sampler=sampler, num_workers=workers)
    return loader(data, num_workers=workers)


def walk(adapter: Any, epochs: range, set_epoch: bool, save_at: int = -1) -> tuple[list[Any], str]:
    """All steps of these epochs with a draw of the model's own random numbers at each, and the
    state at one of them.

    The first step may come after a state was loaded; `save_at` counts micro-steps, epoch ends not
    included.
    """
    steps: list[Any] = []
    state = json.dumps(adapter.state_dict()) if save_at == 0 else ""
    for epoch in epochs:
        if set_epoch:
            adapter.set_epoch(epoch)
        for batch in adapter:
            steps.append([epoch, plain(batch), torch.rand(1).item()])
            if len(steps) == save_at:
                state = json.dumps([adapter.state_dict(), epoch, torch.get_rng_state().tolist()])
    return steps, state


@pytest.mark.parametrize(
    ("kind", "workers"),
    [
        ("plain", 0),
        ("global", 0),
        ("generator", 0),
        ("epoch", 0),
        ("global", 2),
        ("global-kept", 2),
        ("generator-kept", 2),
    ],
)
def test_resume_at_every_step_in_one_process(kind: str, workers: int) -> None:
    count = 3 if workers else 5
    torch.manual_seed(0)
    whole, _ = walk(adapt(shuffled(Samples(count), kind, workers)), range(EPOCHS), kind == "epoch")
    points = (2, count + 1) if workers else range(1, 2 * count + 1)
    for point in points:
        torch.manual_seed(0)
        again, saved = walk(
            adapt(shuffled(Samples(count), kind, workers)), range(EPOCHS), kind == "epoch", point
        )
        assert again == whole  # taking the state changes nothing
        state, epoch, rng = json.loads(saved)
        fresh = adapt(shuffled(Samples(count), kind, workers))
        fresh.load_state_dict(state)
        torch.set_rng_state(torch.tensor(rng, dtype=torch.uint8))
        rest, _ = walk(fresh, range(epoch, EPOCHS), kind == "epoch")
        assert rest == whole[point:], f"resumed after {point} steps"


@pytest.mark.parametrize("kind", ["global", "generator", "epoch"])
def test_resume_before_the_first_step_and_between_epochs(kind: str) -> None:
    for done in range(EPOCHS):
        torch.manual_seed(done)
        adapter = adapt(shuffled(Samples(4), kind))
        walk(adapter, range(done), kind == "epoch")
        state, rng = json.loads(json.dumps(adapter.state_dict())), torch.get_rng_state()
        expected, _ = walk(adapter, range(done, EPOCHS), kind == "epoch")
        for restored in (
            True,
            False,
        ):  # with and without the caller putting its own random state back
            fresh = adapt(shuffled(Samples(4), kind))
            fresh.load_state_dict(state)
            torch.manual_seed(99)
            if restored:
                torch.set_rng_state(rng)
            found, _ = walk(fresh, range(done, EPOCHS), kind == "epoch")
            if restored:
                assert found == expected
            first = [step[1] for step in found if step[0] == done]
            assert first == [step[1] for step in expected if step[0] == done]


@pytest.mark.parametrize("same", [True, False])
def test_resume_at_every_micro_step_over_ranks(same: bool) -> None:
    def body() -> Any:
        def make() -> Any:
            data = Samples(3, length=5, base=0 if same else 10 * dist.get_rank())
            generator = torch.Generator().manual_seed(1 if same else dist.get_rank())
            return adapt(loader(data, shuffle=True, generator=generator), same_batch=same)

        adapter = make()
        states, whole = [json.dumps(adapter.state_dict())], []
        for _ in range(EPOCHS):
            for batch in adapter:
                whole.append(plain(batch))
                states.append(json.dumps(adapter.state_dict()))
        per_epoch = len(whole) // EPOCHS
        matches = []
        for point, state in enumerate(states):
            fresh = make()
            fresh.load_state_dict(json.loads(state))
            assert json.dumps(fresh.state_dict()) == state
            epochs_left = EPOCHS - (max(point - 1, 0) // per_epoch)
            matches.append(
                [plain(batch) for _ in range(epochs_left) for batch in fresh] == whole[point:]
            )
        return matches

    for matches in run_ranks(body, 2):
        assert matches == [True] * (EPOCHS * (3 if same else 6) + 1)


def test_resume_twice_in_a_row() -> None:
    torch.manual_seed(0)
    adapter = adapt(shuffled(Samples(6), "global"))
    whole = [ids(batch) for batch in adapter]
    torch.manual_seed(0)
    adapter = adapt(shuffled(Samples(6), "global"))
    seen = []
    for _ in range(3):
        for batch, _stop in zip(adapter, range(2)):
            seen.append(ids(batch))
            state = json.dumps(adapter.state_dict())
            if _stop == 1:
                break
        adapter = adapt(shuffled(Samples(6), "global"))
        adapter.load_state_dict(json.loads(state))
    assert seen == whole
    assert list(adapter) == []


def test_skipped_samples_are_not_loaded() -> None:
    data = Samples(50)
    adapter = adapt(loader(data))
    for _ in zip(range(40), adapter):
        pass
    state = adapter.state_dict()
    fresh = Samples(50)
    resumed = adapt(loader(fresh))
    resumed.load_state_dict({**state, "batches": 45})
    assert len(list(resumed)) == 5
    assert fresh.loaded == 5


def test_iterable_datasets_are_read_up_to_the_position() -> None:
    for workers in (0, 2):
        adapter = adapt(loader(Stream(7), num_workers=workers))
        steps = []
        for batch in adapter:
            steps.append(ids(batch))
            if len(steps) == 4:
                state = adapter.state_dict()
        fresh = adapt(loader(Stream(7), num_workers=workers))
        fresh.load_state_dict(state)
        assert [ids(batch) for batch in fresh] == steps[4:]


class Stateful:
    """A loader that keeps its own position, like torchdata's."""

    def __init__(self, count: int = 5, extra: Any = None) -> None:
        self.dataset = Samples(count)
        self.position = 0
        self.extra = extra
        self.drawn = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Any:
        while self.position < len(self.dataset):
            self.position += 1
            self.drawn += 1
            one = sample(self.position - 1, 4)
            yield {key: value.unsqueeze(0) for key, value in one.items()}
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "extra": self.extra}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def test_a_loader_with_its_own_state_keeps_it() -> None:
    for point in range(6):
        adapter = adapt(Stateful())
        everything = iter(adapter)
        before = [ids(next(everything)) for _ in range(point)]
        state = json.loads(json.dumps(adapter.state_dict()))
        assert state["inner"] == {"position": point, "extra": None} or point == 5
        inner = Stateful()
        fresh = adapt(inner)
        fresh.load_state_dict(state)
        rest = [ids(batch) for batch in fresh]
        assert before + rest == [[sample(i, 4)["input_ids"].tolist()] for i in range(5)]
        assert inner.drawn == 5 - point


def test_a_state_that_is_no_json_is_not_used() -> None:
    adapter = adapt(Stateful(extra={1, 2}))
    next(iter(adapter))
    state = json.loads(json.dumps(adapter.state_dict()))
    assert state["inner"] is None
    assert state["random"]
    fresh = adapt(Stateful(extra={1, 2}))
    fresh.load_state_dict(state)
    assert len(list(fresh)) == 4


def test_a_stateful_loader_over_ranks_resumes_mid_refill() -> None:
    def body() -> Any:
        class Own(Stateful):
            def __iter__(self) -> Any:
                for batch in super().__iter__():
                    yield {key: value + 1000 * dist.get_rank() for key, value in batch.items()}

        adapter = adapt(Own())
        whole, states = [], []
        for batch in adapter:
            whole.append(plain(batch))
            states.append(json.dumps(adapter.state_dict()))
        found = []
        for point, state in enumerate(states, 1):
            fresh = adapt(Own())
            fresh.load_state_dict(json.loads(state))
            found.append([plain(batch) for batch in fresh] == whole[point:])
        return found

    assert run_ranks(body, 2) == [[True] * 10] * 2


def test_accelerates_loader_resumes_with_its_gradient_state() -> None:
    def body() -> Any:
        from accelerate.data_loader import prepare_data_loader
        from accelerate.state import GradientState, PartialState

        PartialState(cpu=True)
        gradient_state = GradientState()

        def make() -> Any:
            inner = loader(Samples(5), shuffle=True, drop_last=True)
            prepared = prepare_data_loader(
                inner, num_processes=1, process_index=0, use_seedable_sampler=True, data_seed=4
            )
            return adapt(prepared, same_batch=True)

        adapter = make()
        whole, states = [], []
        for epoch in range(3):
            for batch in adapter:
                whole.append(
                    [
                        epoch,
                        plain(batch),
                        gradient_state.end_of_dataloader,
                        gradient_state.remainder,
                    ]
                )
                states.append(json.dumps(adapter.state_dict()))
        found = []
        for point, state in enumerate(states, 1):
            fresh = make()
            fresh.load_state_dict(json.loads(state))
            rest = []
            for epoch in range((point - 1) // 5, 3):
                for batch in fresh:
                    rest.append(
                        [
                            epoch,
                            plain(batch),
                            gradient_state.end_of_dataloader,
                            gradient_state.remainder,
                        ]
                    )
            found.append(rest == whole[point:])
        orders = {
            json.dumps([step[1]["input_ids"] for step in whole if step[0] == epoch])
            for epoch in range(3)
        }
        return [found, len(orders)]

    assert run_ranks(body, 2, env={"ACCELERATE_USE_CPU": "true"}) == [[[True] * 15, 3]] * 2


def test_another_epoch_than_the_loaded_one_starts_at_its_beginning() -> None:
    adapter = adapt(shuffled(Samples(4), "epoch"))
    adapter.set_epoch(1)
    next(iter(adapter))
    state = adapter.state_dict()
    same, other = adapt(shuffled(Samples(4), "epoch")), adapt(shuffled(Samples(4), "epoch"))
    for fresh, epoch, left in ((same, 1, 3), (other, 2, 4)):
        fresh.load_state_dict(state)
        fresh.set_epoch(epoch)
        assert len(list(fresh)) == left


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sp_size": 2}, "saved with sp_size=2, this job has sp_size=1"),
        ({"length": 7}, "saved with length=7, this job has length=3"),
        ({"dataset": "Other"}, "saved with dataset='Other', this job has dataset='Samples'"),
        ({"same_batch": True}, "saved with same_batch=True"),
        ({"on_uneven": "drop"}, "saved with on_uneven='drop'"),
        ({"version": 2}, "has version 2, this package reads 1"),
        ({"micro_step": 1}, "has micro_step=1 of sp_size=1"),
        ({"batches": -1}, "damaged: batches"),
        ({"batches": True}, "damaged: batches"),
        ({"epoch": "0"}, "damaged: epoch"),
        ({"surprise": 1}, "damaged: surprise"),
        ({"random": {"torch": "00"}}, "no valid random state at 'torch'"),
        ({"random": {"torch": "xy"}}, "damaged: random"),
        ({"random": {}}, "damaged: random"),
    ],
)
def test_states_of_another_job_are_refused(change: dict[str, Any], message: str) -> None:
    adapter = adapt(loader(Samples(3)))
    with pytest.raises(CheckpointError, match=message):
        adapter.load_state_dict({**adapter.state_dict(), **change})
    assert len(list(adapter)) == 3  # a refused state leaves the adapter as it was


def test_a_state_with_a_generator_needs_one() -> None:
    state = adapt(shuffled(Samples(3), "generator")).state_dict()
    with pytest.raises(
        CheckpointError, match="random generator at 'generator', but the loader has none there"
    ):
        adapt(shuffled(Samples(3), "plain")).load_state_dict(state)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(
    json_values,
    st.dictionaries(
        st.sampled_from(["epoch", "batches", "random", "inner", "version"]), json_values
    ),
)
def test_any_json_is_a_state_or_refused(anything: Any, damage: dict[str, Any]) -> None:
    adapter = adapt(loader(Samples(2)))
    assert error_of(adapter.load_state_dict, anything).startswith("CheckpointError")
    message = error_of(adapter.load_state_dict, {**adapter.state_dict(), **damage})
    assert message == "" or message.startswith("CheckpointError")


def test_ranks_that_load_different_states_are_told() -> None:
    def body() -> str:
        adapter = adapt(
            from_list([{"input_ids": torch.ones(1, 4, dtype=torch.long)}] * 4), same_batch=True
        )
        state = adapter.state_dict()
        adapter.load_state_dict({**state, "batches": dist.get_rank()})
        return error_of(lambda: next(iter(adapter)))

    first, second = run_ranks(body, 2)
    assert first == second
    assert "different micro-steps: 0 on ranks [0], 1 on ranks [1]" in first


def test_ranks_that_resume_within_a_refill_at_different_micro_steps_are_told() -> None:
    def body() -> str:
        adapter = adapt(loader(Samples(4, base=10 * dist.get_rank())))
        adapter.load_state_dict(
            {**adapter.state_dict(), "batches": 1, "micro_step": dist.get_rank()}
        )
        return error_of(lambda: next(iter(adapter)))

    first, second = run_ranks(body, 2)
    assert first == second
    assert "different micro-steps: 2 on ranks [0], 3 on ranks [1]" in first
