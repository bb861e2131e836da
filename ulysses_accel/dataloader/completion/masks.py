"""A 4-D attention mask that says no more than which documents a row has, turned into their
numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ulysses_accel.dataloader.completion.draft import BatchDraft
from ulysses_accel.errors import BatchError
from ulysses_accel.sequence.batch_rules import BatchRules

_KEY = "attention_mask"
_INSTEAD = (
    "Give a [batch, sequence] mask that numbers the documents from 1 (0 for padding), "
    "or position_ids."
)


def number_documents(draft: BatchDraft, rules: BatchRules) -> None:
    """Replaces a batch's 4-D mask, if it has one, by the documents' numbers `[B, S]`, 0 for
    padding.

    As beside such a mask on one device, positions that the batch lacks count through all of a row.

    Args:
        draft: may hold `attention_mask` `[B, 1, S, S]`: true or 1 where a token (rows) sees
            another (columns); of floats, 0 where it does and -1e4 or less where it doesn't.
        rules: how the model sees a document, and counts positions.

    Raises:
        BatchError: the mask is of another shape, or lets tokens see each other in another way than
            documents do.
    """
    tensors = draft.tensors
    mask = tensors.get(_KEY)
    if mask is None or mask.ndim != 4:
        return
    size = mask.shape[-1]
    if mask.shape[1:] != (1, size, size):
        raise BatchError(
            f"'{_KEY}' has shape {list(mask.shape)}; of 4-D masks only [batch, 1, S, S] is read. "
            f"{_INSTEAD}"
        )
    follow_from_mask = rules.counts_mask or rules.padding_idx is not None
    needs_plain_mask = follow_from_mask and "position_ids" not in tensors
    if rules.is_causal is None or rules.merges or needs_plain_mask:
        raise BatchError(
            f"'{_KEY}' is 4-D, of shape {list(mask.shape)}, which can't be read for this model: "
            "its layers see windows or in both directions by turns, it merges images, or its "
            f"positions follow from the mask. {_INSTEAD}"
        )
    sees = _sees(mask.detach().cpu()[:, 0])
    numbers = [_numbers(row, index, rules.is_causal) for index, row in enumerate(sees)]
    tensors[_KEY] = torch.stack(numbers).to(mask.device)
    if "position_ids" not in tensors:
        tensors["position_ids"] = torch.arange(size, device=mask.device).repeat(len(mask), 1)


def _sees(mask: Tensor) -> Tensor:
    """Returns `[B, S, S]` of bool."""
    if mask.is_floating_point():
        hidden = mask <= -1e4
        plain = hidden | (mask == 0)
    else:
        hidden = mask == 0
        plain = hidden | (mask == 1)
    if not bool(plain.all()):
        raise BatchError(
            f"the 4-D '{_KEY}' has values that change scores rather than hide tokens, the first "
            f"{float(mask[~plain][0])}, which is not computed on shards. {_INSTEAD}"
        )
    return ~hidden


def _numbers(sees: Tensor, row: int, is_causal: bool) -> Tensor:
    """Returns `[S]`, the number of each token's document from 1 on, 0 for tokens that don't see
    themselves.
    """
    valid = sees.diagonal()
    starts = sees.int().argmax(dim=-1)
    is_first = valid & (starts == torch.arange(len(sees)))
    numbers = is_first.cumsum(0) * valid
    expected = (numbers[:, None] == numbers[None, :]) & valid[None, :]
    if is_causal:
        expected = expected.tril()
    # What padding sees is of no concern.
    wrong = ((sees != expected) & valid[:, None]).nonzero()
    if len(wrong):
        token, other = wrong[0].tolist()
        extent = "up to each token" if is_causal else "in full"
        verb = "sees" if sees[token, other] else "does not see"
        raise BatchError(
            f"the 4-D '{_KEY}' is not of documents that are seen {extent}: in row {row} token "
            f"{token} {verb} token {other}. {_INSTEAD}"
        )
    return numbers
