"""XTuner's data functions: the sampler that draws the same samples on all ranks of a sequence,
padding, and splitting.

Both generations of `pad_for_sequence_parallel` and `split_for_sequence_parallel`: the document's,
which takes a batch's tensors together, and the later one, which takes one tensor. An integer as the
second argument selects the later one. Shapes: B = rows, S = tokens of the full sequence, P = ranks
that share it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Sized
from typing import overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.data import Sampler

from ulysses_accel.compat.xtuner.groups import (
    get_data_parallel_rank,
    get_data_parallel_world_size,
    get_sequence_parallel_world_size,
    sequence_group,
)
from ulysses_accel.distributed.consensus import gather_ints
from ulysses_accel.errors import BatchError, ConfigError
from ulysses_accel.sequence.labels import IGNORE_INDEX
from ulysses_accel.sequence.sharding import mark_shard, next_multiple, pad_sequence_dim, shard

Number = int | float | bool
Four = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
Three = tuple[Tensor, Tensor | None, Tensor | None]


class SequenceParallelSampler(Sampler[int]):
    """Draws the same samples on all ranks that share a sequence, and different ones for different
    sequences.

    Args:
        dataset: of known length.
        shuffle: whether each epoch is shuffled differently.
        seed: of that order; rank 0's draw when None, so that all ranks must then create the
            sampler.
        round_up: whether the first samples are drawn again so that all ranks have the same number;
            otherwise some have one less.

    Raises:
        BatchError: the dataset is empty.
    """

    def __init__(
        self, dataset: Sized, shuffle: bool = True, seed: int | None = None, round_up: bool = True
    ) -> None:
        if not len(dataset):
            raise BatchError(
                "the dataset is empty, so there is nothing to sample. Use one with samples."
            )
        self.dataset, self.shuffle, self.round_up = dataset, shuffle, round_up
        self.rank, self.world_size = get_data_parallel_rank(), get_data_parallel_world_size()
        self.seed = _shared_seed() if seed is None else seed
        self.epoch = 0
        number = len(dataset)
        self.num_samples = math.ceil((number if round_up else number - self.rank) / self.world_size)
        self.total_size = self.num_samples * self.world_size if round_up else number

    def __iter__(self) -> Iterator[int]:
        number = len(self.dataset)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            indices = torch.randperm(number, generator=generator).tolist()
        else:
            indices = list(range(number))
        indices = (indices * math.ceil(self.total_size / number))[: self.total_size]
        return iter(indices[self.rank : self.total_size : self.world_size])

    def __len__(self) -> int:
        return self.num_samples

    def set_epoch(self, epoch: int) -> None:
        """Chooses the next epoch's order.

        Args:
            epoch: its number.
        """
        self.epoch = epoch


def _shared_seed() -> int:
    """Returns rank 0's draw."""
    seed = int(torch.randint(2**31, ()))
    return gather_ints([seed], dist.group.WORLD if dist.is_initialized() else None)[0][0]


@overload
def pad_for_sequence_parallel(
    tokens: Tensor,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    tokens_pad_index: Number = 0,
    labels_pad_index: Number = IGNORE_INDEX,
    position_ids_pad_index: Number = 0,
    attention_mask_pad_index: Number = 0,
) -> Four:
    """Pads a batch; see below."""


@overload
def pad_for_sequence_parallel(tokens: Tensor, labels: Number, position_ids: int = -1, /) -> Tensor:
    """Pads one tensor; see below."""


@overload
def pad_for_sequence_parallel(tokens: Tensor, *, padding_value: Number, dim: int = -1) -> Tensor:
    """Pads one tensor; see below."""


@overload
def pad_for_sequence_parallel(tokens: Tensor, labels: Number, /, *, dim: int) -> Tensor:
    """Pads one tensor; see below."""


@overload
def pad_for_sequence_parallel(*, tensor: Tensor, padding_value: Number, dim: int = -1) -> Tensor:
    """Pads one tensor; see below."""


def pad_for_sequence_parallel(
    tokens: Tensor | None = None,
    labels: Tensor | Number | None = None,
    position_ids: Tensor | int | None = None,
    attention_mask: Tensor | None = None,
    tokens_pad_index: Number = 0,
    labels_pad_index: Number = IGNORE_INDEX,
    position_ids_pad_index: Number = 0,
    attention_mask_pad_index: Number = 0,
    *,
    tensor: Tensor | None = None,
    padding_value: Number | None = None,
    dim: int | None = None,
) -> Tensor | Four:
    """Pads sequences at the end until the ranks that share them divide their length.

    The later form is `pad_for_sequence_parallel(tensor, padding_value, dim=-1)`.

    Args:
        tokens: `[B, S]`; in the later form any tensor, also by the name `tensor`.
        labels: `[B, S]`; in the later form the number to pad with, also by the name
            `padding_value`.
        position_ids: `[B, S]`; in the later form the dim, also by the name `dim`.
        attention_mask: `[B, S]`.
        tokens_pad_index: pads `tokens`.
        labels_pad_index: pads `labels`.
        position_ids_pad_index: pads `position_ids`.
        attention_mask_pad_index: pads `attention_mask`.
        tensor: see `tokens`.
        padding_value: see `labels`.
        dim: see `position_ids`.

    Returns:
        The four tensors, `[B, S']` or None; in the later form the one tensor.

    Raises:
        ConfigError: the two forms are mixed.
    """
    tensor_to_pad = tensor if tensor is not None else tokens
    number = labels if isinstance(labels, int | float) else padding_value
    if tensor_to_pad is None or (tensor is not None and tokens is not None):
        raise ConfigError(
            "pad_for_sequence_parallel pads one tensor or one batch. Pass tokens, or tensor."
        )
    if number is not None:
        padded_dim = position_ids if position_ids is not None else -1
        if dim is not None:
            padded_dim = dim
        _refuse_both_forms(
            "pad", labels=labels, position_ids=position_ids, attention_mask=attention_mask
        )
        assert isinstance(padded_dim, int)
        return _padded(tensor_to_pad, number, padded_dim)
    if (
        tensor is not None
        or dim is not None
        or isinstance(labels, int | float)
        or isinstance(position_ids, int)
    ):
        raise ConfigError(
            "pad_for_sequence_parallel of one tensor needs the number to pad with. Pass "
            "padding_value."
        )
    return (
        _padded(tensor_to_pad, tokens_pad_index, 1),
        None if labels is None else _padded(labels, labels_pad_index, 1),
        None if position_ids is None else _padded(position_ids, position_ids_pad_index, -1),
        None if attention_mask is None else _padded(attention_mask, attention_mask_pad_index, 1),
    )


def _refuse_both_forms(name: str, **others: object) -> None:
    tensors = [key for key, value in others.items() if isinstance(value, Tensor)]
    if tensors:
        raise ConfigError(
            f"{name}_for_sequence_parallel got {', '.join(tensors)} together with the arguments "
            "for one tensor. Call it once for each tensor, or with the batch's tensors alone."
        )


def _padded(tensor: Tensor, value: Number, dim: int) -> Tensor:
    length = next_multiple(tensor.shape[dim], get_sequence_parallel_world_size())
    return pad_sequence_dim(tensor, length, value, dim)


def pad_cumulative_len_for_sequence_parallel(
    cumulative_len: Sequence[Tensor],
) -> tuple[list[Tensor], Tensor | None]:
    """Returns a row's cumulative document lengths with the padding as one more document, and a mask
    without it.

    Args:
        cumulative_len: of one row, `[n + 1]`, from 0 to its tokens S; not changed.

    Returns:
        The same in a new list, up to the padded length S'; `[1, S']` of bool, False for padding, or
        None without any.

    Raises:
        BatchError: there is not exactly one row.
    """
    if len(cumulative_len) != 1:
        raise BatchError(
            f"cumulative_len is of {len(cumulative_len)} rows. Pack the documents into one row."
        )
    bounds = cumulative_len[0]
    length = int(bounds[-1])
    padded = next_multiple(length, get_sequence_parallel_world_size())
    if padded == length:
        return [bounds], None
    mask = (torch.arange(padded, device=bounds.device) < length).unsqueeze(0)
    return [torch.cat([bounds, bounds.new_tensor([padded])])], mask


@overload
def split_for_sequence_parallel(
    tokens: Tensor, labels: Tensor | None = None, position_ids: Tensor | None = None
) -> Three:
    """Splits a batch; see below."""


@overload
def split_for_sequence_parallel(
    tokens: Tensor, labels: int, position_ids: ProcessGroup | None = None, /
) -> Tensor:
    """Splits one tensor; see below."""


@overload
def split_for_sequence_parallel(
    tokens: Tensor, labels: int, /, *, sp_group: ProcessGroup | None
) -> Tensor:
    """Splits one tensor; see below."""


@overload
def split_for_sequence_parallel(
    tokens: Tensor, *, dim: int, sp_group: ProcessGroup | None = None
) -> Tensor:
    """Splits one tensor; see below."""


@overload
def split_for_sequence_parallel(
    *, input: Tensor, dim: int, sp_group: ProcessGroup | None = None
) -> Tensor:
    """Splits one tensor; see below."""


def split_for_sequence_parallel(
    tokens: Tensor | None = None,
    labels: Tensor | int | None = None,
    position_ids: Tensor | ProcessGroup | None = None,
    *,
    input: Tensor | None = None,
    dim: int | None = None,
    sp_group: ProcessGroup | None = None,
) -> Tensor | Three:
    """Returns this rank's shard of sequences whose length the ranks divide; masks are not split.

    The later form is `split_for_sequence_parallel(input, dim, sp_group)`. Labels are split
    unshifted: a dispatched model takes the label of a shard's last token from the next shard.

    Args:
        tokens: `[B, S]`; in the later form any tensor, also by the name `input`.
        labels: `[B, S]`, not shifted; in the later form the dim to split, also by the name `dim`.
        position_ids: `[B, S]`; in the later form the ranks, also by the name `sp_group`.
        input: see `tokens`.
        dim: see `labels`.
        sp_group: see `position_ids`; the sequence group when None.

    Returns:
        The three tensors, `[B, S / P]` or None; in the later form the one tensor.

    Raises:
        ConfigError: the two forms are mixed.
        ShapeError: the ranks do not divide the sequence.
    """
    tensor_to_split = input if input is not None else tokens
    if tensor_to_split is None or (input is not None and tokens is not None):
        raise ConfigError(
            "split_for_sequence_parallel splits one tensor or one batch. Pass tokens, or input."
        )
    split_dim = labels if isinstance(labels, int) else dim
    group = position_ids if isinstance(position_ids, ProcessGroup) else sp_group
    if split_dim is not None:
        _refuse_both_forms("split", labels=labels, position_ids=position_ids)
        return _shard_of(tensor_to_split, split_dim, group)
    if input is not None or isinstance(position_ids, ProcessGroup) or isinstance(labels, int):
        raise ConfigError(
            "split_for_sequence_parallel of one tensor needs the dim to split. Pass dim."
        )
    return (
        _shard_of(tensor_to_split, 1, group),
        None if labels is None else _shard_of(labels, 1, group),
        None if position_ids is None else _shard_of(position_ids, -1, group),
    )


def _shard_of(tensor: Tensor, dim: int, sp_group: ProcessGroup | None) -> Tensor:
    group = sequence_group(sp_group)
    if group is None:
        return tensor
    part: Tensor = mark_shard(shard(tensor, group.size(), group.rank(), dim).contiguous())
    return part
