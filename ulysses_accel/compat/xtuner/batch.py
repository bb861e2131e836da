"""The full batch from its shards: its description, and the labels that splitting left on other
ranks.

XTuner's loop passes a model this rank's shard of tokens, labels and positions, and the full mask.
One all-gather of these integers for each forward yields the batch's description, and the labels are
shifted before they are sharded again.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ulysses_accel.dataloader.batch_layout import BatchLayout
from ulysses_accel.dataloader.completion.complete import complete
from ulysses_accel.distributed.collectives import all_gather
from ulysses_accel.distributed.consensus import same_everywhere
from ulysses_accel.errors import BatchError
from ulysses_accel.sequence.batch_rules import BatchRules
from ulysses_accel.sequence.description import DESCRIPTION_KEY
from ulysses_accel.sequence.sharding import is_marked_shard

_SPLIT = ("input_ids", "labels", "position_ids")
_REPLICATED = ("attention_mask", "cu_seq_lens_q")


def is_split(kwargs: Mapping[str, Any], size: int) -> bool:
    """Returns whether a forward's arguments are known to be shards of sequences that `size` ranks
    share.

    Either `split_for_sequence_parallel` returned them, and they are on the same device; or their
    mask is `size` times longer.
    """
    names = ("input_ids", "inputs_embeds", "labels", "position_ids")
    rows, tokens = _shape(kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    mask = kwargs.get("attention_mask")
    # With a cache, a mask covers the earlier tokens too.
    is_alone = kwargs.get("past_key_values") is None
    has_whole_mask = (
        is_alone and isinstance(mask, Tensor) and tuple(mask.shape) == (rows, tokens * size)
    )
    return has_whole_mask or any(is_marked_shard(kwargs.get(name)) for name in names)


def described(
    kwargs: Mapping[str, Any], group: ProcessGroup, ring_size: int, rules: BatchRules, name: str
) -> dict[str, Any]:
    """Returns a forward's arguments with the batch's description, this rank's positions, and labels
    as losses use them.

    Args:
        kwargs: `input_ids` `[B, S / P]` or `inputs_embeds` `[B, S / P, D]`; maybe `labels` and
            `position_ids` `[B, S / P]`, and in full on every rank `attention_mask` `[B, S]` and
            `cu_seq_lens_q` `[n]`.
        group: the P ranks that share the sequence.
        ring_size: ring attention degree.
        rules: what the model requires of a batch.
        name: the model's, for messages.

    Raises:
        BatchError: the shards don't form a batch, or are the same on every rank.
        RankDisagreementError: the ranks have shards of different shapes, or different masks.
    """
    # Labels of whole rows are replicated on every rank.
    split = [key for key in _SPLIT if key != "labels" or rules.labels != "whole"]
    tensors = {
        key: kwargs[key] for key in (*split, *_REPLICATED) if isinstance(kwargs.get(key), Tensor)
    }
    embeds = kwargs.get("inputs_embeds")
    shape = _shape(tensors.get("input_ids"), embeds)
    same_everywhere(_facts(tensors, shape, group.size()), group, f"the batch given to {name}")
    _check(tensors, shape, name)
    full: dict[str, Any] = {
        **_gathered(tensors, shape, group),
        **{key: tensors[key] for key in _REPLICATED if key in tensors},
    }
    if "input_ids" in full and not is_split(kwargs, group.size()):
        _refuse_copies(full["input_ids"], group.size(), name)
    if "input_ids" not in full:
        # Only the number of rows and tokens of embeddings is used.
        full["inputs_embeds"] = torch.empty(shape[0], shape[1] * group.size(), 0)
    local = complete(full, BatchLayout(group.size(), ring_size=ring_size), rules).local_batch(
        group.rank()
    )
    kept = {key: value for key, value in kwargs.items() if key == "input_ids" or key not in tensors}
    batch: dict[str, Any] = {
        key: local[key].contiguous()
        for key in ("position_ids", "labels", "shift_labels")
        if key in local
    }
    return {**kept, **batch, DESCRIPTION_KEY: local[DESCRIPTION_KEY]}


def _shape(ids: Any, embeds: Any) -> tuple[int, int]:
    tokens = ids if ids is not None else embeds
    return (
        (int(tokens.shape[0]), int(tokens.shape[1]))
        if isinstance(tokens, Tensor) and tokens.ndim > 1
        else (0, 0)
    )


def _facts(tensors: dict[str, Tensor], shape: tuple[int, int], size: int) -> dict[str, int | str]:
    """Returns what must be the same on all ranks."""
    facts: dict[str, int | str] = {"rows and tokens": str(list(shape))}
    for key, tensor in tensors.items():
        facts[key] = f"{tensor.dtype} {list(tensor.shape)}"
    mask = tensors.get("attention_mask")
    if mask is not None and mask.shape[-1] == shape[1] * size:
        facts["the mask's numbers"] = zlib.crc32(
            mask.detach().to(torch.float32).cpu().numpy().tobytes()
        )
    return facts


def _check(tensors: dict[str, Tensor], shape: tuple[int, int], name: str) -> None:
    """Refuses, on every rank alike, shards that can't be joined."""
    if not all(shape):
        raise BatchError(
            f"{name} got no input_ids [B, S / P] and no inputs_embeds [B, S / P, D]. Pass "
            "one of them by name."
        )
    for key in _SPLIT:
        tensor = tensors.get(key)
        fits = tensor is None or tensor.shape[-2:] in (shape, (1, shape[1]), shape[1:])
        if tensor is not None and (not fits or tensor.is_floating_point()):
            raise BatchError(
                f"{key} has shape {list(tensor.shape)} and {tensor.dtype}, the shard of the "
                f"sequence on this rank is {list(shape)}. Split tokens, labels and position_ids "
                "together by split_for_sequence_parallel."
            )


def _gathered(
    tensors: dict[str, Tensor], shape: tuple[int, int], group: ProcessGroup
) -> dict[str, Tensor]:
    """Returns the split tensors in full, from one all-gather."""
    parts = {
        key: tensors[key].expand(*tensors[key].shape[:-2], *shape)
        for key in _SPLIT
        if key in tensors
    }
    if not parts:
        return {}
    rows = [tensor.reshape(-1, *shape).to(torch.int64) for tensor in parts.values()]
    # [n, B, S/P] -> [n, B, S]
    joined = all_gather(torch.cat(rows), group, dim=2).split([len(part) for part in rows])
    return {
        key: part.reshape(*tensor.shape[:-1], -1).to(tensor.dtype)
        for (key, tensor), part in zip(parts.items(), joined, strict=True)
    }


def _refuse_copies(tokens: Tensor, size: int, name: str) -> None:
    """Refuses a batch that was not split: then all ranks have the same tokens."""
    first, *others = tokens.chunk(size, dim=1)
    if all(bool((part == first).all()) for part in others):
        raise BatchError(
            f"{name} got the same {first.shape[1]} tokens on all {size} ranks that share a "
            "sequence. Split the batch by split_for_sequence_parallel, or call model.eval() for "
            "full batches on every rank."
        )
