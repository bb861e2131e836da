"""Tiny models that merge images or sound into their tokens, with batches whose images lie on one
rank or over borders.

Every image, or piece of sound, is `PLACES` tokens long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.helpers.architectures import GROUPED, IGNORE, Batch

IMAGE, VIDEO, PLACES = 60, 61, 4
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
TEXT = {name: value for name, value in GROUPED.items() if name != "head_dim"}
MROPE = {**TEXT, "rope_parameters": ROPE}
_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO}

# For each row where its images begin; what lies in the second entry's spans is padding.
KINDS: dict[str, tuple[int, tuple[tuple[int, ...], ...], tuple[tuple[int, int, int], ...]]] = {
    "one rank": (16, ((1,), ()), ()),
    "border": (16, ((6,), (2, 10)), ()),
    "text": (16, ((), ()), ()),
    "all ranks": (16, ((1, 6, 11), (6,)), ()),
    "right": (16, ((0,), (6,)), ((1, 11, 16),)),
    "left": (16, ((9,), (11,)), ((0, 0, 5),)),
    "odd": (13, ((5,), (8,)), ()),
}


def grids(rows: Sequence[Sequence[int]], generator: torch.Generator) -> Batch:
    """Returns Qwen's patches `[n * 16, 24]` and grids of images `[n, 3]`."""
    count = sum(map(len, rows))
    grid = torch.tensor([[1, 4, 4]]).expand(count, 3)
    return {"pixel_values": _random(generator, count * 16, 24), "image_grid_thw": grid}


def videos(rows: Sequence[Sequence[int]], generator: torch.Generator) -> Batch:
    """Returns the same as videos of two frames."""
    made = grids(rows, generator)
    return {"pixel_values_videos": made["pixel_values"], "video_grid_thw": made["image_grid_thw"]}


def sized_pictures(rows: Sequence[Sequence[int]], generator: torch.Generator) -> Batch:
    """Returns images `[n, 3, 8, 8]`, and their sizes `[n, 2]`."""
    images = pictures(rows, generator)
    return {**images, "image_sizes": torch.tensor([[8, 8]]).expand(len(images["pixel_values"]), 2)}


def pictures(rows: Sequence[Sequence[int]], generator: torch.Generator) -> Batch:
    """Returns images `[n, 3, 8, 8]`."""
    return {"pixel_values": _random(generator, sum(map(len, rows)), 3, 8, 8)}


def padded_pictures(rows: Sequence[Sequence[int]], generator: torch.Generator) -> Batch:
    """Returns images by row `[B, n, 3, 8, 8]`, zeros where a row has fewer than another."""
    images = _random(generator, len(rows), max(map(len, rows)), 3, 8, 8)
    for row, starts in enumerate(rows):
        images[row, len(starts) :] = 0
    return {"pixel_values": images}


def sound(rows: Sequence[Sequence[int]], generator: torch.Generator) -> Batch:
    """Returns sound `[n, 8, 32]`."""
    return {"input_features": _random(generator, sum(map(len, rows)), 8, 32)}


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Merger:
    """A model that merges.

    Args:
        model: the transformers class.
        config: returns the tiny configuration.
        make: what goes with the tokens of a batch, from where each row's images begin.
        type_id: what the batch says of the tokens of images, or videos; None where it says nothing.
        token: their placeholder.
    """

    model: Any
    config: Callable[[], Any]
    make: Callable[[Sequence[Sequence[int]], torch.Generator], Batch]
    type_id: int | None = None
    token: int = IMAGE


def _qwen(model: Any, config: Any, **vision: Any) -> Merger:
    sizes = {"depth": 1, "hidden_size": 32, "num_heads": 2, "patch_size": 2, **vision}
    return Merger(
        model, lambda: config(text_config=MROPE, vision_config=sizes, **_TOKENS), grids, type_id=1
    )


_SEES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
}


def _idefics(model: Any, config: Any) -> Merger:
    sizes = {"vision_config": {**_SEES, "patch_size": 2}, "scale_factor": 2, "pad_token_id": 0}
    return Merger(
        model,
        lambda: config(text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE, **sizes),
        padded_pictures,
    )


MERGERS: dict[str, Merger] = {
    "qwen2_vl_video": replace(
        _qwen(hf.Qwen2VLForConditionalGeneration, hf.Qwen2VLConfig, embed_dim=16, mlp_ratio=2),
        make=videos,
        type_id=2,
        token=VIDEO,
    ),
    "qwen2_vl": _qwen(
        hf.Qwen2VLForConditionalGeneration, hf.Qwen2VLConfig, embed_dim=16, mlp_ratio=2
    ),
    "qwen2_5_vl": _qwen(
        hf.Qwen2_5_VLForConditionalGeneration,
        hf.Qwen2_5_VLConfig,
        depth=2,
        intermediate_size=24,
        out_hidden_size=32,
        window_size=4,
        fullatt_block_indexes=[1],
    ),
    "qwen3_vl": _qwen(
        hf.Qwen3VLForConditionalGeneration,
        hf.Qwen3VLConfig,
        depth=2,
        intermediate_size=24,
        out_hidden_size=32,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0, 1],
    ),
    "glm4v": _qwen(
        hf.Glm4vForConditionalGeneration,
        hf.Glm4vConfig,
        hidden_size=16,
        image_size=8,
        intermediate_size=24,
        out_hidden_size=32,
    ),
    "llava": Merger(
        hf.LlavaForConditionalGeneration,
        lambda: hf.LlavaConfig(
            text_config=hf.LlamaConfig(**TEXT),
            vision_config=hf.CLIPVisionConfig(**_SEES, patch_size=4),
            image_token_id=IMAGE,
            vision_feature_layer=-1,
        ),
        pictures,
    ),
    "mistral3": Merger(
        hf.Mistral3ForConditionalGeneration,
        lambda: hf.Mistral3Config(
            text_config=hf.MistralConfig(**TEXT, sliding_window=None),
            vision_config=hf.PixtralVisionConfig(**_SEES, patch_size=2),
            image_token_index=IMAGE,
            spatial_merge_size=2,
        ),
        sized_pictures,
    ),
    "idefics3": _idefics(hf.Idefics3ForConditionalGeneration, hf.Idefics3Config),
    "smolvlm": _idefics(hf.SmolVLMForConditionalGeneration, hf.SmolVLMConfig),
    "internvl": Merger(
        hf.InternVLForConditionalGeneration,
        lambda: hf.InternVLConfig(
            text_config=hf.Qwen2Config(**TEXT),
            vision_config={**_SEES, "image_size": [8, 8], "patch_size": [2, 2]},
            image_token_id=IMAGE,
            image_seq_length=PLACES,
        ),
        pictures,
    ),
    # Without token types an image's tokens are seen like others.
    "gemma3": Merger(
        hf.Gemma3ForConditionalGeneration,
        lambda: hf.Gemma3Config(
            text_config=hf.Gemma3TextConfig(
                **GROUPED, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
            ),
            vision_config=hf.SiglipVisionConfig(**_SEES, patch_size=2),
            image_token_index=IMAGE,
            mm_tokens_per_image=PLACES,
        ),
        pictures,
    ),
    "voxtral": Merger(
        hf.VoxtralForConditionalGeneration,
        lambda: hf.VoxtralConfig(
            text_config=hf.LlamaConfig(**TEXT),
            audio_config={
                "hidden_size": 16,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_mel_bins": 8,
                "max_source_positions": 16,
            },
            audio_token_id=IMAGE,
        ),
        sound,
    ),
}


def build(name: str) -> Any:
    """Returns a model in float64 and training mode; the same call gives the same weights in every
    process.
    """
    merger = MERGERS[name]
    torch.manual_seed(0)
    model: nn.Module = merger.model._from_config(
        merger.config(), attn_implementation="sdpa"
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than transformers draws them, so that attention is far from uniform; biases and
            # norms too.
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train()


def make_batch(name: str, kind: str) -> Batch:
    """Returns a batch of two rows as a user's loader gives it; whatever the kind, of the same
    size.
    """
    length, rows, padding = KINDS[kind]
    token, type_id = MERGERS[name].token, MERGERS[name].type_id
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(8, IMAGE, (2, length), generator=generator)
    for row, starts in enumerate(rows):
        for start in starts:
            tokens[row, start : start + PLACES] = token
    mask = torch.ones_like(tokens)
    for row, start, stop in padding:
        mask[row, start:stop] = 0
    tokens = tokens.masked_fill(mask == 0, 0)
    labels = tokens.masked_fill((tokens == token) | (mask == 0), IGNORE)
    # Behind left padding there is no token that could tell the first.
    labels[:, 1:].masked_fill_(mask[:, :-1] == 0, IGNORE)
    batch: Batch = {"input_ids": tokens, "labels": labels}
    if padding:
        batch["attention_mask"] = mask
    if any(rows):
        batch.update(MERGERS[name].make(rows, generator))
    if type_id is not None:
        batch["mm_token_type_ids"] = (tokens == token).int() * type_id
    return batch
