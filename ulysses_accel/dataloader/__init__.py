"""Data loading for sequence parallel training."""

from ulysses_accel.dataloader.loader import UlyssesSPDataLoaderAdapter, skip_first_batches

__all__ = ["UlyssesSPDataLoaderAdapter", "skip_first_batches"]
