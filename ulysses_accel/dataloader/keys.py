"""The ecosystem's batch keys as one table: which dim is the sequence, what pads it, what belongs to
the whole sample.

A key that is not here is told by its shape. `ParallelismConfig(batch_schema={...})` wins over both.
The keys that mark packed documents for flash attention (`sequence.documents.CUMULATIVE_KEYS`) are
read and dropped.

What a batch's key says about its tensor: which dim is the sequence, if any, and what pads it.

The configuration's rule comes first, then the table of known keys, then the shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ulysses_accel.dataloader.batch_layout import BatchLayout
from ulysses_accel.errors import BatchError
from ulysses_accel.sequence.sharding import pad_sequence_dim

DECODER = "decoder_"
Pad = Literal["token", "label"] | float
_WHERE = "In a ParallelismConfig key_rules is batch_schema."


@dataclass(frozen=True)
class KeyRule:
    """What a key's tensor is.

    Args:
        dim: its sequence dim; None where every rank gets the whole tensor.
        pad: what padding is: a number, or the token or the label that stands for it.
        or_sample: whether `[B]`, a number for each sample, is as good as one for each token.
        merged_whole: whether the tensor stays whole beside images or sound, which the model merges
            into whole tokens.
    """

    dim: int | None
    pad: Pad = 0
    or_sample: bool = False
    merged_whole: bool = False


WHOLE = KeyRule(None)


_TOKENS: dict[str, KeyRule] = {
    "input_ids": KeyRule(1, "token", merged_whole=True),
    "inputs_embeds": KeyRule(1, merged_whole=True),
    "attention_mask": KeyRule(1, merged_whole=True),
    # [B, S], or mRoPE's planes [3, B, S] and [4, B, S]; padding is theirs to count, see
    # `Positions.padded`.
    "position_ids": KeyRule(-1, merged_whole=True),
    "token_type_ids": KeyRule(1, merged_whole=True),
    "mm_token_type_ids": KeyRule(1, merged_whole=True),
    "labels": KeyRule(1, "label"),
    "shift_labels": KeyRule(1, "label"),
    "special_tokens_mask": KeyRule(1, 1),
    "assistant_masks": KeyRule(1),
    "completion_mask": KeyRule(1),
    "loss_mask": KeyRule(1),
    "loss_weights": KeyRule(1, or_sample=True),
    "seq_idx": KeyRule(1, -1),
    # [B, S, images, tiles]
    "cross_attention_mask": KeyRule(1),
    "bbox": KeyRule(1),
}


# Reinforcement learning and preferences: of samples, or of tokens.
_REWARDS = {
    **dict.fromkeys(("advantages", "rewards", "returns"), KeyRule(1, or_sample=True)),
    **dict.fromkeys(("old_per_token_logps", "ref_per_token_logps", "per_token_logps"), KeyRule(1)),
    **dict.fromkeys(
        (
            "ref_logps",
            "ref_chosen_logps",
            "ref_rejected_logps",
            "reference_logps",
            "scores",
            "margin",
        ),
        WHOLE,
    ),
}


# What models merge into the embeddings of their tokens, at the places of placeholder tokens.
MERGED_KEYS = (
    "pixel_values",
    "pixel_values_videos",
    "pixel_values_images",
    "flattened_patches",
    "image_embeds",
    "input_features",
    "input_values",
    "audio_values",
    "audio_embeds",
    "input_audio_embeds",
)


# What goes with those, and what else is of whole samples or of the batch.
_BESIDE_MERGED = (
    *(
        "pixel_attention_mask",
        "pixel_mask",
        "image_grid_thw",
        "video_grid_thw",
        "image_sizes",
        "num_image_tokens",
    ),
    *("second_per_grid_ts", "video_second_per_grid", "aspect_ratio_ids", "aspect_ratio_mask"),
    *("input_features_mask", "feature_attention_mask", "audio_feature_lengths"),
)


_OF_SAMPLES = (
    "num_items_in_batch",
    "next_sentence_label",
    "sentence_order_label",
    "start_positions",
    "end_positions",
)


KNOWN_KEYS: dict[str, KeyRule] = {
    **_TOKENS,
    **_REWARDS,
    **dict.fromkeys((*MERGED_KEYS, *_BESIDE_MERGED, *_OF_SAMPLES), WHOLE),
}
"""By name; an encoder-decoder's decoder has the same keys with `decoder_` in front."""


def known(name: str) -> KeyRule | None:
    """Returns the table's entry of a batch's key, None where it has none."""
    return KNOWN_KEYS.get(name.removeprefix(DECODER))


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
                f"'{name}' has shape {list(tensor.shape)}, {wanted} is needed. Check the collate "
                "function."
            )
    sizes = {tuple(tensor.shape[:2]) for tensor in found.values()}
    if len(sizes) > 1:
        raise BatchError(
            f"{ids} and {embeds} differ in batch or sequence: {sorted(sizes)}. Give one of them."
        )
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


def sequence_dim(
    name: str, tensor: Tensor, batch_size: int, length: int, layout: BatchLayout
) -> int | None:
    """Returns the dim of a tensor that is the sequence, None when it is not cut along one.

    Args:
        name: the batch's key.
        tensor: before padding.
        batch_size: rows B of the batch.
        length: tokens S of the sequence.
        layout: may have a rule for the key.

    Raises:
        BatchError: the tensor's shape contradicts the rule, or there is none and the shape doesn't
            tell.
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
        source = (
            f"{name} has the sequence last"
            if dim == -1
            else "a key known to be [batch, sequence, ...]"
        )
    if not -tensor.ndim <= dim < tensor.ndim or tensor.shape[dim] != length:
        raise BatchError(
            f"'{name}' has shape {list(tensor.shape)}, where dim {dim} should be the {length} "
            "tokens of the sequence "
            f"({source}). Correct the shape, or set key_rules={{{name!r}: 'replicate'}} or the "
            "right dim's number. "
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
    if (
        shape[0] == batch_size
        and tensor.ndim > 1
        and shape[1] == length
        and inner.count(length) == 1
    ):
        return 1
    raise BatchError(
        f"'{name}' of shape {list(shape)} may or may not follow the {length} tokens of the "
        "sequence. Say which: "
        f"key_rules={{{name!r}: 'shard'}} for the second dim, 'replicate' for none, or the dim's "
        f"number. {_WHERE}"
    )


def pad_tensor(
    name: str, tensor: Tensor, dim: int | None, length: int, layout: BatchLayout
) -> Tensor:
    """Returns a tensor, other than positions, with its sequence dim padded to `length` by what its
    key asks for.

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
