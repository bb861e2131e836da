"""The ecosystem's batch keys as one table: which dim is the sequence, what pads it, what belongs to the whole sample.

A key that is not here is told by its shape. `ParallelismConfig(batch_schema={...})` wins over both. The keys that mark
packed documents for flash attention (`documents.CUMULATIVE_KEYS`) are read and dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DECODER = "decoder_"

Pad = Literal["token", "label"] | float


@dataclass(frozen=True)
class KeyRule:
    """What a key's tensor is.

    Args:
        dim: its sequence dim; None where every rank gets the whole tensor.
        pad: what padding is: a number, or the token or the label that stands for it.
        or_sample: whether `[B]`, a number for each sample, is as good as one for each token.
        merged_whole: whether the tensor stays whole beside images or sound, which the model merges into whole tokens.
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
    # [B, S], or mRoPE's planes [3, B, S] and [4, B, S]; padding is theirs to count, see `Positions.padded`.
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
        ("ref_logps", "ref_chosen_logps", "ref_rejected_logps", "reference_logps", "scores", "margin"), WHOLE
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
    *("pixel_attention_mask", "pixel_mask", "image_grid_thw", "video_grid_thw", "image_sizes", "num_image_tokens"),
    *("second_per_grid_ts", "video_second_per_grid", "aspect_ratio_ids", "aspect_ratio_mask"),
    *("input_features_mask", "feature_attention_mask", "audio_feature_lengths"),
)
_OF_SAMPLES = ("num_items_in_batch", "next_sentence_label", "sentence_order_label", "start_positions", "end_positions")

KNOWN_KEYS: dict[str, KeyRule] = {
    **_TOKENS,
    **_REWARDS,
    **dict.fromkeys((*MERGED_KEYS, *_BESIDE_MERGED, *_OF_SAMPLES), WHOLE),
}
"""By name; an encoder-decoder's decoder has the same keys with `decoder_` in front."""


def known(name: str) -> KeyRule | None:
    """Returns the table's entry of a batch's key, None where it has none."""
    return KNOWN_KEYS.get(name.removeprefix(DECODER))
