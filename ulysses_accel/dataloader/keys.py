"""What a batch's key says about its tensor: which dim is the sequence, if any, and what pads it.

The configuration's rule comes first, then the table of known keys, then the shape.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ulysses_accel.dataloader.batch_layout import BatchLayout
from ulysses_accel.dataloader.schema import known
from ulysses_accel.errors import BatchError
from ulysses_accel.sequence import pad_sequence_dim

_WHERE = "In a ParallelismConfig key_rules is batch_schema."


def token_size(tensors: Mapping[str, Tensor], prefix: str = "") -> tuple[int, int]:
    """Returns rows B and tokens S of a sequence.

    Args:
        tensors: hold `input_ids` `[B, S]` or `inputs_embeds` `[B, S, D]`, or both.
        prefix: of the keys' names.

    Raises:
        BatchError: neither is there, or its shape is another one or empty.
    """
    ids, embeds = f"{prefix}input_ids", f"{prefix}inputs_embeds"
    found = {name: tensors[name] for name in (ids, embeds) if name in tensors}
    if not found:
        raise BatchError(
            f"the batch has neither '{ids}' nor '{embeds}' (its tensors: {sorted(tensors)}). "
            "Return one of them from the collate function."
        )
    for name, tensor in found.items():
        if tensor.ndim != (2 if name == ids else 3):
            wanted = "[batch, sequence]" if name == ids else "[batch, sequence, features]"
            raise BatchError(
                f"'{name}' has shape {list(tensor.shape)}, {wanted} is needed. Check the collate function."
            )
    sizes = {tuple(tensor.shape[:2]) for tensor in found.values()}
    if len(sizes) > 1:
        raise BatchError(f"{ids} and {embeds} differ in batch or sequence: {sorted(sizes)}. Give one of them.")
    batch_size, length = sizes.pop()
    if not batch_size or not length:
        raise BatchError(
            f"the batch is empty: {batch_size} rows of {length} tokens. "
            "Filter empty samples from the dataset, or use drop_last=True."
        )
    return batch_size, length


def is_known(name: str) -> bool:
    """Returns whether a key's meaning is known, so that its shape need not tell."""
    return known(name) is not None


def sequence_dim(name: str, tensor: Tensor, batch_size: int, length: int, layout: BatchLayout) -> int | None:
    """Returns the dim of a tensor that is the sequence, None when it is not cut along one.

    Args:
        name: the batch's key.
        tensor: before padding.
        batch_size: rows B of the batch.
        length: tokens S of the sequence.
        layout: may have a rule for the key.

    Raises:
        BatchError: the tensor's shape contradicts the rule, or there is none and the shape doesn't tell.
    """
    rule, key = layout.key_rules.get(name), known(name)
    if rule is not None:
        if rule == "replicate" or callable(rule):
            return None
        dim, source = 1 if rule == "shard" else int(rule), f"key_rules[{name!r}]={rule!r}"
    elif key is None:
        return _guess(name, tensor, batch_size, length)
    elif key.dim is None or (key.or_sample and tuple(tensor.shape) == (batch_size,)):
        return None
    else:
        dim = key.dim
        source = f"{name} has the sequence last" if dim == -1 else "a key known to be [batch, sequence, ...]"
    if not -tensor.ndim <= dim < tensor.ndim or tensor.shape[dim] != length:
        raise BatchError(
            f"'{name}' has shape {list(tensor.shape)}, where dim {dim} should be the {length} tokens of the sequence "
            f"({source}). Correct the shape, or set key_rules={{{name!r}: 'replicate'}} or the right dim's number. "
            f"{_WHERE}"
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
        f"key_rules={{{name!r}: 'shard'}} for the second dim, 'replicate' for none, or the dim's number. {_WHERE}"
    )


def pad_tensor(name: str, tensor: Tensor, dim: int | None, length: int, layout: BatchLayout) -> Tensor:
    """Returns a tensor, other than positions, with its sequence dim padded to `length` by what its key asks for.

    Args:
        name: the batch's key.
        tensor: any.
        dim: its sequence dim; None leaves the tensor as it is.
        length: tokens after padding.
        layout: the token and the label that stand for padding.
    """
    if dim is None:
        return tensor
    key = known(name)
    pad = 0 if key is None else key.pad
    if pad == "token":
        pad = layout.pad_token_id
    elif pad == "label":
        pad = layout.ignore_index
    return pad_sequence_dim(tensor, length, pad, dim)
