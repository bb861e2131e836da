"""The position of a data loader as JSON: what is written, what is checked when it is read, and how
it is reached.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from ulysses_accel import _private_api
from ulysses_accel.errors import CheckpointError

VERSION = 1


@dataclass(frozen=True)
class LoaderState:
    """Where an adapter stands: the next micro-step is number `micro_step` of refill number
    `batches` of `epoch`.

    Args:
        epoch: epochs that were finished, or the number last passed to `set_epoch`.
        set_epoch: whether the epoch was ever set by the user, so that samplers must be told again.
        batches: batches of this epoch whose micro-steps were all taken.
        micro_step: micro-steps of the next batch that were taken already.
        sp_size: ranks that share a sequence.
        same_batch: the adapter's mode.
        on_uneven: the adapter's policy.
        dataset: class name of the dataset.
        length: samples in the dataset, None when it does not know.
        random: random states at the beginning of the epoch, None when the wrapped loader keeps
            its state.
        inner: the wrapped loader's state before the next batch was drawn, None when it has
            none.
        warm: whether the epoch began with workers that an earlier one had started.
        version: of this format.
    """

    epoch: int
    set_epoch: bool
    batches: int
    micro_step: int
    sp_size: int
    same_batch: bool
    on_uneven: str
    dataset: str
    length: int | None
    random: dict[str, str] | None
    inner: dict[str, Any] | None = None
    warm: bool = False
    version: int = VERSION

    def to_dict(self) -> dict[str, Any]:
        """Returns the state as a dict that `json.dump` takes."""
        return asdict(self)

    @staticmethod
    def from_dict(state: Any) -> LoaderState:
        """Returns the state that `to_dict` wrote.

        Raises:
            CheckpointError: it is something else, or of another version.
        """
        if not isinstance(state, dict):
            raise CheckpointError(f"a data loader's state is a dict, not a {type(state).__name__}.")
        if state.get("version") != VERSION:
            raise CheckpointError(
                f"the data loader's state has version {state.get('version')!r}, this package reads "
                f"{VERSION}. "
                "Resume with the package version that saved it."
            )
        wrong = sorted(map(str, _FIELDS.keys() ^ state.keys()))
        wrong += [
            name for name, check in _FIELDS.items() if name in state and not check(state[name])
        ]
        if wrong:
            raise CheckpointError(
                f"the data loader's state is damaged: {', '.join(wrong)} missing, unknown or of "
                "the wrong type. "
                "Take the state as state_dict() gave it."
            )
        return LoaderState(**state)

    def check_fits(self, now: LoaderState) -> None:
        """Checks that the state is of the same job as `now`, an adapter's present state.

        Raises:
            CheckpointError: the number of ranks, the mode or the dataset is another one.
        """
        named = {
            "sp_size": "Resume with the same number of ranks in a sequence group, "
            "or start the epoch again",
            "same_batch": "Build the adapter in the same mode",
            "on_uneven": "Build the adapter with the same policy",
            "dataset": "Resume on the same dataset, or start the epoch again",
            "length": "Resume on the same dataset, or start the epoch again",
        }
        for name, fix in named.items():
            saved, mine = getattr(self, name), getattr(now, name)
            if saved != mine:
                raise CheckpointError(
                    f"the data loader's state was saved with {name}={saved!r}, this job has "
                    f"{name}={mine!r}. {fix}."
                )
        if self.micro_step >= (1 if self.same_batch else self.sp_size):
            raise CheckpointError(
                f"the data loader's state has micro_step={self.micro_step} of "
                f"sp_size={self.sp_size}."
            )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_random(value: Any) -> bool:
    if value is None:
        return True
    if type(value) is not dict or "torch" not in value:
        return False
    return all(
        type(text) is str and len(text) % 2 == 0 and _is_hex(text) for text in value.values()
    )


def _is_hex(text: str) -> bool:
    return bool(text) and not text.strip("0123456789abcdef")


_FIELDS = {
    "epoch": _is_count,
    "set_epoch": _is_flag,
    "batches": _is_count,
    "micro_step": _is_count,
    "sp_size": _is_count,
    "same_batch": _is_flag,
    "on_uneven": _is_text,
    "dataset": _is_text,
    "length": lambda value: value is None or _is_count(value),
    "random": _is_random,
    "inner": lambda value: value is None or type(value) is dict,
    "warm": _is_flag,
    "version": _is_count,
}


def inner_state(loader: Any) -> dict[str, Any] | None:
    """Returns a copy of the loader's state when it has one that is JSON, None otherwise."""
    if not hasattr(loader, "load_state_dict"):
        return None
    try:
        state = json.loads(json.dumps(loader.state_dict(), allow_nan=False))
    except (AttributeError, TypeError, ValueError):
        return None
    return state if isinstance(state, dict) else None


class ResumedBatchSampler:
    """Another batch sampler without its first batches; nothing of the skipped batches is loaded.

    Args:
        batch_sampler: whose order is kept.
        skip: batches to leave out.
    """

    def __init__(self, batch_sampler: Any, skip: int) -> None:
        self._inner = batch_sampler
        self._skip = skip

    def __getattr__(self, name: str) -> Any:
        # Transparent, so that whoever walks from a batch sampler to its sampler arrives there.
        if name == "_inner":
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __len__(self) -> int:
        return max(0, len(self._inner) - self._skip)

    def __iter__(self) -> Iterator[Any]:
        yield from islice(self._inner, self._skip, None)


_REBUILD = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)
_REBUILD_SHARD = (
    "device",
    "rng_types",
    "synchronized_generator",
    *_private_api.SHARD_LOADER_ATTRIBUTES,
    "iteration",
)


def loader_at(loader: Any, skip: int) -> tuple[Any, int]:
    """Returns a loader that starts after the first `skip` batches, and how many must still be
    drawn and dropped.

    An ordinary loader with a batch sampler, torch's or accelerate's, is rebuilt around the rest of
    its indices; of any other the batches are drawn.
    """
    if skip == 0:
        return loader, 0
    # Imported here: a plain loader does not need accelerate.
    from accelerate.data_loader import DataLoaderShard

    is_shard = type(loader) is DataLoaderShard and not loader.use_stateful_dataloader
    sampler = getattr(loader, "batch_sampler", None)
    is_rebuilt = is_shard or type(loader) is DataLoader
    if sampler is None or isinstance(loader.dataset, IterableDataset) or not is_rebuilt:
        return loader, skip
    names = _REBUILD + (_REBUILD_SHARD if is_shard else ())
    options = {name: getattr(loader, name) for name in names if hasattr(loader, name)}
    rest = ResumedBatchSampler(sampler, skip)
    return type(loader)(loader.dataset, batch_sampler=rest, **options), 0
