"""How batches are padded and sharded: what the user or the engine chose, checked once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ulysses_accel.config.batch_schema import BatchSchema, Rule
from ulysses_accel.errors import ConfigError
from ulysses_accel.sequence.description import SequenceDescription
from ulysses_accel.sequence.labels import IGNORE_INDEX
from ulysses_accel.sequence.layout import Layout, multiple_of
from ulysses_accel.sequence.sharding import next_multiple

ShardFunction = Callable[[Tensor, SequenceDescription, int], Tensor]
"""Takes a key's full tensor as the collate function returned it, the batch's description (padded
length, ranks, layout) and this process's rank in the sequence group; returns what this rank's model
gets."""

# Positions, documents and shifted labels are made of these before the batch is sharded.
_NEEDED_IN_FULL = frozenset(
    {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "shift_labels"}
)


@dataclass(frozen=True)
class BatchLayout:
    """How batches are padded and sharded.

    Args:
        num_shards: ranks P that share a sequence.
        sequence_length: the fixed length that every batch is padded to; None lets it vary. With an
            encoder and a decoder both are padded to it.
        pad_multiple: a further number that the padded length must be a multiple of.
        batch_schema: for keys of your own, "shard" (second dim), "replicate", the number of the dim
            to shard, or a function that shards, see `ShardFunction`.
        ignore_index: the label that doesn't count.
        pad_token_id: pads `input_ids`.
        ring_size: size of the ring; each of its members is a group of P / ring_size Ulysses ranks.
        ring_layout: how the tokens are distributed over the ring.

    Raises:
        ConfigError: a value is not legal.
    """

    num_shards: int
    sequence_length: int | None = None
    pad_multiple: int | None = None
    batch_schema: Mapping[str, Rule] = field(default_factory=dict)
    ignore_index: int = IGNORE_INDEX
    pad_token_id: int = 0
    ring_size: int = 1
    ring_layout: Layout = "contiguous"

    def __post_init__(self) -> None:
        if self.num_shards < 1:
            raise ConfigError(
                f"sp_world_size={self.num_shards} is not a number of ranks. Use 1 or more."
            )
        if self.pad_multiple is not None and self.pad_multiple < 1:
            raise ConfigError(
                f"pad_multiple={self.pad_multiple} is not a number of tokens. Use 1 or more, or "
                "None."
            )
        fixed = self.sequence_length
        if fixed is not None and (fixed < 1 or fixed % self.multiple):
            raise ConfigError(
                f"sequence_length={fixed} is not a multiple of {self.multiple} "
                f"(sp_world_size={self.num_shards}, "
                f"pad_multiple={self.pad_multiple}). Use "
                f"{next_multiple(max(fixed, 1), self.multiple)}."
            )
        try:
            object.__setattr__(self, "batch_schema", BatchSchema(self.batch_schema))
        except ValueError as error:
            raise ConfigError(f"batch_schema {error}") from None
        for key, rule in self.batch_schema.items():
            if callable(rule) and key.removeprefix("decoder_") in _NEEDED_IN_FULL:
                raise ConfigError(
                    f"batch_schema[{key!r}] is a function, but positions, documents and labels are "
                    f"made of '{key}' before it is sharded. Give a function for keys of your own "
                    "only."
                )

    @property
    def multiple(self) -> int:
        """What the padded length is a multiple of."""
        of_layout = multiple_of(self.ring_size, self.ring_layout, self.num_shards // self.ring_size)
        return math.lcm(of_layout, self.pad_multiple or 1)
