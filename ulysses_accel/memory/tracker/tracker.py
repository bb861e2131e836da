"""Counts allocated bytes, copies, matrix products and attention calls, by module and by kind, on
CPU and CUDA.

A dispatch mode sees every operator's outputs; a weak reference to a storage tells when it is gone.
What a kernel allocates inside of itself is not seen: on CUDA `allocator_peak_bytes` has it.
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
    *(
        "copy_",
        "clone",
        "_to_copy",
        "cat",
        "stack",
        "index_select",
        "index",
        "constant_pad_nd",
        "repeat",
    ),
    *(
        "_foreach_copy_",
        "split_with_sizes_copy",
        "slice_scatter",
        "select_scatter",
        "index_copy_",
        "_pin_memory",
    ),
}
# Operator to the place of its left factor; the right one follows it.
_PRODUCTS = {
    **{"mm": 0, "bmm": 0, "_grouped_mm": 0, "_scaled_mm": 0, "mv": 0, "linear": 0},
    **{
        "addmm": 1,
        "addmm_": 1,
        "baddbmm": 1,
        "baddbmm_": 1,
        "addbmm": 1,
        "addmv": 1,
        "_addmm_activation": 1,
    },
}
_ATTENTION = (
    "_scaled_dot_product_",
    "_flash_attention_",
    "_efficient_attention_",
    "_cudnn_attention_",
    "flex_attention",
)


class AllocationTracker(Allocations):
    """The report, and what can be asked of the tracker while it runs."""

    _ledger: Ledger

    def reset_peak(self) -> None:
        """Forgets the peaks so far, so that the next one is that of what follows."""
        self._ledger.reset_peak()

    def exclude(self, tensor: Tensor) -> None:
        """Takes a tensor out of the count, for example a host buffer where host and device are the
        same.

        Args:
            tensor: any tensor; its whole storage is taken out.
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
    """Counts what is allocated inside of it, forward and backward.

    Backward's operators are seen on CPU, which runs them in the calling thread, and on CUDA, where
    autograd takes the mode along to its own thread. Names of modules in backward are right where
    the graph was built in the calling thread; what a reentrant checkpoint builds anew on CUDA
    counts for the module around it.

    Args:
        model: its modules are told apart, and its parameters and gradients known.
        unit_bytes: bytes of one u, for reports.
        device: whose bytes to follow; default: the model's, or the CPU.
        saved: count what autograd saves for backward, by saved-tensor hooks. False where these are
            not allowed. What torch's checkpoint holds while it recomputes, under hooks of its own,
            counts as temporary.

    Yields:
        The report, up to date while it runs; its `table()` is for reading.
    """
    followed = torch.device(device) if device is not None else _device_of(model)
    report = AllocationTracker(device=followed.type, unit_bytes=unit_bytes)
    ledger = report._ledger = Ledger(report)
    places = ModulePlaces(model, ledger)
    resident = (block for block in ledger.blocks.values() if block.device == followed.type)
    report.resident_bytes = sum(block.size for block in resident)
    before = _reset_allocator(followed)
    mode = _Watch(ledger, places)
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
    """A tensor that is saved for backward, in the books for as long as the graph holds it."""

    def __init__(self, tensor: Tensor, ledger: Ledger, blocks: list[Block]) -> None:
        self.tensor, self._ledger, self._blocks = tensor, ledger, blocks
        for block in blocks:
            ledger.save(block, 1)

    def __del__(self) -> None:
        for block in self._blocks:
            self._ledger.save(block, -1)


def _unpack(saved: _Saved) -> Tensor:
    return saved.tensor.detach() if isinstance(saved.tensor, nn.Parameter) else saved.tensor


class _Watch(_private_api.dispatch_mode()):  # type: ignore[misc]
    """Books the outputs of every operator."""

    supports_higher_order_operators = True

    def __init__(self, ledger: Ledger, places: ModulePlaces) -> None:
        super().__init__()
        self._ledger = ledger
        self._places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A wrapper's own dispatch comes back here with the tensors inside of it.
        if any(_private_api.is_wrapper_class(kind) for kind in types):
            return NotImplemented
        output = func(*args, **(kwargs or {}))
        tensors = (
            [output]
            if isinstance(output, Tensor)
            else [x for x in _private_api.tree_leaves(output) if isinstance(x, Tensor)]
        )
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
            written = outputs or [
                x for x in _private_api.tree_leaves(args[:1]) if isinstance(x, Tensor)
            ]
            for tensor in written:
                self._count_copy(tensor, tally)
        elif name in _PRODUCTS:
            left = args[_PRODUCTS[name]]
            # Every element of the left factor meets each of the output's columns.
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
        """Books a tensor that autograd saves."""
        blocks = [
            self._ledger.find(x) or self._ledger.add(x, "", resident=True) for x in storages(tensor)
        ]
        parameter = (
            blocks[0].parameter() if len(blocks) == 1 and blocks[0].parameter is not None else None
        )
        # ZeRO-3 takes a parameter's storage away by giving it another: an alias would keep the
        # gathered one alive.
        if (
            parameter is not None
            and parameter.shape == tensor.shape
            and parameter.stride() == tensor.stride()
        ):
            tensor = parameter
        elif tensor.grad_fn is not None:
            # A node that saves its own output would hold itself.
            tensor = tensor.detach()
        return _Saved(tensor, self._ledger, blocks)


def _is_input(storage: UntypedStorage, args: Any, kwargs: Any) -> bool:
    """True where an operator's output lies in the storage of one of its inputs, which is from
    before then.
    """
    key = _private_api.storage_key(storage)
    for value in _private_api.tree_leaves((args, kwargs)):
        if isinstance(value, Tensor) and any(
            key == _private_api.storage_key(x) for x in storages(value)
        ):
            return True
        if (
            isinstance(value, UntypedStorage | torch.TypedStorage)
            and _private_api.storage_key(value) == key
        ):
            return True
    return False
