"""Counts allocated bytes, copies, matrix products and attention calls, by module and by kind, on
CPU and CUDA.

A dispatch mode sees every operator's outputs; a weak reference to each storage tells when it is
freed. Memory that a kernel allocates internally is not seen, except in `allocator_peak_bytes` on
CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn

from ulysses_accel import _private_api
from ulysses_accel.memory.tracker.ledger import Block, Ledger, storages
from ulysses_accel.memory.tracker.modules import ModulePlaces
from ulysses_accel.memory.tracker.report import Allocations, Tally

_COPIES = {
    "_foreach_copy_",
    "_pin_memory",
    "_to_copy",
    "cat",
    "clone",
    "constant_pad_nd",
    "copy_",
    "index",
    "index_copy_",
    "index_select",
    "repeat",
    "select_scatter",
    "slice_scatter",
    "split_with_sizes_copy",
    "stack",
}
# Names of operators, and the index of the left factor among their arguments.
_PRODUCTS = {
    "_addmm_activation": 1,
    "_grouped_mm": 0,
    "_scaled_mm": 0,
    "addbmm": 1,
    "addmm": 1,
    "addmm_": 1,
    "addmv": 1,
    "baddbmm": 1,
    "baddbmm_": 1,
    "bmm": 0,
    "linear": 0,
    "mm": 0,
    "mv": 0,
}
_ATTENTION = (
    "_scaled_dot_product_",
    "_flash_attention_",
    "_efficient_attention_",
    "_cudnn_attention_",
    "flex_attention",
)


class AllocationTracker(Allocations):
    """The report of `track_allocations`, and the tracker's controls while it runs."""

    _ledger: Ledger

    def reset_peak(self) -> None:
        """Resets the peaks, so that they are those of what follows."""
        self._ledger.reset_peak()

    def exclude(self, tensor: Tensor) -> None:
        """Stops counting a tensor, for example a host buffer where the device is the CPU.

        Args:
            tensor: any tensor; its whole storage is not counted any more.
        """
        self._ledger.exclude(tensor)


@contextmanager
def track_allocations(
    model: nn.Module | None = None,
    *,
    unit_bytes: int | None = None,
    device: torch.device | str | None = None,
    saved: bool = True,
) -> Iterator[AllocationTracker]:
    """Counts what is allocated inside of it, in forward and backward.

    Backward's operators are seen on CPU, which runs them in the calling thread, and on CUDA, where
    autograd carries the dispatch mode to its own thread. Names of modules in backward are right
    where the graph was built in the calling thread; what a reentrant checkpoint recomputes on CUDA
    is counted for the module around it.

    Args:
        model: whose modules, parameters and gradients are told apart; None for none.
        unit_bytes: bytes of one u, for reports.
        device: whose bytes are counted; default: the model's device, or the CPU.
        saved: whether to count what autograd saves for backward, by saved-tensor hooks; False where
            these are not allowed. What torch's checkpoint holds while it recomputes, under its own
            hooks, is counted as temporary.

    Yields:
        The report, up to date at any time; `table()` returns it as text.
    """
    followed = torch.device(device) if device is not None else _device_of(model)
    report = AllocationTracker(device=followed.type, unit_bytes=unit_bytes)
    ledger = report._ledger = Ledger(report)
    places = ModulePlaces(model, ledger)
    resident = (block for block in ledger.blocks.values() if block.device == followed.type)
    report.resident_bytes = sum(block.size for block in resident)
    before = _reset_allocator(followed)
    mode = _TrackingMode(ledger, places)
    with ExitStack() as stack:
        stack.callback(_finish, report, places, followed, before)
        if saved:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(mode.pack, _unpack))
        stack.enter_context(mode)
        yield report


def _device_of(model: nn.Module | None) -> torch.device:
    parameter = next(model.parameters(), None) if model is not None else None
    return parameter.device if parameter is not None else torch.device("cpu")


def _reset_allocator(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _finish(
    report: AllocationTracker, places: ModulePlaces, device: torch.device, before: int
) -> None:
    places.remove()
    report._ledger.closed = True
    report._ledger.write_shares()
    if device.type == "cuda":
        report.allocator_peak_bytes = torch.cuda.max_memory_allocated(device) - before


class _Saved:
    """A tensor that is saved for backward; counted as such for as long as the graph holds it."""

    def __init__(self, tensor: Tensor, ledger: Ledger, blocks: list[Block]) -> None:
        self.tensor, self._ledger, self._blocks = tensor, ledger, blocks
        for block in blocks:
            ledger.save(block, 1)

    def __del__(self) -> None:
        for block in self._blocks:
            self._ledger.save(block, -1)


def _unpack(saved: _Saved) -> Tensor:
    return saved.tensor.detach() if isinstance(saved.tensor, nn.Parameter) else saved.tensor


class _TrackingMode(_private_api.dispatch_mode()):  # type: ignore[misc]
    """Counts the outputs of every operator."""

    supports_higher_order_operators = True

    def __init__(self, ledger: Ledger, places: ModulePlaces) -> None:
        super().__init__()
        self._ledger = ledger
        self._places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A wrapper subclass's own dispatch calls this mode again with its inner tensors.
        if any(_private_api.is_wrapper_class(kind) for kind in types):
            return NotImplemented
        output = func(*args, **(kwargs or {}))
        tensors = _tensors_in(output)
        module, phase = self._places.current()
        name = getattr(getattr(func, "overloadpacket", func), "__name__", str(func))
        for tensor in tensors:
            for storage in storages(tensor):
                if self._ledger.find(storage) is None:
                    self._ledger.add(storage, module, resident=_is_input(storage, args, kwargs))
        self._count(name, module, tensors, args)
        self._ledger.check_peak(name, module, phase)
        return output

    def _count(self, name: str, module: str, outputs: list[Tensor], args: Any) -> None:
        report, tally = self._ledger.report, self._ledger.module(module)
        if name in _COPIES:
            # An operator without outputs, such as _foreach_copy_, writes to its first argument.
            for tensor in outputs or _tensors_in(args[:1]):
                self._count_copy(tensor, tally)
        elif name in _PRODUCTS:
            left = args[_PRODUCTS[name]]
            # Every element of the left factor is multiplied once for each column of the output.
            columns = 1 if name in ("mv", "addmv") else outputs[0].shape[-1]
            report.matmul_calls += 1
            report.matmul_flops += 2 * left.numel() * columns
            tally.matmul_flops += 2 * left.numel() * columns
        elif name.startswith(_ATTENTION):
            if "backward" in name:
                report.attention_backward_calls += 1
            else:
                report.attention_forward_calls += 1

    def _count_copy(self, written: Tensor, tally: Tally) -> None:
        if written.device.type != self._ledger.report.device:
            return
        copied = written.numel() * written.element_size()
        self._ledger.report.copied_bytes += copied
        tally.copied += copied
        for block in filter(None, map(self._ledger.find, storages(written))):
            self._ledger.report.by_kind[block.kind_now].copied += copied

    def pack(self, tensor: Tensor) -> _Saved:
        """Counts a tensor that autograd saves."""
        blocks = [
            self._ledger.find(storage) or self._ledger.add(storage, "", resident=True)
            for storage in storages(tensor)
        ]
        parameter = None
        if len(blocks) == 1 and blocks[0].parameter is not None:
            parameter = blocks[0].parameter()
        if parameter is not None and _is_same_view(parameter, tensor):
            # ZeRO-3 frees a gathered parameter by replacing its storage: an alias would keep the
            # gathered storage alive.
            tensor = parameter
        elif tensor.grad_fn is not None:
            # A node that saves its own output would hold itself.
            tensor = tensor.detach()
        return _Saved(tensor, self._ledger, blocks)


def _is_same_view(parameter: Tensor, tensor: Tensor) -> bool:
    return parameter.shape == tensor.shape and parameter.stride() == tensor.stride()


def _tensors_in(value: Any) -> list[Tensor]:
    # Most operators have one output: flattening would cost more than the rest of the dispatch.
    if isinstance(value, Tensor):
        return [value]
    return [leaf for leaf in _private_api.tree_leaves(value) if isinstance(leaf, Tensor)]


def _is_input(storage: UntypedStorage, args: Any, kwargs: Any) -> bool:
    """Returns whether an operator's output is in the storage of one of its inputs, and so was
    allocated before.
    """
    key = _private_api.storage_key(storage)
    for value in _private_api.tree_leaves((args, kwargs)):
        parts: list[Any] = []
        if isinstance(value, Tensor):
            parts = storages(value)
        elif isinstance(value, UntypedStorage | torch.TypedStorage):
            parts = [value]
        if any(_private_api.storage_key(part) == key for part in parts):
            return True
    return False
