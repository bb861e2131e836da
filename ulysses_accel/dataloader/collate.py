"""A batch from a collate function, made complete for sequence parallel training and cut into shards.

Pure functions on a dict of tensors; no other rank is involved. The whole batch is padded, described and label-shifted
first and cut afterwards, so that every shard follows from the whole sequence.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ulysses_accel.dataloader.documents import CUMULATIVE_KEYS, find_rows, restarting_positions
from ulysses_accel.errors import BatchError, ConfigError
from ulysses_accel.sequence import (
    DESCRIPTION_KEY,
    IGNORE_INDEX,
    SequenceDescription,
    next_multiple,
    pad_position_ids,
    pad_sequence_dim,
    shard,
    shift_labels,
)
from ulysses_accel.sequence_layout import Layout, multiple_of, ring_order

# The ecosystem's known keys whose second dim is the sequence, and what their padding is.
_SEQUENCE_PADS: dict[str, float] = {
    "inputs_embeds": 0,
    "attention_mask": 0,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
    "special_tokens_mask": 1,
    "assistant_masks": 0,
    "completion_mask": 0,
    "loss_mask": 0,
    "loss_weights": 0,
    "seq_idx": -1,
}
# Known keys that belong to the whole sample, whatever their sizes.
_REPLICATED_KEYS = frozenset(
    {
        "pixel_values",
        "pixel_values_videos",
        "pixel_attention_mask",
        "image_grid_thw",
        "video_grid_thw",
        "image_sizes",
        "second_per_grid_ts",
        "input_features",
        "feature_attention_mask",
        "num_items_in_batch",
    }
)


@dataclass(frozen=True)
class BatchLayout:
    """How batches are padded and cut.

    Args:
        num_shards: ranks P that share a sequence.
        sequence_length: the fixed length that every batch is padded to; None lets it vary.
        pad_multiple: a further number that the padded length must be a multiple of.
        key_rules: for keys of your own, "shard" (second dim), "replicate", or the number of the dim to shard.
        ignore_index: the label that doesn't count.
        pad_token_id: pads `input_ids`.
        ring_size: how many of the P ranks' places form a ring; the rest are Ulysses ranks within.
        ring_layout: how the tokens are dealt over the ring.

    Raises:
        ConfigError: a value is not legal.
    """

    num_shards: int
    sequence_length: int | None = None
    pad_multiple: int | None = None
    key_rules: Mapping[str, str | int] = field(default_factory=dict)
    ignore_index: int = IGNORE_INDEX
    pad_token_id: int = 0
    ring_size: int = 1
    ring_layout: Layout = "contiguous"

    def __post_init__(self) -> None:
        if self.num_shards < 1:
            raise ConfigError(f"sp_world_size={self.num_shards} is not a number of ranks. Use 1 or more.")
        if self.pad_multiple is not None and self.pad_multiple < 1:
            raise ConfigError(f"pad_multiple={self.pad_multiple} is not a number of tokens. Use 1 or more, or None.")
        fixed = self.sequence_length
        if fixed is not None and (fixed < 1 or fixed % self.multiple):
            raise ConfigError(
                f"sequence_length={fixed} is not a multiple of {self.multiple} (sp_world_size={self.num_shards}, "
                f"pad_multiple={self.pad_multiple}). Use {next_multiple(max(fixed, 1), self.multiple)}."
            )
        for key, rule in self.key_rules.items():
            if rule not in ("shard", "replicate") and (not isinstance(rule, int) or isinstance(rule, bool)):
                raise ConfigError(
                    f"key_rules[{key!r}]={rule!r} is no rule. Use 'shard', 'replicate' or a dim's number."
                )

    @property
    def multiple(self) -> int:
        """What the padded length is a multiple of."""
        dealt = multiple_of(self.ring_size, self.ring_layout, self.num_shards // self.ring_size)
        return math.lcm(dealt, self.pad_multiple or 1)

    def padded_length(self, length: int) -> int:
        """Returns the tokens of a batch of `length` after padding.

        Raises:
            BatchError: the batch is longer than the fixed length.
        """
        if self.sequence_length is None:
            return next_multiple(length, self.multiple)
        if length > self.sequence_length:
            raise BatchError(
                f"the batch has {length} tokens in a row, but sequence_length={self.sequence_length} is fixed. "
                "Truncate in the collate function, raise sequence_length, or let it vary (None)."
            )
        return self.sequence_length


@dataclass(frozen=True)
class WholeBatch:
    """A complete batch before it is cut.

    Args:
        tensors: padded, whole, in the order of the shards.
        dims: for each tensor its sequence dim, None when every rank gets all of it.
        extras: everything that is no tensor.
        description: of the whole sequence.
    """

    tensors: dict[str, Tensor]
    dims: dict[str, int | None]
    extras: dict[str, Any]
    description: SequenceDescription

    def shard(self, rank: int) -> dict[str, Tensor]:
        """Returns one rank's part of every tensor, as views."""
        parts = self.description.num_shards
        return {
            name: tensor if (dim := self.dims[name]) is None else shard(tensor, parts, rank, dim)
            for name, tensor in self.tensors.items()
        }

    def local_batch(self, rank: int) -> dict[str, Any]:
        """Returns what one rank's model gets: its shards, the non-tensors, and the description."""
        return {**self.shard(rank), **self.extras, DESCRIPTION_KEY: self.description}

    def checksum(self) -> int:
        """Returns crc32 of the tokens and all integer sequence tensors, which tells whether two ranks drew the same."""
        value = 0
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            exact = not tensor.is_floating_point() and not tensor.is_complex()
            if self.dims[name] is not None and (exact or (name == "inputs_embeds" and "input_ids" not in self.tensors)):
                value = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data, value)
        return value


@dataclass(frozen=True)
class ShardingCollate:
    """A collate function that returns one rank's part of the batch, for loaders that others build from ours.

    Args:
        collate_fn: the wrapped loader's own.
        layout: how batches are padded and cut.
        rank: of this process in its sequence group.
    """

    collate_fn: Callable[[Any], Any]
    layout: BatchLayout
    rank: int

    def __call__(self, samples: Any) -> dict[str, Any]:
        """Returns the local batch of the samples."""
        batch = complete(self.collate_fn(samples), self.layout).local_batch(self.rank)
        return {key: value.clone() if isinstance(value, Tensor) else value for key, value in batch.items()}


def complete(batch: Any, layout: BatchLayout) -> WholeBatch:
    """Returns the batch with positions, shifted labels, padding and its description.

    Args:
        batch: a mapping with `input_ids` `[B, S]` or `inputs_embeds` `[B, S, D]`; the mapping itself is not changed.
        layout: how batches are padded and cut.

    Raises:
        BatchError: the batch can't be sharded; the message says why and what to change.
    """
    tensors, extras = _split(batch)
    batch_size, length = _size(tensors)
    padded = layout.padded_length(length)
    rows, marked = find_rows({**extras, **tensors}, batch_size, length)
    for key in CUMULATIVE_KEYS:
        tensors.pop(key, None)
        extras.pop(key, None)
    reference = tensors["input_ids"] if "input_ids" in tensors else tensors["inputs_embeds"]
    counted_positions = "position_ids" not in tensors
    tensors["position_ids"] = _positions(tensors.get("position_ids"), rows, marked, length, reference.device)
    _inject_shift_labels(tensors, rows, (batch_size, length), layout)
    dims = {name: sequence_dim(name, tensor, batch_size, length, layout) for name, tensor in tensors.items()}
    whole = {name: _pad(name, tensor, dims[name], padded, layout) for name, tensor in tensors.items()}
    order = ring_order(padded, layout.ring_size, layout.ring_layout)
    if order is not None:
        whole = {
            name: tensor if (dim := dims[name]) is None else tensor.index_select(dim, order.to(tensor.device))
            for name, tensor in whole.items()
        }
    description = SequenceDescription(
        padded, layout.num_shards, rows, layout.ring_size, layout.ring_layout, counted_positions
    )
    return WholeBatch(whole, dims, extras, description)


def _split(batch: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not isinstance(batch, Mapping):
        raise BatchError(
            f"the batch is a {type(batch).__name__}, but a dict with 'input_ids' is needed. "
            "Return a dict from the collate function."
        )
    if not all(isinstance(key, str) for key in batch):
        raise BatchError(
            f"the batch's keys {list(batch)} are not all strings. Name every entry in the collate function."
        )
    if DESCRIPTION_KEY in batch:
        raise BatchError(
            f"the batch has a '{DESCRIPTION_KEY}' already: it is one rank's shard, not a whole batch. "
            "Wrap each data loader once only."
        )
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    return tensors, {key: value for key, value in batch.items() if key not in tensors}


def _size(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    found = {name: tensors[name] for name in ("input_ids", "inputs_embeds") if name in tensors}
    if not found:
        raise BatchError(
            f"the batch has neither 'input_ids' nor 'inputs_embeds' (its tensors: {sorted(tensors)}). "
            "Return one of them from the collate function."
        )
    for name, tensor in found.items():
        if tensor.ndim != (2 if name == "input_ids" else 3):
            wanted = "[batch, sequence]" if name == "input_ids" else "[batch, sequence, features]"
            raise BatchError(
                f"'{name}' has shape {list(tensor.shape)}, {wanted} is needed. Check the collate function."
            )
    sizes = {tuple(tensor.shape[:2]) for tensor in found.values()}
    if len(sizes) > 1:
        raise BatchError(f"input_ids and inputs_embeds differ in batch or sequence: {sorted(sizes)}. Give one of them.")
    batch_size, length = sizes.pop()
    if not batch_size or not length:
        raise BatchError(
            f"the batch is empty: {batch_size} rows of {length} tokens. "
            "Filter empty samples from the dataset, or use drop_last=True."
        )
    return batch_size, length


def _positions(given: Tensor | None, rows: Any, marked: bool, length: int, device: torch.device) -> Tensor:
    if given is None:
        whole = tuple(((0, length),) for _ in rows)
        return restarting_positions(rows if marked else whole, length, device)
    if not given.dtype.is_signed or given.is_floating_point() or given.is_complex():
        raise BatchError(f"'position_ids' is {given.dtype}, but positions are counted. Use torch.int64.")
    planes = given.shape[:-2]
    if (
        given.ndim < 1
        or given.ndim > 3
        or given.shape[-1] != length
        or given.shape[-2:-1] not in ((), (1,), (len(rows),))
    ):
        raise BatchError(
            f"'position_ids' has shape {list(given.shape)}, but the batch's sequence is [{len(rows)}, {length}]. "
            "Give [batch, sequence] or, for several position planes, [planes, batch, sequence]; or leave them out."
        )
    return given.expand(*planes, len(rows), length)


def _inject_shift_labels(tensors: dict[str, Tensor], rows: Any, shape: tuple[int, int], layout: BatchLayout) -> None:
    labels = tensors.get("labels")
    if labels is None or layout.key_rules.get("labels") == "replicate":
        return
    if tuple(labels.shape) != shape:
        raise BatchError(
            f"'labels' has shape {list(labels.shape)}, but shifting them needs one for each of {list(shape)} tokens. "
            "Labels of a whole sample can be kept with key_rules={'labels': 'replicate'}."
        )
    if not labels.dtype.is_signed:
        raise BatchError(
            f"'labels' is {labels.dtype}, which can't hold the ignored label {layout.ignore_index}. Use torch.int64."
        )
    del tensors["labels"]
    if "shift_labels" not in tensors:
        tensors["shift_labels"] = shift_labels(labels, rows, layout.ignore_index)


def sequence_dim(name: str, tensor: Tensor, batch_size: int, length: int, layout: BatchLayout) -> int | None:
    """Returns the dim of a tensor that is the sequence, None when every rank gets the whole tensor.

    Args:
        name: the batch's key.
        tensor: before padding.
        batch_size: rows B of the batch.
        length: tokens S of the batch.
        layout: may have a rule for the key.

    Raises:
        BatchError: the tensor's shape contradicts the rule, or there is none and the shape doesn't tell.
    """
    rule = layout.key_rules.get(name)
    if rule == "replicate" or (rule is None and name in _REPLICATED_KEYS):
        return None
    if rule is not None:
        dim = 1 if rule == "shard" else int(rule)
        source = f"key_rules[{name!r}]={rule!r}"
    elif name == "position_ids":
        dim, source = -1, "position_ids has the sequence last"
    elif name in _SEQUENCE_PADS or name in ("input_ids", "shift_labels"):
        dim, source = 1, "a key known to be [batch, sequence, ...]"
    else:
        return _guess(name, tensor, batch_size, length)
    if not -tensor.ndim <= dim < tensor.ndim or tensor.shape[dim] != length:
        raise BatchError(
            f"'{name}' has shape {list(tensor.shape)}, where dim {dim} should be the {length} tokens of the sequence "
            f"({source}). Correct the shape, or set key_rules={{{name!r}: 'replicate'}} or the right dim's number."
        )
    return dim % tensor.ndim


def _guess(name: str, tensor: Tensor, batch_size: int, length: int) -> int | None:
    shape = tuple(tensor.shape)
    if tensor.ndim == 0 or shape == (batch_size,):
        return None
    inner = shape[1:] if shape[0] == batch_size else shape
    if length not in inner:
        return None
    if shape[0] == batch_size and tensor.ndim > 1 and shape[1] == length and inner.count(length) == 1:
        return 1
    raise BatchError(
        f"'{name}' of shape {list(shape)} may or may not follow the {length} tokens of the sequence. Say which: "
        f"key_rules={{{name!r}: 'shard'}} for the second dim, 'replicate' for none, or the dim's number."
    )


def _pad(name: str, tensor: Tensor, dim: int | None, length: int, layout: BatchLayout) -> Tensor:
    if dim is None:
        return tensor
    if name == "position_ids":
        return pad_position_ids(tensor, length)
    if name == "input_ids":
        return pad_sequence_dim(tensor, length, layout.pad_token_id, dim)
    if name == "shift_labels":
        return pad_sequence_dim(tensor, length, layout.ignore_index, dim)
    return pad_sequence_dim(tensor, length, _SEQUENCE_PADS.get(name, 0), dim)
