"""Which labels count."""

from __future__ import annotations

from torch import Tensor

IGNORE_INDEX = -100


def num_counted(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Returns how many labels count, as an integer scalar on the labels' device (no host
    synchronization).
    """
    return (labels != ignore_index).sum()
