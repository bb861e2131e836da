"""The report of an allocation tracker, as numbers and as a table."""

from __future__ import annotations

from dataclasses import dataclass, field

KINDS = ("parameters", "gradients", "saved", "temporary")


@dataclass
class Tally:
    """The bytes of one kind or of one module.

    Args:
        live: bytes that are allocated now.
        peak: the most that were live at once.
        at_peak: bytes that were live at the peak of all together.
        allocated: bytes that were ever allocated; by module only, because the kind is known later.
        copied: bytes that were written by copies, casts, concatenations and the like.
        matmul_flops: floating-point operations of matrix products, two for each multiply and add;
            by module only.
    """

    live: int = 0
    peak: int = 0
    at_peak: int = 0
    allocated: int = 0
    copied: int = 0
    matmul_flops: int = 0


@dataclass
class Allocations:
    """What was allocated inside of `track_allocations`, on one device; up to date at any time.

    Tensors from before are counted as resident, not as live: a peak is what was needed besides.

    Args:
        device: the type of the device.
        unit_bytes: bytes of one u, for reports; usually of one local hidden-sized tensor.
        resident_bytes: bytes of the model's parameters, buffers and gradients before.
        live_bytes: bytes that are allocated now.
        peak_bytes: the most that were live at once.
        peak_by_phase: the most that were live at once in `forward` (everything but backward) and in
            `backward`, which includes the recompute of checkpoints.
        peak_operation: the operation that reached the peak.
        peak_module: the module that it ran for.
        allocated_bytes: bytes that were ever allocated.
        copied_bytes: bytes that were written by copies, casts, concatenations and the like.
        saved_bytes: bytes of the storages that autograd keeps for backward now: resident ones too,
            parameters apart.
        peak_saved_bytes: the most of them at once.
        by_kind: parameters, gradients, saved for backward, temporary (everything else).
        by_module: by the innermost module that allocated, in its forward or backward; "" for
            outside of all.
        matmul_calls: matrix products.
        matmul_flops: their floating-point operations.
        attention_forward_calls: forward calls of fused attention kernels.
        attention_backward_calls: their backward calls.
        other_devices: bytes on other device types.
        allocator_peak_bytes: the CUDA allocator's peak above what was allocated before, workspaces
            of kernels included; None on other devices.
    """

    device: str
    unit_bytes: int | None = None
    resident_bytes: int = 0
    live_bytes: int = 0
    peak_bytes: int = 0
    peak_by_phase: dict[str, int] = field(default_factory=lambda: {"forward": 0, "backward": 0})
    peak_operation: str = ""
    peak_module: str = ""
    allocated_bytes: int = 0
    copied_bytes: int = 0
    saved_bytes: int = 0
    peak_saved_bytes: int = 0
    by_kind: dict[str, Tally] = field(default_factory=lambda: {kind: Tally() for kind in KINDS})
    by_module: dict[str, Tally] = field(default_factory=dict)
    matmul_calls: int = 0
    matmul_flops: int = 0
    attention_forward_calls: int = 0
    attention_backward_calls: int = 0
    other_devices: dict[str, Tally] = field(default_factory=dict)
    allocator_peak_bytes: int | None = None

    def units(self, num_bytes: int) -> float:
        """Returns bytes in u; needs `unit_bytes`."""
        if not self.unit_bytes:
            raise ValueError("this tracker has no unit. Pass unit_bytes=... to track_allocations.")
        return num_bytes / self.unit_bytes

    def matmul_units(self, tokens: int, in_features: int, out_features: int) -> float:
        """Returns all matrix products as a multiple of one linear layer's forward on `tokens`
        tokens.
        """
        return self.matmul_flops / (2 * tokens * in_features * out_features)

    def table(self, max_modules: int = 12) -> str:
        """Returns the report as text: by kind, and the modules that held most at the peak.

        Args:
            max_modules: number of modules in the table.
        """
        lines = [f"{'':40}{'at peak':>12}{'own peak':>12}{'allocated':>12}{'copied':>12}"]
        lines += [self._line(kind, tally) for kind, tally in self.by_kind.items()]
        lines.append(self._line("all", self._total()))
        ranked = sorted(
            self.by_module.items(),
            key=lambda entry: (entry[1].at_peak, entry[1].allocated),
            reverse=True,
        )
        lines += ["by module"] + [
            self._line(name or "(outside)", tally) for name, tally in ranked[:max_modules]
        ]
        lines.append(
            f"peak in {self.peak_module or '(outside)'} at {self.peak_operation or 'no operation'}"
        )
        phases = ", ".join(
            f"{phase} {self._size(peak)}" for phase, peak in self.peak_by_phase.items()
        )
        lines.append(
            f"peak by phase: {phases}; saved for backward: {self._size(self.peak_saved_bytes)}"
        )
        lines.append(
            f"{self.matmul_calls} matrix products ({self.matmul_flops:.3e} FLOPs), attention "
            f"kernels {self.attention_forward_calls} forward and "
            f"{self.attention_backward_calls} backward"
        )
        if self.allocator_peak_bytes is not None:
            lines.append(
                f"peak of the {self.device} allocator: {self._size(self.allocator_peak_bytes)}"
            )
        return "\n".join(lines)

    def _total(self) -> Tally:
        return Tally(
            self.live_bytes,
            self.peak_bytes,
            self.peak_bytes,
            self.allocated_bytes,
            self.copied_bytes,
        )

    def _line(self, name: str, tally: Tally) -> str:
        sizes = (tally.at_peak, tally.peak, tally.allocated, tally.copied)
        return f"{name[-40:]:40}" + "".join(f"{self._size(size):>12}" for size in sizes)

    def _size(self, num_bytes: int) -> str:
        return (
            f"{self.units(num_bytes):.2f}u" if self.unit_bytes else f"{num_bytes / 2**20:.2f} MiB"
        )
