"""Reads from transformers' mask functions which tokens a layer lets see each other, before any mask
is built.

transformers describes a mask by small functions over token indices, joined by "and". Those that it
has names for are known here; anything else, or an "or", is the model's private mask, which is
refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ulysses_accel.errors import UnsupportedModelError
from ulysses_accel.sequence.description import SequenceDescription

_MASKS = "transformers.masking_utils"
# Documents and padding are part of the description, so these say nothing new.
_DESCRIBED = ("packed_sequence_mask_function", "padding_mask_function")
_JOINED = ("and_masks", "remap_positions_for_packed_sequence", "add_offsets_to_mask_function")


@dataclass(frozen=True)
class MaskPattern:
    """Which tokens of one document see each other.

    Args:
        is_causal: whether a token sees only itself and the tokens before it.
        window: as `SequenceAttention` takes it; None for all.
        chunk: tokens of the pieces that each document is split into; None for none.
    """

    is_causal: bool
    window: int | None = None
    chunk: int | None = None


@dataclass(frozen=True)
class DescribedMask:
    """What layers get instead of a mask tensor.

    Args:
        description: of the batch.
        pattern: which tokens see each other; None where only the layer knows.
        keys: the encoder's sequence, where the model has a mask of it and every rank has it in
            full.
    """

    description: SequenceDescription
    pattern: MaskPattern | None = None
    keys: SequenceDescription | None = None

    def __getitem__(self, key: Any) -> DescribedMask:
        """Returns itself for slices that keep all of a mask, as models take that may keep the last
        tokens only.
        """
        if all(
            part in (slice(None), slice(0, None))
            for part in (key if isinstance(key, tuple) else (key,))
        ):
            return self
        raise UnsupportedModelError(
            f"the model takes a part [{key}] of its mask, which is not computed on a sharded "
            "sequence. "
            f"Leave logits_to_keep out, or use sp_size=1 and cp_size=1."
        )

    def __getattr__(self, name: str) -> Any:
        raise _TensorExpectedError(_computes_with_mask(name))

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], *_: Any) -> Any:
        """Refuses operations on the mask, which is no tensor."""
        raise UnsupportedModelError(
            _computes_with_mask(getattr(function, "__name__", str(function)))
        )


class _TensorExpectedError(UnsupportedModelError, AttributeError):
    """Something was asked of a mask that only a tensor has; `hasattr` takes it as an absent
    attribute.
    """


def _computes_with_mask(operation: str) -> str:
    return (
        f"the model computes with its attention mask ({operation}), of which a sharded sequence "
        "has none. "
        f"Use a model without it, or sp_size=1 and cp_size=1."
    )


def read_pattern(mask_function: Callable[..., Any]) -> MaskPattern:
    """Returns the pattern that one of transformers' mask functions describes.

    Args:
        mask_function: as transformers hands it to a mask interface.

    Raises:
        UnsupportedModelError: a part of it is not known.
    """
    is_causal, windows, chunks = False, [], []
    for name, part in _parts(mask_function):
        values = inspect.getclosurevars(part).nonlocals if part.__closure__ else {}
        if name == "causal_mask_function":
            is_causal = True
        elif name in ("sliding_window_overlay", "sliding_window_bidirectional_overlay"):
            windows.append(int(values["sliding_window"]))
        elif name == "chunked_overlay":
            chunks.append(int(values["chunk_size"]))
        elif name not in ("bidirectional_mask_function", *_DESCRIBED):
            raise UnsupportedModelError(
                "the model lays a mask function of its own "
                f"({part.__module__}.{part.__qualname__}) over its "
                "attention, which is not computed on a sharded sequence. Use a model without it, "
                "or sp_size=1."
            )
    return MaskPattern(is_causal, min(windows, default=None), min(chunks, default=None))


def _parts(function: Any) -> Iterator[tuple[str, Any]]:
    """Yields the functions that a mask function is joined of, each with the name of what
    makes it.
    """
    name = function.__qualname__.partition(".")[0] if function.__module__ == _MASKS else ""
    if name not in _JOINED:
        yield name, function
        return
    values = inspect.getclosurevars(function).nonlocals
    for part in values["mask_functions"] if name == "and_masks" else (values["mask_function"],):
        yield from _parts(part)
