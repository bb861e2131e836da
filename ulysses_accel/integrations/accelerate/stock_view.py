"""What accelerate's own code is told about parallelism while it hands objects to the engine.

accelerate, transformers' Trainer and TRL act on a `ParallelismConfig`: they wrap, scale and count
for the parallelism that it names. This package does that work itself, so their code is told:

1. `Accelerator.prepare` with DDP or DeepSpeed: `state.parallelism_config` is None, by `stock_sees`.
   accelerate 1.15 builds no DDP where `tp_enabled`, and gives DeepSpeed sequence groups by
   `sp_size`.
2. `Accelerator.prepare` with FSDP2: the config, over whose axes parameters are sharded, but
   `tp_enabled` is false and the plugin loads no weights, by `stock_sees`. accelerate 1.15 would
   prepare tensor parallelism again, and load rank 0's shard of a weight into every rank.
3. DeepSpeed's plugin, for a model without its loader: a micro batch of 1 where its config says
   "auto", by `stock_sees`. accelerate 1.15 refuses "auto" then; the number only serves DeepSpeed's
   log lines.
4. Everybody, always: `cp_enabled` is false, by `config.mesh_sizes`. accelerate 1.15 forces causal
   attention and demands an FSDP2 plugin; the Trainer wraps each step in torch's own context
   parallelism.
5. Everybody, always: `sp_backend` is "ulysses", by `config.parallelism`. On "deepspeed" accelerate
   1.15, transformers 5.23 and TRL aggregate the loss and count tokens a second time.
6. `Trainer`: `get_sp_size` and `get_cp_size` return 1, by `integrations.trainer`. transformers 5.23
   divides lengths and counts by them, which are those of full batches already.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import DistributedType
from torch.utils.data import DataLoader

from ulysses_accel.config.parallelism import ParallelismConfig
from ulysses_accel.installation import replaced


@contextmanager
def stock_sees(
    config: ParallelismConfig, accelerator: Any, objects: tuple[Any, ...]
) -> Iterator[None]:
    """Lets accelerate see plain data parallelism over all ranks while it wraps a model; see the
    list above.

    Args:
        config: the accelerator's.
        accelerator: whose state is changed for the time.
        objects: that are prepared.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _set_micro_batch(accelerator.deepspeed_plugin, objects)
    if not accelerator.is_fsdp2:
        with replaced(accelerator.state, parallelism_config=None):
            yield
    elif config.tp_size > 1:
        plugin = accelerator.state.fsdp_plugin
        with replaced(config, _tp_hidden=True), replaced(plugin, cpu_ram_efficient_loading=False):
            yield
    else:
        yield


def _set_micro_batch(plugin: Any, objects: tuple[Any, ...]) -> None:
    has_loader = any(isinstance(obj, DataLoader) for obj in objects)
    if not has_loader and plugin.is_auto("train_micro_batch_size_per_gpu"):
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
