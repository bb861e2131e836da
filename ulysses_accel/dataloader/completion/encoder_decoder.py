"""The two sequences of an encoder-decoder batch: which key belongs to which, and the decoder's
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ulysses_accel.dataloader.batch_layout import BatchLayout
from ulysses_accel.dataloader.keys import DECODER, is_known, token_size
from ulysses_accel.errors import BatchError
from ulysses_accel.sequence.batch_rules import BatchRules
from ulysses_accel.sequence.documents import CUMULATIVE_KEYS

_DECODER_IDS, _DECODER_EMBEDS = f"{DECODER}input_ids", f"{DECODER}inputs_embeds"
# What goes with the labels goes with the tokens that are compared with them.
_WITH_LABELS = frozenset(
    {"labels", "shift_labels", "loss_mask", "loss_weights", "completion_mask", "assistant_masks"}
)


@dataclass(frozen=True)
class Pair:
    """The tensors of an encoder-decoder batch, told apart.

    Args:
        decoder: of the decoder's sequence; keys as in the batch.
        encoder: of the encoder's tokens; empty where its input is no tokens.
        whole: what every rank gets as it is, because the encoder reads no tokens.
    """

    decoder: dict[str, Tensor]
    encoder: dict[str, Tensor]
    whole: dict[str, Tensor]


def split_pair(
    tensors: dict[str, Tensor], extras: dict[str, Any], layout: BatchLayout, rules: BatchRules
) -> Pair:
    """Returns the batch's tensors by sequence, with `decoder_input_ids` made of `labels` where they
    are missing.

    Args:
        tensors: of the batch.
        extras: its other entries.
        layout: may have rules for keys of your own.
        rules: how the model makes its decoder's tokens.

    Raises:
        BatchError: no decoder tokens and no labels to make them of, sequences that don't fit each
            other, or a mask of padding in an encoder input that is no tokens.
    """
    _refuse_packed_marks(tensors, extras)
    tensors = _with_decoder_inputs(tensors, rules)
    rows, decoder_length = token_size(tensors, DECODER)
    if "input_ids" not in tensors and "inputs_embeds" not in tensors:
        return _beside_whole_encoder(tensors, decoder_length, layout)
    encoder_rows, encoder_length = token_size(tensors)
    if encoder_rows != rows:
        raise BatchError(
            f"the encoder has {encoder_rows} rows and the decoder {rows}. Give each row of one its "
            "row of the other."
        )
    decoder = {
        name: tensor
        for name, tensor in tensors.items()
        if _is_decoders(name, tensor, decoder_length, encoder_length, layout)
    }
    return Pair(
        decoder, {name: tensor for name, tensor in tensors.items() if name not in decoder}, {}
    )


def _refuse_packed_marks(tensors: dict[str, Tensor], extras: dict[str, Any]) -> None:
    for name in (*CUMULATIVE_KEYS[:1], "seq_idx"):
        if tensors.get(name) is not None or extras.get(name) is not None:
            raise packed_pair_error(f"'{name}' marks")


def packed_pair_error(found: str) -> BatchError:
    """Returns the error for packed documents in a batch of two sequences, `found` being what marks
    them.
    """
    return BatchError(
        f"{found} packed documents, but the batch has an encoder's sequence and a decoder's, and a "
        "decoder token sees "
        f"all of the encoder's row. Give each pair its own row."
    )


def _with_decoder_inputs(tensors: dict[str, Tensor], rules: BatchRules) -> dict[str, Tensor]:
    if _DECODER_IDS in tensors or _DECODER_EMBEDS in tensors:
        return tensors
    labels = tensors.get("labels")
    if labels is None or labels.ndim != 2:
        found = "no 'labels'" if labels is None else f"'labels' of shape {list(labels.shape)}"
        raise BatchError(
            f"the batch of a model with an encoder has no '{_DECODER_IDS}', and {found} to make "
            "them of (its tensors: "
            f"{sorted(tensors)}). Return labels [batch, sequence] or '{_DECODER_IDS}' from the "
            "collate function."
        )
    assert rules.decoder_inputs is not None
    return {**tensors, _DECODER_IDS: rules.decoder_inputs(labels)}


def _is_decoders(
    name: str, tensor: Tensor, decoder_length: int, encoder_length: int | None, layout: BatchLayout
) -> bool:
    """Returns whether a tensor follows the decoder's sequence; by its shape where its key does not
    say.
    """
    if name.startswith(DECODER) or name in _WITH_LABELS:
        return True
    if is_known(name) or decoder_length == encoder_length:
        # Two sequences of one length are padded and dealt alike, so either will do.
        return False
    rule = layout.key_rules.get(name)
    dim = rule if isinstance(rule, int) else 1
    return (
        rule != "replicate"
        and not callable(rule)
        and -tensor.ndim <= dim < tensor.ndim
        and tensor.shape[dim] == decoder_length
    )


def _beside_whole_encoder(
    tensors: dict[str, Tensor], decoder_length: int, layout: BatchLayout
) -> Pair:
    """Returns the pair where the encoder reads images or sound, which every rank gets whole, with
    their mask.
    """
    decoder = {
        name: own
        for name, own in tensors.items()
        if _is_decoders(name, own, decoder_length, None, layout)
    }
    return Pair(decoder, {}, {name: own for name, own in tensors.items() if name not in decoder})
