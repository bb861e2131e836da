"""The batches of the walk: plain, packed, padded and of a length that ranks don't divide, for each
kind of model.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.models.heads import Architecture

# causal: its loss shifts the labels; masked: a token's label is its own; seq2seq: tokens in, labels
# of another length out; features: the encoder's input is no tokens, and every rank has all of it.
Form = Literal["causal", "masked", "seq2seq", "features"]
Batch = dict[str, Tensor]

KINDS = ("plain", "packed", "padded", "odd")
LENGTH, ODD_LENGTH = 32, 29
# No encoder length and no size of a layer is equal to it.
LABEL_LENGTH, ODD_LABEL_LENGTH = 24, 21
DOCUMENTS = ((11, 1, 20), (5, 27))
IGNORED = -100


def form_of(architecture: Architecture, model: Any) -> Form:
    """Returns which kind of batch a model takes."""
    if getattr(model.config, "is_encoder_decoder", False):
        encoder = inspect.signature(type(model).forward).parameters
        return (
            "seq2seq"
            if "input_ids" in encoder and model.main_input_name == "input_ids"
            else "features"
        )
    return "masked" if architecture.head == "masked" else "causal"


def kinds_of(form: Form, model: nn.Module) -> tuple[str, ...]:
    """Returns the kinds of batches that mean something: documents are told by positions, if a model
    takes any.
    """
    packs = form == "causal" or (form == "masked" and _takes(model, "position_ids"))
    return tuple(kind for kind in KINDS if packs or kind != "packed")


def make_batch(form: Form, kind: str, model: nn.Module, features: Batch) -> Batch:
    """Returns a batch of two rows.

    Args:
        form: of `form_of`.
        kind: of `KINDS`.
        model: tells the padding token, and where its positions begin.
        features: the encoder's input where it is no tokens.
    """
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(8, 60, (2, ODD_LENGTH if kind == "odd" else LENGTH), generator=generator)
    mask = _mask(tokens) if kind == "padded" else torch.ones_like(tokens)
    made = {"input_ids": tokens.masked_fill(mask == 0, _padding_token(model))}
    if kind == "padded":
        made["attention_mask"] = mask
    if form in ("seq2seq", "features"):
        made = made if form == "seq2seq" else dict(features)
        return {**made, "labels": _decoder_labels(kind, generator)}
    chosen = (
        torch.rand(tokens.shape, generator=generator) < 0.3
        if form == "masked"
        else torch.ones_like(mask)
    )
    labels = tokens.masked_fill((mask == 0) | (chosen == 0), IGNORED)
    if form == "causal":
        # Behind padding there is no token that could tell the first.
        labels[:, 1:].masked_fill_(mask[:, :-1] == 0, IGNORED)
    if kind == "packed":
        counted = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS])
        made["position_ids"] = counted + first_position(model)
        labels = labels.masked_fill(counted == 0, IGNORED) if form == "causal" else labels
    return {**made, "labels": labels}


def documents_alone(form: Form, packed: Batch) -> list[Batch]:
    """Returns each document of a packed batch as a batch of its own; those without a counted label
    are left out.
    """
    parts = []
    for row, sizes in enumerate(DOCUMENTS):
        split = {name: packed[name][row].split(list(sizes)) for name in packed}
        parts += [{name: split[name][index][None] for name in split} for index in range(len(sizes))]
    return [part for part in parts if num_counted(form, part)]


def num_counted(form: Form, batch: Batch) -> int:
    """Returns how many labels of a batch count."""
    labels = batch["labels"][:, 1:] if form == "causal" else batch["labels"]
    return int((labels != IGNORED).sum())


def first_position(model: nn.Module) -> int:
    """Returns where a model's positions begin, which is behind the padding token's number in some
    families.
    """
    for module in model.modules():
        if callable(getattr(module, "create_position_ids_from_input_ids", None)):
            return int(getattr(module, "padding_idx", 0) or 0) + 1
    return 0


def feature_candidates(model: Any) -> Iterator[Batch]:
    """Yields inputs that the encoder of a model may take, by the name of its main input."""
    name, config = model.main_input_name, model.config
    encoder = getattr(config, "encoder", config)
    frames = 2 * int(getattr(config, "max_source_positions", 10) or 10)
    shapes: list[tuple[int, ...]] = []
    if name in ("input_features", "input_values"):
        sizes = [
            getattr(config, key, None)
            for key in ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
        ]
        for size in (*sizes, 80, 128):
            shapes += [(2, size, frames), (2, 40, size)] if isinstance(size, int) else []
        shapes += [(2, 4000)]
    if name in ("pixel_values", "flattened_patches"):
        side = getattr(encoder, "image_size", None) or getattr(config, "image_size", 32)
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        # Patches come with their row and column in front.
        patch = (
            int(getattr(getattr(config, "vision_config", None), "patch_embed_hidden_size", 0)) + 2
        )
        shapes += (
            [(2, 40, patch)]
            if name == "flattened_patches"
            else [(2, 3, height, width), (2, 3, 64, 64)]
        )
    for shape in dict.fromkeys(shapes):
        values = torch.randn(
            math.prod(shape), generator=torch.Generator().manual_seed(2), dtype=torch.float64
        )
        yield {name: values.view(shape)}


def _takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(type(model).forward).parameters


def _mask(tokens: Tensor) -> Tensor:
    """Padding on the left, within and on the right."""
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    mask[0, 15:18] = 0
    mask[1, 20:] = 0
    return mask


def _padding_token(model: Any) -> int:
    found = getattr(model.config.get_text_config(), "pad_token_id", None)
    return found if isinstance(found, int) and found >= 0 else 0


def _decoder_labels(kind: str, generator: torch.Generator) -> Tensor:
    length = ODD_LABEL_LENGTH if kind == "odd" else LABEL_LENGTH
    labels = torch.randint(8, 60, (2, length), generator=generator)
    if kind == "padded":
        labels[1, 15:] = IGNORED
    return labels
