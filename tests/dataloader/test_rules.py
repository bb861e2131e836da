"""The adapter asks what the model wants when an epoch begins, and fails on all ranks where it can't
be told.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from tests.helpers.loader_samples import Samples, adapt, error_of, loader
from tests.helpers.ranks import run_ranks
from ulysses_accel.errors import BatchError, ConfigError
from ulysses_accel.sequence.batch_rules import BatchRules, resolve_rules

OWN = BatchRules(labels="same_token")


def test_rules_may_become_known_after_the_loader() -> None:
    known = [BatchRules()]
    adapter = adapt(loader(Samples(2)), rules=lambda: known[-1])
    assert all("shift_labels" in batch and "labels" not in batch for batch in adapter)
    known.append(OWN)
    assert all("labels" in batch and "shift_labels" not in batch for batch in adapter)
    assert all("labels" in batch for batch in adapter.skip_first_batches(1))


def test_rules_stay_the_same_within_an_epoch() -> None:
    known = [BatchRules()]
    adapter = adapt(loader(Samples(3)), rules=lambda: known[-1])
    steps = iter(adapter)
    first = next(steps)
    known.append(OWN)
    assert all("shift_labels" in batch for batch in [first, *steps])


def test_a_rebuilt_loader_keeps_the_rules() -> None:
    adapter = adapt(loader(Samples(2)), same_batch=True, rules=lambda: OWN)
    batch = adapter.collate_fn([Samples(2)[0]])
    assert batch["labels"].tolist() == batch["input_ids"].tolist()


def test_rules_that_can_not_be_told_fail_on_every_rank() -> None:
    def rules() -> BatchRules:
        if dist.get_rank() == 1:
            raise ConfigError("two models want different labels")
        return OWN

    def body() -> Any:
        return error_of(lambda: list(adapt(loader(Samples(2)), same_batch=True, rules=rules)))

    message = "BatchError: rank 1 failed to produce a batch: ConfigError: two models want different labels"
    assert run_ranks(body, 2) == [message, message]


def test_resolving() -> None:
    assert resolve_rules(OWN) is resolve_rules(lambda: OWN) is OWN
    with pytest.raises(BatchError, match="not known"):
        resolve_rules(lambda: (_ for _ in ()).throw(BatchError("not known")))
