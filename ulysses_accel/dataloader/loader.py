"""The data loader of sequence parallel training: each rank gets its shard of every batch.

The adapter wraps any data loader. It draws a batch, agrees with the other ranks of the sequence
group on what all of them hold (one collective on the host), completes it (positions, shifted
labels, padding, description) and yields this rank's shard. Its constructor is that of DeepSpeed's
class of the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from ulysses_accel.config.batch_schema import Rule
from ulysses_accel.dataloader.batch_layout import BatchLayout
from ulysses_accel.dataloader.completion.complete import ShardingCollate
from ulysses_accel.dataloader.epoch import EpochRun, Position
from ulysses_accel.dataloader.loader_state import LoaderState
from ulysses_accel.dataloader.pipeline import Refiller
from ulysses_accel.dataloader.random_state import capture, check_states, keeps_workers
from ulysses_accel.errors import BatchError, ConfigError
from ulysses_accel.sequence.batch_rules import PLAIN_RULES, RulesSource
from ulysses_accel.sequence.labels import IGNORE_INDEX
from ulysses_accel.sequence.layout import Layout
from ulysses_accel.sequence.sharding import mark_shard

_POLICIES = ("error", "drop", "pad")


class UlyssesSPDataLoaderAdapter(DataLoader[Any]):
    """Shards the batches of a data loader over the ranks that share a sequence.

    Every other attribute is the wrapped loader's (`dataset`, `sampler`, `batch_size`,
    ...). Set `on_micro_step` to a function that is to be called before each yield with whether it
    is the last one.

    Args:
        dl: the loader to wrap; yields dicts with `input_ids` `[B, S]` or `inputs_embeds` `[B, S,
            D]`.
        sp_rank: of this process in the sequence group.
        sp_group: the ranks that share a sequence.
        sp_world_size: how many they are, P.
        device: where yielded tensors are put; None leaves them where they are.
        same_batch: True when all ranks of the group draw the same batch, of which each keeps its
            shard: nothing is exchanged and `len` is the loader's. False when each rank brings its
            own batch: P batches become P micro-steps, `len` is P times the loader's.
        on_uneven: when ranks run out of batches at different steps: "error" raises on all of them,
            "drop" stops all at the first one's end, "pad" goes on to the last one's end with
            batches that count no label.
        batch_schema: for keys of your own: "shard" (second dim), "replicate", the number of the dim
            to shard, or, with `same_batch`, a function that shards (`batch_layout.ShardFunction`).
        sequence_length: pad every batch to this length, an encoder's and a decoder's sequence
            alike; None pads to the next multiple of P.
        pad_multiple: a further number that the padded length must be a multiple of.
        cpu_group: the same ranks on a backend that moves host tensors; by default `sp_group`.
        ignore_index: the label that doesn't count.
        pad_token_id: pads `input_ids`.
        allow_duplicates: with `same_batch=False`, don't refuse a first batch that is the same on
            all ranks.
        ring_size: size of the ring; each of its members is a group of P / ring_size Ulysses ranks.
        ring_layout: how the tokens are distributed over the ring.
        rules: what the model requires of a batch; a function that returns it is called at the start
            of each epoch, so that a loader may be built before its model.

    Raises:
        ConfigError: an argument is not legal.
    """

    def __init__(
        self,
        dl: Any,
        sp_rank: int,
        sp_group: dist.ProcessGroup | None,
        sp_world_size: int,
        device: torch.device | str | int | None,
        *,
        same_batch: bool = False,
        on_uneven: str = "error",
        batch_schema: Mapping[str, Rule] | None = None,
        sequence_length: int | None = None,
        pad_multiple: int | None = None,
        cpu_group: dist.ProcessGroup | None = None,
        ignore_index: int = IGNORE_INDEX,
        pad_token_id: int = 0,
        allow_duplicates: bool = False,
        ring_size: int = 1,
        ring_layout: Layout = "contiguous",
        rules: RulesSource = PLAIN_RULES,
    ) -> None:
        # DataLoader's constructor is not called: this loader has no dataset and no workers besides
        # the wrapped loader's.
        layout = BatchLayout(
            sp_world_size,
            sequence_length,
            pad_multiple,
            dict(batch_schema or {}),
            ignore_index,
            pad_token_id,
            ring_size,
            ring_layout,
        )
        if not same_batch and any(map(callable, layout.batch_schema.values())):
            raise ConfigError(
                "batch_schema has a function, which shards for the local rank only, but with "
                "same_batch=False each rank shards for all. Use same_batch=True, or 'shard', "
                "'replicate' or a dim's number."
            )
        group = _checked_group(cpu_group or sp_group, sp_rank, sp_world_size)
        if on_uneven not in _POLICIES or (on_uneven == "pad" and same_batch):
            raise ConfigError(
                f"on_uneven={on_uneven!r} with same_batch={same_batch} is not possible. Use "
                "'error' or 'drop'; 'pad' "
                "only where each rank brings its own batch (same_batch=False)."
            )
        self.dl = dl
        self.sp_rank, self.sp_group, self.sp_world_size = sp_rank, sp_group, sp_world_size
        self.device = None if device is None else torch.device(device)
        self.same_batch, self.on_uneven = same_batch, on_uneven
        self.on_micro_step: Callable[[bool], None] | None = None
        self._refiller = Refiller(
            layout, sp_rank, group, same_batch, on_uneven, allow_duplicates, rules
        )
        self._offset = 0
        self._epoch = int(getattr(dl, "iteration", 0))
        self._epoch_was_set = False
        self._start: Position | None = None
        self._run: EpochRun | None = None
        self._next_run: EpochRun | None = None
        self._at_end = False
        self._warm = False

    def __getattr__(self, name: str) -> Any:
        if name == "dl":
            raise AttributeError(name)
        return getattr(self.dl, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The wrapped loader's, so that accelerate rebuilds the right kind of loader when it skips
        batches.
        """
        return type(self.dl)

    @property
    def end_of_dataloader(self) -> bool:
        """True from the very last micro-step of an epoch until the next epoch begins."""
        return self._at_end

    @property
    def collate_fn(self) -> Callable[[Any], Any]:  # type: ignore[override]
        """What makes this rank's batch of samples, so that loaders built from this one's attributes
        shard too.
        """
        if self._steps_per_batch > 1:
            return _refuse_rebuild
        return ShardingCollate(
            self.dl.collate_fn, self._refiller.layout, self.sp_rank, self._refiller.rules
        )

    @property
    def _steps_per_batch(self) -> int:
        return 1 if self.same_batch else self.sp_world_size

    def __len__(self) -> int:
        """Micro-steps of an epoch; TypeError when the wrapped loader has no length."""
        return max(0, len(self.dl) * self._steps_per_batch - self._offset)

    def __iter__(self) -> Any:
        """Starts the epoch again, or where a loaded state says; the wrapped loader's iterator is
        created here.
        """
        return self._steps(self._begin())

    def __next__(self) -> dict[str, Any]:
        """Returns the next micro-step of an epoch that is started when there is none."""
        # The run, not a generator of this class: that would hold the adapter, which would hold it.
        if self._next_run is None:
            self._next_run = self._begin()
        try:
            return self._step(self._next_run)
        except StopIteration:
            self._next_run = None
            raise

    def _begin(self) -> EpochRun:
        self._run = None  # stops the workers of an epoch that was left by a break
        start, self._start = self._start, None
        if start is None:
            start = Position(*divmod(self._offset, self._steps_per_batch), warm=self._warm)
        self._warm = keeps_workers(self.dl)
        self._at_end = False
        # accelerate's loader counts epochs by itself, and a loader built from the same one may have
        # run in between.
        self._epoch = int(getattr(self.dl, "iteration", self._epoch))
        lookahead = not (self.same_batch and hasattr(self.dl, "end_of_dataloader"))
        self._run = EpochRun(self.dl, self._refiller, start, lookahead)
        return self._run

    def _steps(self, run: EpochRun) -> Iterator[dict[str, Any]]:
        try:
            while True:
                try:
                    step = self._step(run)
                except StopIteration:
                    return
                yield step
        finally:
            run.close()

    def _step(self, run: EpochRun) -> dict[str, Any]:
        """Returns the run's next micro-step, on the device; raises StopIteration at its end."""
        try:
            step = next(run)
        except StopIteration:
            if self._run is run and not run.has_failed:
                self._end_epoch()
            raise
        self._at_end = run.is_last
        if self.on_micro_step is not None:
            self.on_micro_step(run.is_last)
        return {key: mark_shard(self._placed(value)) for key, value in step.items()}

    def _end_epoch(self) -> None:
        self._run = None
        self._epoch += 1
        if hasattr(self.dl, "iteration"):
            # Except when it was rebuilt for a resumed epoch, or ended early on this rank.
            self.dl.iteration = self._epoch

    def _placed(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if self.device is not None and value.device != self.device:
            return value.to(self.device, non_blocking=value.is_pinned()).contiguous()
        is_view = value.untyped_storage().nbytes() > value.numel() * value.element_size()
        if is_view:
            # It would keep the full sequence alive as long as the shard.
            return value.clone(memory_format=torch.contiguous_format)
        return value.contiguous()

    def set_epoch(self, epoch: int) -> None:
        """Tells samplers and dataset the next epoch's number; another one than a loaded state's
        drops that state.
        """
        if epoch != self._epoch:
            self._start = None
        self._epoch, self._epoch_was_set = epoch, True
        batch_sampler = getattr(self.dl, "batch_sampler", None)
        inner = getattr(batch_sampler, "batch_sampler", None)
        targets = (
            self.dl,
            getattr(self.dl, "sampler", None),
            batch_sampler,
            inner,
            getattr(batch_sampler, "sampler", None),
            getattr(inner, "sampler", None),
            getattr(self.dl, "dataset", None),
        )
        told: set[int] = set()
        for target in targets:
            if callable(getattr(target, "set_epoch", None)) and id(target) not in told:
                told.add(id(target))
                target.set_epoch(epoch)  # type: ignore[union-attr]

    def state_dict(self) -> dict[str, Any]:
        """Returns the position as JSON-able dict, exact to the micro-step; changes nothing."""
        return self._state(self._position()).to_dict()

    def _position(self) -> Position:
        if self._run is not None:
            return self._run.position()
        if self._start is not None:
            return self._start
        batches, micro_step = divmod(self._offset, self._steps_per_batch)
        return Position(batches, micro_step, capture(self.dl), warm=self._warm)

    def _state(self, position: Position) -> LoaderState:
        dataset = getattr(self.dl, "dataset", None)
        return LoaderState(
            epoch=self._epoch,
            set_epoch=self._epoch_was_set,
            batches=position.batches,
            micro_step=position.micro_step,
            sp_size=self.sp_world_size,
            same_batch=self.same_batch,
            on_uneven=self.on_uneven,
            dataset=type(dataset).__name__,
            length=_length(dataset),
            random=position.random,
            inner=position.inner,
            warm=position.warm,
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iteration begin where the state was taken.

        Args:
            state: from `state_dict` of an adapter over the same dataset, with as many ranks.

        Raises:
            CheckpointError: the state is damaged or of another job.
        """
        loaded = LoaderState.from_dict(state)
        loaded.check_fits(self._state(Position()))
        if loaded.random is not None:
            check_states(self.dl, loaded.random)
        self._run = self._next_run = None
        self._at_end = False
        if loaded.set_epoch or hasattr(self.dl, "iteration"):
            self.set_epoch(loaded.epoch)
        self._epoch, self._epoch_was_set = loaded.epoch, loaded.set_epoch
        self._start = Position(
            loaded.batches, loaded.micro_step, loaded.random, loaded.inner, loaded.warm
        )

    def skip_first_batches(self, num_batches: int) -> UlyssesSPDataLoaderAdapter:
        """Returns an adapter over the same loader whose every epoch lacks its first micro-steps."""
        layout, refiller = self._refiller.layout, self._refiller
        skipped = UlyssesSPDataLoaderAdapter(
            self.dl,
            self.sp_rank,
            self.sp_group,
            self.sp_world_size,
            self.device,
            same_batch=self.same_batch,
            on_uneven=self.on_uneven,
            batch_schema=layout.batch_schema,
            sequence_length=layout.sequence_length,
            pad_multiple=layout.pad_multiple,
            cpu_group=refiller.group,
            ignore_index=layout.ignore_index,
            pad_token_id=layout.pad_token_id,
            allow_duplicates=refiller.allow_duplicates,
            ring_size=layout.ring_size,
            ring_layout=layout.ring_layout,
            rules=refiller.rules,
        )
        skipped._offset = self._offset + num_batches
        skipped._epoch, skipped._epoch_was_set = self._epoch, self._epoch_was_set
        skipped.on_micro_step = self.on_micro_step
        return skipped


def skip_first_batches(dataloader: Any, num_batches: int = 0) -> Any:
    """Returns a loader without the first micro-steps: accelerate's function, for adapters of either
    mode too.
    """
    if type(dataloader) is UlyssesSPDataLoaderAdapter:
        return dataloader.skip_first_batches(num_batches)
    from accelerate import skip_first_batches as skip

    return skip(dataloader, num_batches)


def _checked_group(
    group: dist.ProcessGroup | None, rank: int, size: int
) -> dist.ProcessGroup | None:
    """Returns the group to agree on; None for one rank alone."""
    if not 0 <= rank < size:
        raise ConfigError(
            f"sp_rank={rank} is not one of sp_world_size={size} ranks. Use 0 to {size - 1}."
        )
    if size == 1:
        return None
    if group is None:
        raise ConfigError(
            f"sp_world_size={size} needs the process group of these ranks, but sp_group is None."
        )
    if dist.get_world_size(group) != size or dist.get_rank(group) != rank:
        raise ConfigError(
            f"sp_rank={rank} and sp_world_size={size} don't fit the group, where this "
            "process is rank "
            f"{dist.get_rank(group)} of {dist.get_world_size(group)}. Take both from the group."
        )
    return group


def _refuse_rebuild(_samples: Any) -> Any:
    raise BatchError(
        "this loader was rebuilt from a UlyssesSPDataLoaderAdapter that exchanges batches between "
        "ranks "
        "(same_batch=False), which a collate function can't do. Use adapter.skip_first_batches(n) "
        "or "
        "ulysses_accel.dataloader.skip_first_batches(adapter, n)."
    )


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None
