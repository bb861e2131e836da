"""Batches of every kind, each as a user's loader gives it and as one process needs it to compute
the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.helpers.models import VOCAB

IGNORE = -100
LENGTH = 16


@dataclass(frozen=True)
class Sample:
    """One batch.

    Args:
        batch: what the user's loader yields.
        plain: what one process is given; here a document's first token is no label, which a sharded
            loader must see to by itself.
        documents: each row's documents as (start, stop).
    """

    batch: dict[str, Tensor]
    plain: dict[str, Any]
    documents: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def num_tokens(self) -> int:
        """Counted labels."""
        return int((self.plain["labels"][:, 1:] != IGNORE).sum())


def make(
    seed: int,
    documents: Sequence[Sequence[tuple[int, int]]],
    length: int = LENGTH,
    masked: Callable[[Tensor], None] | None = None,
) -> Sample:
    """Returns random tokens in the given documents; tokens in none are padding, packing is told by
    positions.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (len(documents), length), generator=generator)
    labels = ids.clone()
    if masked is not None:
        masked(labels)
    positions = torch.arange(length).repeat(len(documents), 1)
    valid = torch.zeros_like(ids)
    plain_labels = torch.full_like(labels, IGNORE)
    for row, segments in enumerate(documents):
        for start, stop in segments:
            valid[row, start:stop] = 1
            plain_labels[row, start + 1 : stop] = labels[row, start + 1 : stop]
            if len(segments) > 1:
                positions[row, start:stop] = torch.arange(stop - start)
    batch, plain = {"input_ids": ids, "labels": labels}, {"input_ids": ids, "labels": plain_labels}
    if any(len(segments) > 1 for segments in documents):
        # transformers finds packed documents in the positions, when it has neither mask nor cache.
        extra = {"position_ids": positions}
    elif int(valid.min()) == 0:
        labels[valid == 0] = IGNORE
        extra = {"attention_mask": valid}
    else:
        extra = {}
    return Sample(
        {**batch, **extra}, {**plain, **extra, "use_cache": False}, tuple(map(tuple, documents))
    )


def _one(seed: int) -> Sample:
    return make(seed, [[(0, LENGTH)]] * 2)


def _ignore(start: int | None, stop: int | None) -> Callable[[Tensor], None]:
    def masked(labels: Tensor) -> None:
        labels[:, start:stop] = IGNORE

    return masked


def _group_masked(seed: int) -> Sample:
    return make(seed, [[(0, LENGTH)]] * 2, masked=_ignore(None, None) if seed % 2 else None)


HALF = LENGTH // 2
# By name, from a seed; data parallel ranks get different seeds.
CASES: dict[str, Callable[[int], Sample]] = {
    "plain": _one,
    # Documents over shard edges (4, 8, 12), one-token documents, one that ends at an edge.
    "packed": lambda seed: make(
        seed, [[(0, 5), (5, 6), (6, 13), (13, 16)], [(0, 1), (1, 8), (8, 15), (15, 16)]]
    ),
    "padded right": lambda seed: make(seed, [[(0, 10)], [(0, 16)], [(0, 3)]]),
    "padded left": lambda seed: make(seed, [[(6, 16)], [(0, 16)], [(13, 16)]]),
    "prompt masked": lambda seed: make(seed, [[(0, LENGTH)]] * 2, masked=_ignore(None, 6)),
    "first ranks masked": lambda seed: make(
        seed, [[(0, LENGTH)]] * 2, masked=_ignore(None, HALF + 1)
    ),
    "last ranks masked": lambda seed: make(
        seed, [[(0, LENGTH)]] * 2, masked=_ignore(HALF + 1, None)
    ),
    "odd length": lambda seed: make(seed, [[(0, 19)]] * 2, length=19),
    "odd packed": lambda seed: make(seed, [[(0, 7), (7, 21)]], length=21),
    "one row": lambda seed: make(seed, [[(0, 24)]], length=24),
    "five rows": lambda seed: make(seed, [[(0, 12)]] * 5, length=12),
}
# One process without a counted label gives NaN, so there is nothing to compare but zeros.
MASKED_CASES: dict[str, Callable[[int], Sample]] = {
    "all masked": lambda seed: make(seed, [[(0, LENGTH)]] * 2, masked=_ignore(None, None)),
    "a group masked": _group_masked,
}


def _first(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return samples[0]


def loader(samples: Sequence[Sample], plain: bool = False) -> DataLoader[Any]:
    """Returns a loader whose every batch is one sample, so that data parallel rank r of n draws r,
    r + n, ...
    """
    batches: Any = [sample.plain if plain else sample.batch for sample in samples]
    return DataLoader(batches, batch_size=1, collate_fn=_first)
