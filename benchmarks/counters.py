"""Exact counters at the dispatcher: collectives, bytes sent, bytes copied, peak live bytes.

Everything is counted from the operations that torch dispatches, forward and backward, so that a
library is measured by what it does and not by what it reports. Conventions:

- *bytes sent*: payload bytes that leave the rank (its own part excluded); an all-reduce counts as
  the ring's `2 (P - 1) / P` of its input, a reduce-scatter as `(P - 1) / P`, an all-gather as `P -
  1` times its input.
- *bytes copied*: bytes written by any operation except views, bare allocations, collectives, and
  the attention operator itself (`aten::_scaled_dot_product_*`).
- *peak live bytes*: tensor storages born while the counter is on and still alive, at their highest.
  Scratch memory inside one operator and inside the transport is not visible, for anybody.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CORE_PREFIX = "_scaled_dot_product"
ALLOCATIONS = frozenset(
    {
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "resize_",
        "set_",
        "_local_scalar_dense",
    }
)
FUNCTIONAL = frozenset({"_c10d_functional", "_c10d_functional_autograd"})
NOT_TRANSFERS = frozenset({"wait_tensor", "_wrap_tensor_autograd", "check_for_nan"})
CPU_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


@dataclass
class Counts:
    """What one stretch of work did on one rank."""

    collectives: int = 0
    bytes_sent: int = 0
    bytes_copied: int = 0
    peak_bytes: int = 0
    operations: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return asdict(self)


class OperationCounter(TorchDispatchMode):
    """Counts while entered; `take()` returns what happened since the last `take()`.

    The peak is that of the stretch, over what was alive when the counter was entered.
    """

    def __init__(self) -> None:
        super().__init__()
        self._counts = Counts()
        self._operations: Counter[str] = Counter()
        self._live = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def take(self) -> Counts:
        """Return the counts of the stretch that ends here and start the next one."""
        counts, self._counts = self._counts, Counts(peak_bytes=self._live)
        counts.operations, self._operations = dict(self._operations), Counter()
        return counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count it."""
        kwargs = kwargs or {}
        given = _storages((args, kwargs))
        if func.namespace == "c10d" or func.namespace in FUNCTIONAL:
            result = func(*args, **kwargs)
            self._count_transfer(func, args, kwargs)
        elif func.namespace in ("aten", "prim", "prims"):
            result = func(*args, **kwargs)
            self._counts.bytes_copied += bytes_written(func, args, kwargs, result)
        else:
            # A library's own operator: what it does inside counts as well.
            with self:
                result = func.redispatch(CPU_KERNEL, *args, **kwargs)
        for tensor in _tensors(result):
            if tensor.untyped_storage()._cdata not in given:
                self._track(tensor)
        return result

    def _count_transfer(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        name = func._schema.name.split("::")[1]
        if name in NOT_TRANSFERS:
            return
        named = {
            argument.name: value for argument, value in zip(func._schema.arguments, args)
        } | kwargs
        self._counts.collectives += 1
        self._operations[f"{func.namespace}::{name}"] += 1
        self._counts.bytes_sent += bytes_sent(name, named)

    def _track(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages or not size:
            return

        def released(_: object) -> None:
            if self._storages.pop(key, None) is not None:
                self._live -= size

        self._storages[key] = weakref.ref(storage, released)
        self._live += size
        self._counts.peak_bytes = max(self._counts.peak_bytes, self._live)


def bytes_written(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> int:
    """Bytes that one aten operation writes; 0 for views, allocations and the attention operator."""
    name = func._schema.name.split("::")[1]
    if name in ALLOCATIONS or name.startswith(CORE_PREFIX):
        return 0
    if func._schema.is_mutable:
        return _nbytes(_tensors(_mutated(func, args, kwargs)))
    inputs = _storages((args, kwargs))
    return _nbytes(
        tensor for tensor in _tensors(result) if tensor.untyped_storage()._cdata not in inputs
    )


def bytes_sent(name: str, named: dict[str, Any]) -> int:
    """Payload bytes that leave this rank in one collective, by the conventions of this module."""
    group = _group(named)
    size, rank = group.size(), group.rank()
    tensors = list(_tensors(_payload(named)))
    total = _nbytes(tensors)
    root = named.get("root_rank", named.get("src", 0))
    plain = name.strip("_").replace("_", "")
    if plain.startswith("alltoall"):
        return total - _own_part(tensors, named, rank, size)
    for prefix, sent in (
        ("allgather", total * (size - 1)),
        ("allreduce", 2 * total * (size - 1) // size),
        ("reducescatter", total * (size - 1) // size),
        ("reduce", total if rank != root else 0),
        ("gather", total if rank != root else 0),
        ("scatter", total * (size - 1) // size if rank == root else 0),
        ("broadcast", total * (size - 1) if rank == root else 0),
        ("send", total),
        ("isend", total),
        ("recv", 0),
        ("irecv", 0),
        ("barrier", 0),
    ):
        if plain.startswith(prefix):
            return sent
    raise NotImplementedError(f"no rule for the bytes of {name}")


def _payload(named: dict[str, Any]) -> Any:
    for key in ("input_tensors", "input_tensor", "input", "inputs", "tensors", "tensor", "self"):
        if key in named:
            return named[key]
    raise NotImplementedError(f"no payload among {sorted(named)}")


def _own_part(tensors: list[torch.Tensor], named: dict[str, Any], rank: int, size: int) -> int:
    if len(tensors) > 1:
        return _nbytes([tensors[rank]])
    splits = named.get("input_split_sizes") or []
    (tensor,) = tensors
    if not splits:
        return _nbytes([tensor]) // size
    return _nbytes([tensor]) * int(splits[rank]) // max(sum(splits), 1)


def _group(named: dict[str, Any]) -> dist.ProcessGroup:
    if "process_group" in named:
        group: dist.ProcessGroup = dist.ProcessGroup.unbox(named["process_group"])
        return group
    name = named["group_name"]
    resolved: dist.ProcessGroup = (
        dist.distributed_c10d._resolve_process_group(name) if isinstance(name, str) else name
    )
    return (
        resolved if isinstance(resolved, dist.ProcessGroup) else dist.ProcessGroup.unbox(resolved)
    )


def _mutated(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args)} | kwargs
    return [
        named[argument.name]
        for argument in func._schema.arguments
        if argument.alias_info is not None
        and argument.alias_info.is_write
        and argument.name in named
    ]


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def _storages(value: Any) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in _tensors(value)}


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
