"""Moves the shards of each rank's batch to the ranks that will hold them: one all-to-all of bytes
per refill.

Rank i shards its batch and sends shard j, with the description and the non-tensor entries, to rank
j; no rank ever holds another rank's full batch. All sizes follow from the headers that were agreed
on before. Non-tensors travel as JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ulysses_accel.dataloader.agreement import REPLICATED, Entry, Header, key_code, make_entries
from ulysses_accel.dataloader.completion.full_batch import FullBatch
from ulysses_accel.distributed.consensus import contact, wire_device
from ulysses_accel.errors import BatchError
from ulysses_accel.sequence.description import DESCRIPTION_KEY, SequenceDescription


def entries_of(full: FullBatch) -> tuple[Entry, ...]:
    """Returns the header's entries of a batch: shapes are those of the full, padded batch."""
    return make_entries({name: _kind(full, name) for name in full.tensors})


def keys_text(full: FullBatch, with_shapes: bool) -> str:
    """Returns the batch's tensors as `'input_ids' int64 [1, 8], ...` for the message when ranks
    disagree.
    """
    parts = []
    for name in sorted(full.tensors):
        dtype, dim, shape = _kind(full, name)
        size = "[" + " x ".join(map(str, shape)) + "]" if with_shapes else f"{len(shape)}-D"
        where = "replicated" if dim == REPLICATED else f"sharded on dim {dim}"
        parts.append(f"'{name}' {str(dtype).removeprefix('torch.')} {size} {where}")
    return ", ".join(parts)


def _kind(full: FullBatch, name: str) -> tuple[torch.dtype, int, tuple[int, ...]]:
    tensor, dim = full.tensors[name], full.dims[name]
    return tensor.dtype, REPLICATED if dim is None else dim, tuple(tensor.shape)


def encode_side(full: FullBatch) -> bytes:
    """Returns what goes with the tensors, as JSON: the description and the non-tensor entries.

    Raises:
        BatchError: an entry is no tensor and nothing that JSON has.
    """
    for name, value in full.extras.items():
        _check_plain(name, value)
    side = {
        "keys": sorted(full.tensors, key=key_code),
        "description": _plain_description(full.description),
        "extras": full.extras,
    }
    return json.dumps(side, separators=(",", ":")).encode()


def _plain_description(description: SequenceDescription | None) -> dict[str, Any] | None:
    """Returns a description as JSON has it."""
    if description is None:
        return None
    named = {one.name: getattr(description, one.name) for one in fields(description) if one.compare}
    return {**named, "encoder": _plain_description(description.encoder)}


def _description(plain: Any) -> SequenceDescription | None:
    """Returns the description that `_plain_description` wrote: JSON has lists where it has
    tuples.
    """
    if plain is None:
        return None
    nested = {name: _as_tuple(plain[name]) for name in ("rows", "holes", "prefixes")}
    return SequenceDescription(**{**plain, **nested, "encoder": _description(plain["encoder"])})


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _check_plain(name: str, value: Any) -> None:
    if value is None or type(value) in (bool, int, float, str):
        return
    if type(value) in (list, tuple):
        for item in value:
            _check_plain(name, item)
        return
    if type(value) is dict and all(type(key) is str for key in value):
        for item in value.values():
            _check_plain(name, item)
        return
    raise BatchError(
        f"the batch's entry '{name}' holds a {type(value).__name__}, which is not sent to other "
        "ranks. Only tensors, "
        "strings, numbers, booleans, None, and lists or string-keyed dicts of these are. Drop it "
        "or make it a tensor."
    )


def exchange(
    full: FullBatch | None,
    side: bytes,
    headers: Sequence[Header],
    group: dist.ProcessGroup | None,
) -> list[dict[str, Any] | None]:
    """Returns this rank's part of every rank's batch, on the host, in rank order.

    Args:
        full: this rank's batch, None when it has none to give.
        side: its description and non-tensors, from `encode_side`.
        headers: of all ranks.
        group: the ranks; None for this process alone.

    Returns:
        One batch for each rank; None for ranks without one.
    """
    parts = len(headers)
    outgoing = [_pack(full, side, other) if full is not None else _EMPTY for other in range(parts)]
    sizes = [_incoming_bytes(header, parts) for header in headers]
    incoming = _all_to_all(outgoing, sizes, group)
    return [
        _unpack(data, header, parts) if header.entries else None
        for data, header in zip(incoming, headers)
    ]


_EMPTY = torch.empty(0, dtype=torch.uint8)


def _pack(full: FullBatch, side: bytes, rank: int) -> Tensor:
    parts = full.shard(rank)
    ordered = sorted(parts, key=key_code)
    pieces = [
        parts[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8) for name in ordered
    ]
    pieces.append(torch.frombuffer(bytearray(side), dtype=torch.uint8))
    return torch.cat(pieces)


def _local_shape(entry: Entry, parts: int) -> tuple[int, ...]:
    return tuple(
        size // parts if dim == entry.dim else size for dim, size in enumerate(entry.shape)
    )


def _incoming_bytes(header: Header, parts: int) -> int:
    tensors = sum(
        math.prod(_local_shape(entry, parts)) * entry.dtype.itemsize for entry in header.entries
    )
    return tensors + header.side_bytes


def _all_to_all(
    outgoing: Sequence[Tensor], sizes: Sequence[int], group: dist.ProcessGroup | None
) -> list[Tensor]:
    if group is None:
        return list(outgoing)
    device = wire_device(group)
    received = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    sent = torch.cat(list(outgoing)).to(device)
    with contact(group):
        dist.all_to_all_single(
            received, sent, list(sizes), [piece.numel() for piece in outgoing], group=group
        )
    return list(torch.split(received.cpu(), list(sizes)))


def _unpack(data: Tensor, header: Header, parts: int) -> dict[str, Any]:
    side = json.loads(bytes(data[data.numel() - header.side_bytes :].tolist()))
    batch: dict[str, Any] = side["extras"]
    start = 0
    for name, entry in zip(side["keys"], header.entries):
        shape = _local_shape(entry, parts)
        stop = start + math.prod(shape) * entry.dtype.itemsize
        # A copy, because a view of another dtype must start at a multiple of its size.
        batch[name] = data[start:stop].clone().view(entry.dtype).reshape(shape)
        start = stop
    batch[DESCRIPTION_KEY] = _description(side["description"])
    return batch
