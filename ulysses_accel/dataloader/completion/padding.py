"""Padding: which dim of each tensor is the sequence, and what fills it up to the padded length.

The rule in `batch_schema` comes first, then the table of known keys, then the tensor's shape.
"""

from __future__ import annotations

from torch import Tensor

from ulysses_accel.dataloader.batch_layout import BatchLayout
from ulysses_accel.dataloader.completion.draft import SequenceDraft
from ulysses_accel.dataloader.keys import MERGED_KEYS, known_key
from ulysses_accel.errors import BatchError
from ulysses_accel.sequence.batch_rules import BatchRules
from ulysses_accel.sequence.sharding import next_multiple, pad_position_ids, pad_sequence_dim


def pad_tensors(sequence: SequenceDraft, layout: BatchLayout, rules: BatchRules) -> None:
    """Finds the sequence dim of every tensor and pads it.

    Args:
        sequence: its positions and labels are complete.
        layout: the padded length, what pads tokens and labels, and rules for keys of your own.
        rules: whether the model merges images or audio into tokens.

    Raises:
        BatchError: the sequence is longer than the fixed length; or a tensor's shape contradicts
            its rule, or there is none and the shape doesn't tell.
    """
    length = sequence.padded_length = _padded_length(sequence.length, layout)
    merges = rules.merges and any(name in sequence.tensors for name in MERGED_KEYS)
    for name, tensor in sequence.tensors.items():
        if name not in sequence.dims:
            sequence.dims[name] = _sequence_dim(name, tensor, sequence, layout)
        dim = sequence.dims[name]
        if dim is not None and name == sequence.positions_key:
            sequence.tensors[name] = _padded_positions(tensor, length, sequence)
        elif dim is not None:
            sequence.tensors[name] = pad_sequence_dim(
                tensor, length, padding_value(name, layout), dim
            )
        key = known_key(name)
        if merges and key is not None and key.replicated_with_merged:
            # Positions that the batch lacked are sharded all the same: they are for decoders whose
            # model counts none.
            is_placed = name == sequence.positions_key and sequence.positions_placed
            sequence.dims[name] = dim if is_placed else None


def _padded_length(length: int, layout: BatchLayout) -> int:
    """Returns the tokens of a sequence of `length` after padding."""
    if layout.sequence_length is None:
        return next_multiple(length, layout.multiple)
    if length > layout.sequence_length:
        raise BatchError(
            f"the batch has {length} tokens in a row, but "
            f"sequence_length={layout.sequence_length} is fixed. Truncate in the collate function, "
            "raise sequence_length, or let it vary (None)."
        )
    return layout.sequence_length


def _padded_positions(positions: Tensor, length: int, sequence: SequenceDraft) -> Tensor:
    """Returns positions `[..., length]`; padding never leaves the range that the batch has."""
    if sequence.padding_position is not None:
        return pad_sequence_dim(positions, length, sequence.padding_position, dim=-1)
    return pad_position_ids(positions, length).clamp(max=sequence.longest_position)


def padding_value(name: str, layout: BatchLayout) -> float:
    """Returns what pads the sequence dim of a key's tensor, other than positions.

    Args:
        name: the batch's key.
        layout: the token and the label that stand for padding.
    """
    key = known_key(name)
    pad = 0 if key is None else key.pad
    if pad == "token":
        return layout.pad_token_id
    if pad == "label":
        return layout.ignore_index
    return pad


def _sequence_dim(
    name: str, tensor: Tensor, sequence: SequenceDraft, layout: BatchLayout
) -> int | None:
    """Returns the dim of a tensor that is the sequence, None when every rank gets all of it."""
    length = sequence.length
    rule, key = layout.batch_schema.get(name), known_key(name)
    if rule is not None:
        if rule == "replicate" or callable(rule):
            return None
        dim, source = 1 if rule == "shard" else int(rule), f"batch_schema[{name!r}]={rule!r}"
    elif key is None:
        return _dim_by_shape(name, tensor, sequence.batch_size, length)
    elif key.dim is None or (key.or_sample and tuple(tensor.shape) == (sequence.batch_size,)):
        return None
    else:
        dim, source = key.dim, "a key known to be [batch, sequence, ...]"
        if dim == -1:
            source = f"{name} has the sequence last"
    if not -tensor.ndim <= dim < tensor.ndim or tensor.shape[dim] != length:
        raise BatchError(
            f"'{name}' has shape {list(tensor.shape)}, where dim {dim} should be the {length} "
            f"tokens of the sequence ({source}). Correct the shape, or set "
            f"batch_schema={{{name!r}: 'replicate'}} or the right dim's number."
        )
    return dim % tensor.ndim


def _dim_by_shape(name: str, tensor: Tensor, batch_size: int, length: int) -> int | None:
    """Returns the sequence dim of a tensor whose key is not known, where its shape leaves no
    doubt.
    """
    shape = tuple(tensor.shape)
    if tensor.ndim == 0 or shape == (batch_size,):
        return None
    has_rows = shape[0] == batch_size
    inner = shape[1:] if has_rows else shape
    if length not in inner:
        return None
    if has_rows and inner[0] == length and inner.count(length) == 1:
        return 1
    raise BatchError(
        f"'{name}' of shape {list(shape)} may or may not follow the {length} tokens of the "
        f"sequence. Say which: batch_schema={{{name!r}: 'shard'}} for the second dim, 'replicate' "
        "for none, or the dim's number."
    )
