"""Checks that what a sharded forward is given is this rank's shard of the batch that its
description describes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ulysses_accel.dataloader.keys import MERGED_KEYS
from ulysses_accel.errors import BatchError, UnsupportedModelError
from ulysses_accel.sequence.description import DESCRIPTION_KEY, SequenceDescription
from ulysses_accel.sequence.sharding import is_marked_shard

_AS_GIVEN = "Pass the batch as the data loader gave it"


def refuse_undescribed_shard(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses a shard that lost its description: attention would silently stay within the shard.

    Data loaders mark the shards that they yield; whole batches carry no mark, and `labels` instead
    of `shift_labels`.
    """
    names = (
        "input_ids",
        "inputs_embeds",
        "position_ids",
        "decoder_input_ids",
        "decoder_position_ids",
        "labels",
    )
    shards = [name for name in names if is_marked_shard(kwargs.get(name))]
    if args and is_marked_shard(args[0]):
        shards.insert(0, "tokens")
    if kwargs.get("shift_labels") is not None:
        shards.append("shift_labels")
    if shards:
        raise BatchError(
            f"the batch's {', '.join(shards)} came without its {DESCRIPTION_KEY}, so each rank's "
            f"tokens would only see their own shard. {_AS_GIVEN}: model(**batch). For a batch that "
            "is whole on this rank, pass labels and not shift_labels."
        )


def check_batch(
    description: SequenceDescription,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    position_keys: tuple[str, ...],
    is_encoder_decoder: bool,
    *,
    merges: bool,
    has_blocks: bool,
) -> None:
    """Refuses arguments that are not this rank's shard of the described batch.

    Args:
        description: of the batch.
        args: positional arguments of the forward; there must be none.
        kwargs: all others.
        position_keys: the positions that the model is to be given.
        is_encoder_decoder: whether the described sequence is a decoder's.
        merges: whether the model merges images or audio of this batch into its tokens, which are
            then full on every rank.
        has_blocks: whether it lets tokens of one image see each other in both directions.

    Raises:
        BatchError: with what is wrong.
        UnsupportedModelError: the batch asks the model for attention that is not computed on
            shards.
    """
    if args:
        raise BatchError(
            f"a sharded batch was passed with {len(args)} positional arguments. Pass all of it by "
            "name: model(**batch)."
        )
    if is_encoder_decoder:
        _check_tokens(description, kwargs, "decoder_")
        if description.encoder is not None and description.encoder.num_shards > 1:
            _check_tokens(description.encoder, kwargs, "")
    else:
        _check_tokens(description, kwargs, "", is_full=merges)
        if kwargs.get("encoder_hidden_states") is not None:
            raise BatchError(
                "the sharded batch has encoder_hidden_states, but the model is no encoder-decoder "
                "whose encoder is "
                "known. Use a transformers encoder-decoder model, or sp_size=1 and cp_size=1."
            )
    for key in position_keys:
        if kwargs.get(key) is None:
            raise BatchError(f"the sharded batch has no {key}. {_AS_GIVEN}: **batch.")
        if not is_encoder_decoder and not merges:
            _check_cut(description, key, kwargs[key].shape[-1], kwargs[key])
    if has_blocks:
        _refuse_blocks(kwargs)
    if not merges:
        _refuse_merged(description.encoder if is_encoder_decoder else description, kwargs)


def _check_tokens(
    description: SequenceDescription, kwargs: dict[str, Any], prefix: str, is_full: bool = False
) -> None:
    ids, embeds = kwargs.get(f"{prefix}input_ids"), kwargs.get(f"{prefix}inputs_embeds")
    tokens = ids if ids is not None else embeds
    expected = (
        description.batch_size,
        description.sequence_length if is_full else description.shard_length,
    )
    shape = None if tokens is None else tuple(tokens.shape[:2])
    if shape != expected:
        side = "decoder tokens" if prefix else "tokens"
        raise BatchError(
            f"the batch has {shape} rows and tokens on this rank, its {DESCRIPTION_KEY} says "
            f"{expected} ({description.sequence_length} {side} over {description.num_shards} "
            f"ranks{', in full beside images or audio' if is_full else ''}). {_AS_GIVEN}."
        )


def check_labels(
    description: SequenceDescription, labels: Tensor | None, used: Tensor | None
) -> None:
    """Refuses labels for a loss of tokens that are not those of this rank's tokens.

    Args:
        description: of the batch.
        labels: what the model is given; `[B, S / P]`, or something else.
        used: the same where they are what its loss counts; None where it would shift them, within
            the shard.

    Raises:
        BatchError: something else, or labels that would be shifted.
    """
    if labels is None:
        return
    _check_cut(description, "labels", labels.shape[1] if labels.ndim > 1 else 1, labels)
    if used is None:
        raise BatchError(
            "the sharded batch has labels and no shift_labels, so the model would shift them "
            "within each rank's part. "
            f"{_AS_GIVEN}: its shift_labels are the whole sequence's."
        )


def _check_cut(description: SequenceDescription, key: str, length: int, tensor: Tensor) -> None:
    if length != description.shard_length:
        raise BatchError(
            f"the batch's {key} has shape {list(tensor.shape)} on this rank, which has "
            f"{description.shard_length} of "
            f"{description.sequence_length} tokens. {_AS_GIVEN}, and leave {key} out of "
            "batch_schema."
        )


def _refuse_merged(description: SequenceDescription | None, kwargs: dict[str, Any]) -> None:
    """Refuses images and sound beside sharded tokens."""
    names = [name for name in MERGED_KEYS if kwargs.get(name) is not None]
    if names and description is not None and description.num_shards > 1:
        raise BatchError(
            f"the batch has {', '.join(names)} beside sharded tokens: the model would merge them "
            "into a shard's "
            "placeholders, which are not all of them, and where it merges is not known. Merge "
            "them before "
            f"(inputs_embeds), train on text alone, or use sp_size=1 and cp_size=1."
        )


def _refuse_blocks(kwargs: dict[str, Any]) -> None:
    """Refuses what marks the tokens of images for a model that lets these see each other in both
    directions.
    """
    names = [
        name for name in ("token_type_ids", "mm_token_type_ids") if kwargs.get(name) is not None
    ]
    if names:
        raise UnsupportedModelError(
            f"by the batch's {', '.join(names)} the model lets tokens of one image or prompt see "
            "each other in both "
            f"directions, which is not computed on a sharded sequence. Leave {', '.join(names)} "
            "out, so that each "
            f"token sees those before it, or use sp_size=1 and cp_size=1."
        )
