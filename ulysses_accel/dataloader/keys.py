"""What a batch's key says about its tensor: which dim is the sequence, if any, and what pads it.

An encoder-decoder batch names its decoder's tensors like the encoder's, with `decoder_` in front.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ulysses_accel.dataloader.batch_layout import BatchLayout
from ulysses_accel.errors import BatchError
from ulysses_accel.sequence import pad_sequence_dim

DECODER = "decoder_"

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
_TOKENS = "input_ids"
_LABELS = ("labels", "shift_labels")
# Known keys that belong to the whole sample, whatever their sizes.
_REPLICATED_KEYS = frozenset(
    {
        "pixel_values",
        "pixel_values_videos",
        "pixel_attention_mask",
        "pixel_mask",
        "image_grid_thw",
        "video_grid_thw",
        "image_sizes",
        "second_per_grid_ts",
        "video_second_per_grid",
        "aspect_ratio_ids",
        "aspect_ratio_mask",
        "input_features",
        "input_features_mask",
        "input_values",
        "feature_attention_mask",
        "audio_feature_lengths",
        "num_items_in_batch",
    }
)


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
    base = name.removeprefix(DECODER)
    return base in _SEQUENCE_PADS or base in (_TOKENS, "position_ids", *_LABELS) or base in _REPLICATED_KEYS


def sequence_dim(name: str, tensor: Tensor, batch_size: int, length: int, layout: BatchLayout) -> int | None:
    """Returns the dim of a tensor that is the sequence, None when every rank gets the whole tensor.

    Args:
        name: the batch's key.
        tensor: before padding.
        batch_size: rows B of the batch.
        length: tokens S of the sequence.
        layout: may have a rule for the key.

    Raises:
        BatchError: the tensor's shape contradicts the rule, or there is none and the shape doesn't tell.
    """
    rule, base = layout.key_rules.get(name), name.removeprefix(DECODER)
    if rule == "replicate" or (rule is None and base in _REPLICATED_KEYS):
        return None
    if rule is not None:
        dim = 1 if rule == "shard" else int(rule)
        source = f"key_rules[{name!r}]={rule!r}"
    elif base == "position_ids":
        dim, source = -1, f"{name} has the sequence last"
    elif is_known(name):
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
    base = name.removeprefix(DECODER)
    known = {_TOKENS: layout.pad_token_id, **dict.fromkeys(_LABELS, layout.ignore_index), **_SEQUENCE_PADS}
    return pad_sequence_dim(tensor, length, known.get(base, 0), dim)
