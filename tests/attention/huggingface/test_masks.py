"""Transformers' mask functions, read and not run: what they say is what the masks that they make
show.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import masking_utils

from ulysses_accel.attention.huggingface.masks import DescribedMask, MaskPattern, read_pattern
from ulysses_accel.errors import UnsupportedModelError
from ulysses_accel.sequence.description import SequenceDescription

LENGTH = 9
NO_PADDING = torch.zeros(1, dtype=torch.long)
POSITIONS = torch.arange(LENGTH)[None]


def shown(pattern: MaskPattern) -> torch.Tensor:
    query, key = torch.meshgrid(torch.arange(LENGTH), torch.arange(LENGTH), indexing="ij")
    mask = key <= query if pattern.is_causal else torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    if pattern.window is not None:
        near = (
            key > query - pattern.window
            if pattern.is_causal
            else (key - query).abs() <= pattern.window
        )
        mask = mask & near
    if pattern.chunk is not None:
        mask = mask & (key // pattern.chunk == query // pattern.chunk)
    return mask


@pytest.mark.parametrize(
    ("function", "pattern"),
    [
        (masking_utils.causal_mask_function, MaskPattern(True)),
        (masking_utils.bidirectional_mask_function, MaskPattern(False)),
        (masking_utils.sliding_window_causal_mask_function(3), MaskPattern(True, window=3)),
        (masking_utils.sliding_window_bidirectional_mask_function(2), MaskPattern(False, window=2)),
        (masking_utils.chunked_causal_mask_function(4, NO_PADDING), MaskPattern(True, chunk=4)),
        (
            masking_utils.packed_sequence_compatibility_function(
                masking_utils.sliding_window_causal_mask_function(3),
                POSITIONS,
                torch.zeros_like(POSITIONS),
            ),
            MaskPattern(True, window=3),
        ),
    ],
)
def test_patterns(function: Any, pattern: MaskPattern) -> None:
    assert read_pattern(function) == pattern
    made = masking_utils.sdpa_mask(
        batch_size=1,
        q_length=LENGTH,
        kv_length=LENGTH,
        mask_function=function,
        allow_is_causal_skip=False,
    )
    assert torch.equal(made[0, 0], shown(pattern))


def own(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return query >= 0


@pytest.mark.parametrize(
    "function",
    [
        own,
        masking_utils.and_masks(masking_utils.causal_mask_function, own),
        masking_utils.or_masks(
            masking_utils.causal_mask_function, masking_utils.blockwise_overlay(POSITIONS)
        ),
    ],
)
def test_masks_of_a_models_own_are_refused(function: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="lays a mask function of its own"):
        read_pattern(function)


def test_nothing_is_computed_with_a_described_mask() -> None:
    mask: Any = DescribedMask(SequenceDescription(8, 1, (((0, 8),),)))
    for use in (lambda: torch.cat([mask, mask]), lambda: torch.zeros(1) + mask, lambda: mask.shape):
        with pytest.raises(UnsupportedModelError, match="computes with its attention mask"):
            use()
    assert not hasattr(mask, "shape")
