"""Tensor parallelism of one accelerator: its models are sharded over the ranks of the axis `tp`
before the engine takes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.utils import DistributedType
from torch import nn

from ulysses_accel import _private_api
from ulysses_accel.config.parallelism import ParallelismConfig
from ulysses_accel.errors import ConfigError
from ulysses_accel.installation import AcceleratorFeature, FeatureSession, Override, stock_method
from ulysses_accel.introspection.structure import transformers_model
from ulysses_accel.tensor_parallel.parallelize import WeightSharding

_REWRITES_LAYERS = ("tiled_mlp", "tiled_norm", "tiled_loss", "use_liger_loss")


class TensorParallel(AcceleratorFeature):
    """Tensor parallelism of one accelerator, `accelerator.tensor_parallel`.

    `close` restores the accelerator and the models' way to save themselves; their weights stay
    sharded.

    Args:
        config: the accelerator's config.
        accelerator: that is being constructed.
        session: that runs the features.

    Raises:
        ConfigError: DeepSpeed, or a setting of `MemoryConfig` that rewrites the layers that are
            sharded.
    """

    name = "tensor_parallel"
    settings = ("tp_size",)

    def __init__(
        self, config: ParallelismConfig, accelerator: Any, session: FeatureSession
    ) -> None:
        super().__init__(config, accelerator, session)
        _check_engine(config, accelerator)
        self.weights = WeightSharding(config, config.get_device_mesh(), accelerator.device)
        self._has_engine = accelerator.is_fsdp2

    @classmethod
    def is_requested(cls, config: ParallelismConfig) -> bool:
        """Returns whether several ranks share the weights of each layer."""
        return config.tp_size > 1

    def prepare_model(self, model: nn.Module, checked: None) -> None:
        """Shards a model's weights."""
        self.weights.shard(model)

    def before_engine(self, objects: tuple[Any, ...]) -> None:
        """Gives optimizers that are prepared together with their model its sharded parameters."""
        self.weights.update(objects)

    def after_prepare(self, prepared: tuple[Any, ...]) -> tuple[Any, ...]:
        """Gives optimizers, prepared before or after their model, its latest parameters."""
        self.weights.update(_private_api.prepared_optimizers(self.accelerator))
        return prepared

    def overrides(self) -> Mapping[str, Override]:
        """Returns what shards of weights need where no engine knows of them."""
        if self._has_engine:
            return {"prepare_model": self._prepare_without_ddp}
        return {
            "prepare_model": self._prepare_without_ddp,
            "get_state_dict": _full_state,
            "save_state": _refuse_save_state,
        }

    def _prepare_without_ddp(
        self, stock: Override, model: nn.Module, *args: Any, **kwargs: Any
    ) -> nn.Module:
        if not _private_api.is_prepared(model):
            self.weights.replicate(model)
            inner = transformers_model(model)
            save = _SaveFull(stock_method(inner, "save_pretrained"))
            self.installation.set(inner, "save_pretrained", save)
        # accelerate 1.15 wraps a model in DDP only for training; DDP takes no DTensor parameters.
        prepared: nn.Module = stock(model, *args, **{**kwargs, "evaluation_mode": True})
        return prepared

    @property
    def holds_parts(self) -> bool:
        """Whether a rank holds shards of weights that no engine gathers for a checkpoint."""
        return not self._has_engine


class _SaveFull:
    """Overrides `save_pretrained` of a sharded model.

    Args:
        stock: the model's own method.
    """

    def __init__(self, stock: Override) -> None:
        self.stock = stock

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Saves full weights that were gathered before; this rank has only its shards."""
        if kwargs.get("state_dict") is None:
            raise ConfigError(
                "save_pretrained without state_dict, of a model whose weights are sharded over "
                "tensor parallel ranks: this rank has only its shards. Call "
                "accelerator.get_state_dict(model) on all ranks, and pass on what it returns; or "
                "use FSDP2."
            )
        return self.stock(save_directory, *args, **kwargs)


def _full_state(stock: Override, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
    """Overrides `Accelerator.get_state_dict`: full tensors on rank 0, nothing elsewhere, as with
    FSDP2.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


def _refuse_save_state(stock: Override, *_: Any, **__: Any) -> None:
    raise ConfigError(
        "save_state with tensor parallelism and no engine: accelerate would write one rank's "
        "shards of the optimizer. Use FSDP2, which writes all, or get_state_dict for the model "
        "alone."
    )


def _check_engine(config: ParallelismConfig, accelerator: Any) -> None:
    here = f"tp_size={config.tp_size} (from {config.source_of('tp_size')})"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ConfigError(
            f"{here} with DeepSpeed, which does not support the DTensor parameters that "
            "tp_size > 1 creates. Use FSDP2, or no engine."
        )
    memory = config.memory_config
    conflicts = [
        f"{name}=True" for name in _REWRITES_LAYERS if memory is not None and getattr(memory, name)
    ]
    if conflicts:
        raise ConfigError(
            f"{here} with {', '.join(conflicts)}: these compute full layers in tiles, and tensor "
            "parallelism shards them. Use one or the other; checkpointing goes with both."
        )
