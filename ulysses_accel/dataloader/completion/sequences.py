"""The sequences of a batch: one, or an encoder's and a decoder's; which key belongs to which, and
the decoder's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ulysses_accel.dataloader.batch_layout import BatchLayout
from ulysses_accel.dataloader.completion.draft import BatchDraft, SequenceDraft
from ulysses_accel.dataloader.keys import DECODER, known_key
from ulysses_accel.errors import BatchError
from ulysses_accel.sequence.batch_rules import BatchRules
from ulysses_accel.sequence.documents import PREFIX_KEY

_DECODER_IDS, _DECODER_EMBEDS = f"{DECODER}input_ids", f"{DECODER}inputs_embeds"
# What goes with the labels goes with the tokens that are compared with them.
_WITH_LABELS = frozenset(
    {"labels", "shift_labels", "loss_mask", "loss_weights", "completion_mask", "assistant_masks"}
)


def split_sequences(draft: BatchDraft, layout: BatchLayout, rules: BatchRules) -> None:
    """Sorts the batch's tensors by sequence; a decoder's tokens are made of `labels` where they are
    missing.

    Where an encoder reads images or audio, its input is no sequence of tokens: every rank gets all
    of it, with its mask.

    Args:
        draft: holds `input_ids` `[B, S]` or `inputs_embeds` `[B, S, D]`; of a model with an encoder
            `decoder_input_ids` `[B, T]`, `decoder_inputs_embeds` `[B, T, D]` or `labels` `[B, T]`.
        layout: may have rules for keys of your own.
        rules: whether the model has an encoder, and how it makes its decoder's tokens.

    Raises:
        BatchError: no tokens, or sequences that don't fit each other.
    """
    tensors, prefix_lengths = draft.tensors, draft.entries.get(PREFIX_KEY)
    if rules.decoder_inputs is None:
        draft.sequences = [SequenceDraft("", *_token_size(tensors), tensors, prefix_lengths)]
        draft.tensors = {}
        return
    for name in ("cu_seq_lens_q", "seq_idx"):
        if draft.entries.get(name) is not None:
            raise packed_pair_error(f"'{name}' marks")
    if _DECODER_IDS not in tensors and _DECODER_EMBEDS not in tensors:
        tensors[_DECODER_IDS] = _decoder_ids(tensors, rules)
    rows, decoder_length = _token_size(tensors, DECODER)
    encoder_rows, encoder_length = rows, None
    if "input_ids" in tensors or "inputs_embeds" in tensors:
        encoder_rows, encoder_length = _token_size(tensors)
    if encoder_rows != rows:
        raise BatchError(
            f"the encoder has {encoder_rows} rows and the decoder {rows}. Give each row of one its "
            "row of the other."
        )
    of_decoder, of_encoder = {}, {}
    for name, tensor in tensors.items():
        if _is_decoders(name, tensor, decoder_length, encoder_length, layout):
            of_decoder[name] = tensor
        else:
            of_encoder[name] = tensor
    draft.sequences = [SequenceDraft(DECODER, rows, decoder_length, of_decoder, prefix_lengths)]
    draft.tensors = of_encoder
    if encoder_length is not None:
        draft.sequences.append(SequenceDraft("", rows, encoder_length, of_encoder))
        draft.tensors = {}


def _token_size(tensors: Mapping[str, Tensor], key_prefix: str = "") -> tuple[int, int]:
    """Returns rows B and tokens S of the sequence whose keys have the prefix."""
    tokens = {}
    for name, num_dims, dims in (
        (f"{key_prefix}input_ids", 2, "[batch, sequence]"),
        (f"{key_prefix}inputs_embeds", 3, "[batch, sequence, features]"),
    ):
        if name not in tensors:
            continue
        tokens[name] = tensors[name]
        if tensors[name].ndim != num_dims:
            raise BatchError(
                f"'{name}' has shape {list(tensors[name].shape)}, {dims} is needed. Check the "
                "collate function."
            )
    if not tokens:
        raise BatchError(
            f"the batch has neither '{key_prefix}input_ids' nor '{key_prefix}inputs_embeds' (its "
            f"tensors: {sorted(tensors)}). Return one of them from the collate function."
        )
    sizes = {tuple(tensor.shape[:2]) for tensor in tokens.values()}
    if len(sizes) > 1:
        raise BatchError(
            f"{' and '.join(tokens)} differ in batch or sequence: {sorted(sizes)}. Give one of "
            "them."
        )
    batch_size, length = sizes.pop()
    if not batch_size or not length:
        raise BatchError(
            f"the batch is empty: {batch_size} rows of {length} tokens. "
            "Filter empty samples from the dataset, or use drop_last=True."
        )
    return batch_size, length


def _decoder_ids(tensors: Mapping[str, Tensor], rules: BatchRules) -> Tensor:
    """Returns `decoder_input_ids` `[B, T]`, made of the labels as the model would."""
    labels = tensors.get("labels")
    if labels is None or labels.ndim != 2:
        fact = "no 'labels'" if labels is None else f"'labels' of shape {list(labels.shape)}"
        raise BatchError(
            f"the batch of a model with an encoder has no '{_DECODER_IDS}', and {fact} to make "
            f"them of (its tensors: {sorted(tensors)}). Return labels [batch, sequence] or "
            f"'{_DECODER_IDS}' from the collate function."
        )
    assert rules.decoder_inputs is not None
    return rules.decoder_inputs(labels)


def _is_decoders(
    name: str, tensor: Tensor, decoder_length: int, encoder_length: int | None, layout: BatchLayout
) -> bool:
    """Returns whether a tensor follows the decoder's sequence; by its shape where its key does not
    say.
    """
    if name.startswith(DECODER) or name in _WITH_LABELS:
        return True
    if known_key(name) is not None or decoder_length == encoder_length:
        # Two sequences of one length are padded and distributed alike, so either will do.
        return False
    rule = layout.batch_schema.get(name)
    if rule == "replicate" or callable(rule):
        return False
    dim = rule if isinstance(rule, int) else 1
    return -tensor.ndim <= dim < tensor.ndim and tensor.shape[dim] == decoder_length


def packed_pair_error(mark: str) -> BatchError:
    """Returns the error for packed documents in a batch of two sequences, `mark` being what marks
    them.
    """
    return BatchError(
        f"{mark} packed documents, but the batch has an encoder's sequence and a decoder's, and a "
        "decoder token sees all of the encoder's row. Give each pair its own row."
    )
