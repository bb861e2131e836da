"""Prepares data loaders: sharded over data parallel ranks by accelerate, then over the sequence by
the adapter.

All ranks of a sequence group draw the same batch, so nothing but one agreement is exchanged, and
`len` is true.
"""

from __future__ import annotations

import json
import weakref
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader as accelerate_loader
from accelerate.state import PartialState
from accelerate.utils.dataclasses import RNGType
from torch.utils.data import RandomSampler

from ulysses_accel import _private_api
from ulysses_accel.config.parallelism import ParallelismConfig
from ulysses_accel.dataloader import UlyssesSPDataLoaderAdapter
from ulysses_accel.distributed.mesh import SequenceGroups
from ulysses_accel.errors import CheckpointError
from ulysses_accel.installation import Removable
from ulysses_accel.sequence.batch_rules import PLAIN_RULES, RulesSource


def prepare_loader(
    accelerator: Any,
    data_loader: Any,
    config: ParallelismConfig,
    groups: SequenceGroups,
    device_placement: bool | None = None,
    rules: RulesSource = PLAIN_RULES,
) -> UlyssesSPDataLoaderAdapter:
    """Returns the loader that yields this rank's shards; one that was prepared before is returned
    as it is.

    Args:
        accelerator: the attached accelerator, in whose list the loader is kept.
        data_loader: a torch DataLoader over a map or iterable dataset.
        config: fixed sequence length, if any, and the ring's layout.
        groups: this rank's place in the mesh.
        device_placement: whether batches go to the accelerator's device; None takes its setting.
        rules: what the prepared models require of a batch, or what tells it once they are prepared.
    """
    if _private_api.is_prepared(data_loader):
        if not any(known is data_loader for known in _private_api.prepared_loaders(accelerator)):
            _private_api.prepared_loaders(accelerator).append(data_loader)
        return data_loader  # type: ignore[no-any-return]
    placed = accelerator.device_placement if device_placement is None else device_placement
    handler = config.sp_handler
    adapter = UlyssesSPDataLoaderAdapter(
        data_parallel_loader(accelerator, data_loader, groups),
        groups.rank,
        groups.group,
        groups.size,
        accelerator.device if placed else None,
        same_batch=True,
        batch_schema=config.batch_schema,
        sequence_length=None if handler.sp_seq_length_is_variable else handler.sp_seq_length,
        pad_multiple=config.non_data_parallel_size if config.tp_size > 1 else None,
        cpu_group=groups.cpu_group,
        ring_size=config.cp_size,
        ring_layout=config.cp_handler.layout,
        rules=rules,
    )
    _private_api.prepared_loaders(accelerator).append(adapter)
    return adapter


def data_parallel_loader(
    accelerator: Any, data_loader: Any, groups: SequenceGroups, *, put_on_device: bool = False
) -> Any:
    """Returns accelerate's loader for this rank's data parallel coordinate, with the same order on
    all ranks.

    Args:
        accelerator: the attached accelerator.
        data_loader: a torch DataLoader.
        groups: this rank's place in the mesh.
        put_on_device: whether it moves batches; an adapter around it shards them on the host and
            moves only the shard.
    """
    _share_generator(accelerator, data_loader, groups)
    _seed_workers_alike(data_loader, groups)
    loader = accelerate_loader(
        data_loader,
        accelerator.device,
        num_processes=groups.data_parallel_size,
        process_index=groups.data_parallel_rank,
        split_batches=accelerator.split_batches,
        put_on_device=put_on_device,
        rng_types=list(accelerator.rng_types or []),
        # One rank that reads for all would have to send full batches, as pickles.
        dispatch_batches=False,
        even_batches=accelerator.even_batches,
        use_seedable_sampler=accelerator.use_seedable_sampler,
        data_seed=accelerator.dataloader_config.data_seed,
        non_blocking=accelerator.non_blocking,
        use_stateful_dataloader=accelerator.use_stateful_dataloader,
    )
    sampler = getattr(data_loader, "sampler", None)
    if isinstance(getattr(sampler, "set_epoch", None), _EpochSeed):
        # accelerate 1.15 reads it under this name when it rebuilds a loader to skip batches.
        loader.set_sampler(sampler)
    generator = getattr(sampler, "generator", None)
    if loader.synchronized_generator is None and isinstance(generator, torch.Generator):
        # With one data parallel rank accelerate 1.15 leaves the order to each process.
        loader.synchronized_generator = generator
        loader.rng_types = [RNGType.GENERATOR]
    return loader


def _seed_workers_alike(data_loader: Any, groups: SequenceGroups) -> None:
    """Gives a Trainer's workers one seed for each data parallel rank.

    transformers 5.23 seeds them by rank: they would draw different random numbers for the batches
    that the ranks of a sequence group share.
    """
    function = getattr(data_loader, "worker_init_fn", None)
    if isinstance(function, partial) and "rank" in function.keywords:
        data_loader.worker_init_fn = partial(function, rank=groups.data_parallel_rank)


def _share_generator(accelerator: Any, data_loader: Any, groups: SequenceGroups) -> None:
    """Gives a shuffling sampler without a generator one that starts from rank 0's seed on every
    rank.
    """
    sampler = getattr(data_loader, "sampler", None)
    if getattr(sampler, "generator", ...) is not None:
        return
    assert sampler is not None
    if isinstance(sampler, RandomSampler) and accelerator.use_seedable_sampler:
        # Its order follows from a number. A draw here would change what a collate function draws
        # after it.
        return
    seed = torch.empty((), dtype=torch.int64)
    if isinstance(sampler, RandomSampler):
        seed.random_()
    else:
        data_seed = accelerator.dataloader_config.data_seed
        seed.fill_((torch.initial_seed() if data_seed is None else data_seed) % 2**62)
    seed = seed.to(accelerator.device)
    dist.broadcast(seed, src=0)
    sampler.generator = torch.Generator()
    sampler.generator.manual_seed(int(seed))
    if not isinstance(sampler, RandomSampler) and not hasattr(sampler, "set_epoch"):
        sampler.set_epoch = _EpochSeed(sampler.generator, int(seed))


@dataclass(frozen=True)
class _EpochSeed:
    """Makes a sampler's order follow from the epoch's number, so that a resumed run has the same
    one.

    Args:
        generator: the sampler's.
        seed: of epoch 0.
    """

    generator: torch.Generator
    seed: int

    def __call__(self, epoch: int) -> None:
        """Sets the generator to where the epoch begins."""
        self.generator.manual_seed(self.seed + epoch)


def register_loader_state(accelerator: Any) -> tuple[Removable, Removable]:
    """Makes `save_state` and `load_state` keep each prepared loader's position, as JSON, exact to
    the micro-step.

    Args:
        accelerator: the attached accelerator, after its constructor.

    Returns:
        The handles of the hooks.
    """
    state = _LoaderState(weakref.ref(accelerator))
    return (
        accelerator.register_save_state_pre_hook(state.save),
        accelerator.register_load_state_pre_hook(state.load),
    )


@dataclass(frozen=True)
class _LoaderState:
    """The positions of an accelerator's loaders, beside its other state; all ranks are at the same
    micro-step.

    Args:
        accelerator: which holds the hooks, and so is held weakly.
    """

    accelerator: weakref.ref[Any]

    def _files(self, folder: str) -> list[tuple[Path, UlyssesSPDataLoaderAdapter]]:
        accelerator = self.accelerator()
        assert accelerator is not None, "its own save_state or load_state calls this"
        loaders = [
            loader
            for loader in _private_api.prepared_loaders(accelerator)
            if isinstance(loader, UlyssesSPDataLoaderAdapter)
        ]
        return [
            (Path(folder) / f"sequence_loader_{index}.json", loader)
            for index, loader in enumerate(loaders)
        ]

    def save(self, models: list[Any], weights: list[Any], output_dir: str) -> None:
        """Writes one file for each loader; the main process does."""
        for path, loader in self._files(output_dir):
            state = loader.state_dict()
            if PartialState().is_main_process:
                path.write_text(json.dumps(state))

    def load(self, models: list[Any], input_dir: str) -> None:
        """Reads each loader's file.

        Raises:
            CheckpointError: a file is missing, or is not of this job.
        """
        for path, loader in self._files(input_dir):
            if not path.is_file():
                raise CheckpointError(
                    f"{path.name} is missing in {input_dir}: the checkpoint was saved with fewer "
                    "data loaders than the "
                    f"{len(self._files(input_dir))} prepared now. Prepare the same loaders in the "
                    "same order."
                )
            try:
                state = json.loads(path.read_text())
            except ValueError as error:
                raise CheckpointError(
                    f"{path.name} is not JSON ({error}). The checkpoint is damaged."
                ) from None
            loader.load_state_dict(state)
