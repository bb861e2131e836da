"""Batches of masked pairs for `train.py`: what is masked follows from the pair's number, not from
who draws it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from datasets import load_from_disk
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer

Row = dict[str, torch.Tensor]
IGNORED = -100
MASKED_SHARE = 0.15


class MaskedPairs(Dataset[Row]):
    """Prepared pairs, masked differently in each epoch, or always in the same way.

    Every process that draws a pair draws the same masks: ranks that share a sequence need them, and
    the loss does not depend on how many ranks there are.

    Args:
        pairs: of `prepare.py`, one split.
        tokenizer: that they were made with.
        seed: of all masks.
        is_fixed: whether every epoch has the masks of the first; accelerate's loaders count epochs
            of evaluation too.
    """

    def __init__(self, pairs: Any, tokenizer: Any, seed: int, is_fixed: bool = False) -> None:
        self.pairs, self.tokenizer, self.seed, self.is_fixed = pairs, tokenizer, seed, is_fixed
        self.epoch = 0
        self.special = torch.tensor(tokenizer.all_special_ids)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = 0 if self.is_fixed else epoch

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Row:
        pair = {name: torch.tensor(value) for name, value in self.pairs[index].items()}
        generator = torch.Generator().manual_seed(
            self.seed + (self.epoch * len(self) + index) * 1_000_003
        )
        pair["input_ids"], pair["labels"] = self._mask(pair["input_ids"], generator)
        return pair

    def _mask(
        self, ids: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ids and labels `[S]`: of the chosen tokens 80% are masked, 10% are others, 10%
        stay.
        """
        words = (~torch.isin(ids, self.special)).nonzero().flatten()
        count = max(1, round(MASKED_SHARE * len(words)))
        chosen = words[torch.randperm(len(words), generator=generator)[:count]]
        labels = torch.full_like(ids, IGNORED)
        labels[chosen] = ids[chosen]
        chance = torch.rand(count, generator=generator)
        others = torch.randint(len(self.tokenizer), (count,), generator=generator)
        ids = ids.clone()
        ids[chosen] = torch.where(chance < 0.9, others, ids[chosen])
        ids[chosen[chance < 0.8]] = self.tokenizer.mask_token_id
        return ids, labels


def collate(rows: list[Row], pad_token_id: int) -> Row:
    """Stacks pairs of different lengths; padding is on the right, has no label and is not attended
    to.
    """
    fill = {"input_ids": pad_token_id, "token_type_ids": 0, "labels": IGNORED}
    batch = {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
        for name, value in fill.items()
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    batch["next_sentence_label"] = torch.stack([row["next_sentence_label"] for row in rows])
    return batch


def make_loaders(args: Any) -> tuple[Any, DataLoader[Row], DataLoader[Row]]:
    """Returns the tokenizer, the training loader and the one of held-out pairs."""
    tokenizer = AutoTokenizer.from_pretrained(args.vocab_path)
    dataset = load_from_disk(args.data_path)
    training = MaskedPairs(dataset["train"], tokenizer, args.seed)
    held_out = MaskedPairs(dataset["held_out"], tokenizer, args.seed, is_fixed=True)
    as_batch = partial(collate, pad_token_id=tokenizer.pad_token_id)
    return (
        tokenizer,
        DataLoader(
            training, batch_size=args.batch_size, shuffle=True, drop_last=True, collate_fn=as_batch
        ),
        DataLoader(held_out, batch_size=args.batch_size, collate_fn=as_batch),
    )
