"""The ecosystem's batch keys as one table: which dim is the sequence, what pads it, what belongs to
the sample.

A key that is not here is told by its shape. `ParallelismConfig(batch_schema={...})` wins over both.
The keys that mark packed documents for flash attention (`sequence.documents.CUMULATIVE_KEYS`) are
read and dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DECODER = "decoder_"
Pad = Literal["token", "label"] | float


@dataclass(frozen=True)
class KnownKey:
    """What a key's tensor is.

    Args:
        dim: its sequence dim; None where every rank gets all of the tensor.
        pad: what padding is: a number, or the token or the label that stands for it.
        or_sample: whether `[B]`, a number for each sample, is as good as one for each token.
        replicated_with_merged: whether every rank gets all of the tensor beside images or audio,
            which the model merges into all of its tokens.
    """

    dim: int | None
    pad: Pad = 0
    or_sample: bool = False
    replicated_with_merged: bool = False


_REPLICATED = KnownKey(None)


_TOKENS: dict[str, KnownKey] = {
    "input_ids": KnownKey(1, "token", replicated_with_merged=True),
    "inputs_embeds": KnownKey(1, replicated_with_merged=True),
    "attention_mask": KnownKey(1, replicated_with_merged=True),
    # [B, S], or mRoPE's planes [3, B, S] and [4, B, S]; padding is theirs to count, see
    # `completion.padding`.
    "position_ids": KnownKey(-1, replicated_with_merged=True),
    "token_type_ids": KnownKey(1, replicated_with_merged=True),
    "mm_token_type_ids": KnownKey(1, replicated_with_merged=True),
    "labels": KnownKey(1, "label"),
    "shift_labels": KnownKey(1, "label"),
    "special_tokens_mask": KnownKey(1, 1),
    "assistant_masks": KnownKey(1),
    "completion_mask": KnownKey(1),
    "loss_mask": KnownKey(1),
    "loss_weights": KnownKey(1, or_sample=True),
    "seq_idx": KnownKey(1, -1),
    # [B, S, images, tiles]
    "cross_attention_mask": KnownKey(1),
    "bbox": KnownKey(1),
}


# Reinforcement learning and preferences: of samples, or of tokens.
_REWARDS = {
    **dict.fromkeys(("advantages", "rewards", "returns"), KnownKey(1, or_sample=True)),
    **dict.fromkeys(("old_per_token_logps", "ref_per_token_logps", "per_token_logps"), KnownKey(1)),
    **dict.fromkeys(
        (
            "ref_logps",
            "ref_chosen_logps",
            "ref_rejected_logps",
            "reference_logps",
            "scores",
            "margin",
        ),
        _REPLICATED,
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
    "pixel_attention_mask",
    "pixel_mask",
    "image_grid_thw",
    "video_grid_thw",
    "image_sizes",
    "num_image_tokens",
    "second_per_grid_ts",
    "video_second_per_grid",
    "aspect_ratio_ids",
    "aspect_ratio_mask",
    "input_features_mask",
    "feature_attention_mask",
    "audio_feature_lengths",
)


_OF_SAMPLES = (
    "num_items_in_batch",
    "next_sentence_label",
    "sentence_order_label",
    "start_positions",
    "end_positions",
)


KNOWN_KEYS: dict[str, KnownKey] = {
    **_TOKENS,
    **_REWARDS,
    **dict.fromkeys((*MERGED_KEYS, *_BESIDE_MERGED, *_OF_SAMPLES), _REPLICATED),
}
"""By name; an encoder-decoder's decoder has the same keys with `decoder_` in front."""


def known_key(name: str) -> KnownKey | None:
    """Returns the table's entry of a batch's key, None where it has none."""
    return KNOWN_KEYS.get(name.removeprefix(DECODER))
