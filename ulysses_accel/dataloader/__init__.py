"""Data loading for sequence parallel training."""

from ulysses_accel.dataloader.adapter import UlyssesSPDataLoaderAdapter, skip_first_batches

__all__ = ["UlyssesSPDataLoaderAdapter", "skip_first_batches"]
