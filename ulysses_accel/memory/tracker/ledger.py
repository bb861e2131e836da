"""The books of the allocation tracker: which storages are alive, and what they are for."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, UntypedStorage

from ulysses_accel import _private_api
from ulysses_accel.memory.tracker.report import Allocations, Tally


@dataclass(eq=False)
class Block:
    """One storage.

    Args:
        reference: to the storage, which the books must not keep alive.
        device: the type of its device.
        module: the module that allocated it.
        base_bytes: bytes that it had before the tracker started.
        size: bytes that it has.
        kind: parameters, gradients or temporary.
        num_saved: how many tensors that are saved for backward lie in it.
        parameter: the parameter that lies in it.
    """

    reference: weakref.ref[UntypedStorage]
    device: str
    module: str
    base_bytes: int
    size: int
    kind: str = "temporary"
    num_saved: int = 0
    parameter: weakref.ref[Tensor] | None = None

    @property
    def counted(self) -> int:
        return max(0, self.size - self.base_bytes)

    @property
    def kind_now(self) -> str:
        return "saved" if self.kind == "temporary" and self.num_saved else self.kind


def storages(tensor: Tensor) -> list[UntypedStorage]:
    """Returns the storages of a tensor; those of a wrapper's inner tensors, and none where there is
    no storage.
    """
    if _private_api.is_wrapper(tensor):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        inner = [getattr(tensor, name) for name in names]
        return [storage for part in inner if isinstance(part, Tensor) for storage in storages(part)]
    return [tensor.untyped_storage()] if tensor.layout == torch.strided else []


class Ledger:
    """Books every storage once, for as long as it lives.

    Args:
        report: where the sums are kept.
    """

    def __init__(self, report: Allocations) -> None:
        self.report = report
        self.blocks: dict[int, Block] = {}
        self.closed = False
        self._at_peak: tuple[dict[str, int], dict[str, int]] = ({}, {})

    def find(self, storage: UntypedStorage) -> Block | None:
        """Returns a storage's block, brought up to date with its size."""
        block = self.blocks.get(_private_api.storage_key(storage))
        if block is not None and block.size != storage.nbytes():
            self._resize(block, storage.nbytes())
        return block

    def add(self, storage: UntypedStorage, module: str, *, resident: bool) -> Block:
        """Books a storage, as allocated by `module` now or as there before."""
        size, key = storage.nbytes(), _private_api.storage_key(storage)
        reference = weakref.ref(storage, partial(self._died, key))
        block = Block(
            reference, storage.device.type, module, size if resident else 0, size if resident else 0
        )
        self.blocks[key] = block
        if not resident:
            self._resize(block, size)
        return block

    def note(self, tensor: Tensor, kind: str) -> None:
        """Marks a tensor's storages as parameters or gradients."""
        for storage in storages(tensor):
            block = self.find(storage) or self.add(storage, "", resident=True)
            self._rebook(block, kind=kind)
            if kind == "parameters":
                block.parameter = weakref.ref(tensor)

    def exclude(self, tensor: Tensor) -> None:
        """Takes a tensor's storages out of the count, as if they had been there before."""
        for storage in storages(tensor):
            block = self.find(storage)
            if block is None:
                self.add(storage, "", resident=True)
            else:
                self._charge(block, -block.counted)
                block.base_bytes = block.size

    def save(self, block: Block, change: int) -> None:
        """Books that a tensor in the block was saved for backward (+1), or released (-1)."""
        if self.closed:
            return
        was = block.num_saved
        self._rebook(block, num_saved=was + change)
        if block.kind == "temporary" and (was == 0) != (block.num_saved == 0):
            self.report.saved_bytes += block.size if was == 0 else -block.size
            self.report.peak_saved_bytes = max(
                self.report.peak_saved_bytes, self.report.saved_bytes
            )

    def check_peak(self, operation: str, module: str, phase: str) -> None:
        """Keeps the highest live bytes and what they were made of."""
        report = self.report
        if report.live_bytes <= min(report.peak_bytes, report.peak_by_phase[phase]):
            return
        # Storages that were resized behind the dispatcher's back, as FSDP2 does, are seen only
        # here.
        for block in list(self.blocks.values()):
            storage = block.reference()
            if storage is not None and storage.nbytes() != block.size:
                self._resize(block, storage.nbytes())
        report.peak_by_phase[phase] = max(report.peak_by_phase[phase], report.live_bytes)
        if report.live_bytes > report.peak_bytes:
            report.peak_bytes, report.peak_operation, report.peak_module = (
                report.live_bytes,
                operation,
                module,
            )
            self._at_peak = (_live(report.by_kind), _live(report.by_module))

    def reset_peak(self) -> None:
        """Forgets the peaks so far."""
        report = self.report
        report.peak_bytes, report.peak_saved_bytes = report.live_bytes, report.saved_bytes
        report.peak_by_phase = dict.fromkeys(report.peak_by_phase, 0)
        for tally in (*report.by_kind.values(), *report.by_module.values()):
            tally.peak = tally.live
        self._at_peak = (_live(report.by_kind), _live(report.by_module))

    def write_shares(self) -> None:
        """Writes into the report what the peak was made of."""
        for tallies, shares in zip(
            (self.report.by_kind, self.report.by_module), self._at_peak, strict=True
        ):
            for name, tally in tallies.items():
                tally.at_peak = shares.get(name, 0)

    def module(self, name: str) -> Tally:
        """Returns a module's tally."""
        return self.report.by_module.setdefault(name, Tally())

    def _rebook(
        self, block: Block, *, kind: str | None = None, num_saved: int | None = None
    ) -> None:
        """Moves a block's bytes to the kind that it has now."""
        self._charge(block, -block.counted)
        if block.num_saved and block.kind == "temporary" and kind not in (None, "temporary"):
            self.report.saved_bytes -= block.size
        block.kind = kind or block.kind
        block.num_saved = block.num_saved if num_saved is None else num_saved
        self._charge(block, block.counted)

    def _resize(self, block: Block, size: int) -> None:
        before = block.counted
        if block.num_saved and block.kind == "temporary":
            self.report.saved_bytes += size - block.size
        block.size = size
        change = block.counted - before
        self._charge(block, change)
        if change > 0 and block.device == self.report.device:
            self.report.allocated_bytes += change
            self.module(block.module).allocated += change

    def _charge(self, block: Block, change: int) -> None:
        if self.closed or not change:
            return
        if block.device != self.report.device:
            tallies = [self.report.other_devices.setdefault(block.device, Tally())]
        else:
            self.report.live_bytes += change
            tallies = [self.report.by_kind[block.kind_now], self.module(block.module)]
        for tally in tallies:
            tally.live += change
            tally.peak = max(tally.peak, tally.live)

    def _died(self, key: int, reference: weakref.ref[UntypedStorage]) -> None:
        block = self.blocks.get(key)
        # The address may have been given to another storage before this call came.
        if block is not None and block.reference is reference:
            del self.blocks[key]
            self._charge(block, -block.counted)


def _live(tallies: dict[str, Tally]) -> dict[str, int]:
    return {name: tally.live for name, tally in tallies.items() if tally.live}
