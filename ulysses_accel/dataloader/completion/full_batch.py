"""A complete batch before it is sharded, and each rank's part of it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ulysses_accel.dataloader.batch_layout import BatchLayout, ShardFunction
from ulysses_accel.dataloader.keys import DECODER
from ulysses_accel.errors import BatchError
from ulysses_accel.sequence.description import DESCRIPTION_KEY, SequenceDescription
from ulysses_accel.sequence.sharding import shard


@dataclass(frozen=True)
class FullBatch:
    """A complete batch before it is sharded.

    Args:
        tensors: padded, on all of the sequence, in the order of the shards.
        dims: for each tensor its sequence dim, None when every rank gets all of it.
        extras: everything that is no tensor.
        description: of the full sequence; of the decoder's, with the encoder's in it, where there
            are both.
        overrides: one rank's part of the tensors that the user's functions shard.
    """

    tensors: dict[str, Tensor]
    dims: dict[str, int | None]
    extras: dict[str, Any]
    description: SequenceDescription
    overrides: dict[str, Tensor] = field(default_factory=dict)

    def shard(self, rank: int) -> dict[str, Tensor]:
        """Returns one rank's part of every tensor, as views."""
        parts = {}
        for name, tensor in self.tensors.items():
            dim = self.dims[name]
            # [B, S, ...] -> [B, S/P, ...]
            parts[name] = (
                tensor if dim is None else shard(tensor, self.description.num_shards, rank, dim)
            )
        return {**parts, **self.overrides}

    def with_functions(self, layout: BatchLayout, rank: int) -> FullBatch:
        """Returns the batch with one rank's part of the tensors that the user's functions shard.

        Args:
            layout: its `batch_schema` has the functions.
            rank: of this process in its sequence group.

        Raises:
            BatchError: a function returned no tensor.
        """
        overrides = {}
        for name, rule in layout.batch_schema.items():
            if callable(rule) and name in self.tensors:
                overrides[name] = self._part(name, rule, rank)
        return replace(self, overrides=overrides) if overrides else self

    def _part(self, name: str, function: ShardFunction, rank: int) -> Tensor:
        part = function(self.tensors[name], self.description, rank)
        if not isinstance(part, Tensor):
            raise BatchError(
                f"the function of batch_schema[{name!r}] returned a {type(part).__name__}. Return "
                "this rank's tensor."
            )
        return part

    def local_batch(self, rank: int) -> dict[str, Any]:
        """Returns what one rank's model gets: its shards, the non-tensors, and the description."""
        return {**self.extras, **self.shard(rank), DESCRIPTION_KEY: self.description}

    def checksum(self) -> int:
        """Returns crc32 of the description and all integer tensors, which tells if two ranks drew
        the same batch.
        """
        value = zlib.crc32(repr(self.description).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            is_exact = not tensor.is_floating_point() and not tensor.is_complex()
            if is_exact or self._stands_for_ids(name):
                data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
                value = zlib.crc32(data.numpy().data, value)
        return value

    def _stands_for_ids(self, name: str) -> bool:
        """Returns whether a tensor holds the embeddings of tokens whose ids the batch lacks."""
        is_embeddings = name.removeprefix(DECODER) == "inputs_embeds"
        return is_embeddings and name.replace("inputs_embeds", "input_ids") not in self.tensors
