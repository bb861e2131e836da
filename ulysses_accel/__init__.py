"""Train Hugging Face transformers on sequences too long for one device, through a stock
`accelerate.Accelerator`.

Names are loaded when they are first used: importing the package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "ParallelismConfig": "ulysses_accel.config.parallelism",
    "DeepSpeedSequenceParallelConfig": "ulysses_accel.config.parallelism",
    "RingAttentionConfig": "ulysses_accel.config.parallelism",
    "MemoryConfig": "ulysses_accel.config.memory",
    "UlyssesSPDataLoaderAdapter": "ulysses_accel.dataloader",
    "ulysses_attention": "ulysses_accel.attention",
    "supports": "ulysses_accel.integrations.accelerate.preflight",
    "Finding": "ulysses_accel.introspection.findings",
    "aggregate_loss": "ulysses_accel.sequence.loss",
    "count_items": "ulysses_accel.sequence.loss",
    "all_gather": "ulysses_accel.distributed.collectives",
    "gather_sequence": "ulysses_accel.sequence.gather",
    "pool_sequence": "ulysses_accel.sequence.gather",
    "shard_sequence": "ulysses_accel.sequence.gather",
    "attach_trainer": "ulysses_accel.integrations.trainer.trainer",
    "SequenceParallelTrainerMixin": "ulysses_accel.integrations.trainer.trainer",
    "use_fsdp_plugin": "ulysses_accel.integrations.accelerate.process_state",
    "SequenceDescription": "ulysses_accel.sequence.description",
    "skip_first_batches": "ulysses_accel.dataloader",
    "UlyssesAccelError": "ulysses_accel.errors",
}

__all__ = [
    "ParallelismConfig",
    "DeepSpeedSequenceParallelConfig",
    "RingAttentionConfig",
    "MemoryConfig",
    "UlyssesSPDataLoaderAdapter",
    "ulysses_attention",
    "supports",
    "Finding",
    "aggregate_loss",
    "count_items",
    "all_gather",
    "gather_sequence",
    "pool_sequence",
    "shard_sequence",
    "attach_trainer",
    "SequenceParallelTrainerMixin",
    "use_fsdp_plugin",
    "SequenceDescription",
    "skip_first_batches",
    "UlyssesAccelError",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'ulysses_accel' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
