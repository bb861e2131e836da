"""One model's sharded forward: takes the description from the batch, and makes `loss` the full
batch's.

Whether a forward is sharded is decided by the batch, not by `model.training`: with a
`sequence_description` it is, and without one the model does what it always did, with its own mask.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from ulysses_accel.attention import InstalledAttention, SequenceAttention, install
from ulysses_accel.forward.batch_checks import check_batch, refuse_undescribed_shard
from ulysses_accel.forward.checkpoint_context import CheckpointContext
from ulysses_accel.forward.context import ForwardFeature, ModelToShard, RunningBatch
from ulysses_accel.forward.coverage import Coverage
from ulysses_accel.forward.loss import BatchLoss
from ulysses_accel.forward.multimodal import Multimodal, has_merged_inputs
from ulysses_accel.forward.override import Forward, override_forward
from ulysses_accel.forward.positions import Positions, RotaryLength, TokenCounts
from ulysses_accel.forward.sample_heads import FirstTokens, SampleHeads
from ulysses_accel.installation import Installation
from ulysses_accel.introspection.profile import ModelProfile
from ulysses_accel.sequence.description import DESCRIPTION_KEY, SequenceDescription
from ulysses_accel.sequence.running import run_batch

# In the order in which they are installed and prepare a forward; they finish it in the opposite
# order. `Coverage` comes after them, so that a forward that bypassed the sharded attention is
# refused before any rank waits for another.
FEATURES: tuple[type[ForwardFeature], ...] = (
    CheckpointContext,
    Positions,
    TokenCounts,
    Multimodal,  # reads the positions that `Positions` keeps
    FirstTokens,
    SampleHeads,
    RotaryLength,  # its hooks run after those that give a module its positions
    BatchLoss,
)


class ShardedForward:
    """The sharded forward of one model, which it does not keep alive.

    Args:
        target: the model and what is known of it.
        features: the parts of its forward.
        coverage: the last of them.
        changes: everything that was installed.
    """

    def __init__(
        self,
        target: ModelToShard,
        features: list[ForwardFeature],
        coverage: Coverage,
        changes: Installation,
    ) -> None:
        self.attention: InstalledAttention = target.attention
        self._features, self._coverage, self._changes = features, coverage, changes
        self._group_size = target.group.size()
        profile = target.profile
        self._position_keys = tuple(source.key for source in profile.positions)
        self._is_encoder_decoder = profile.encoder is not None
        self._has_full_encoder = profile.has_full_encoder
        self._merges = profile.merging is not None
        self._has_blocks = profile.merging is not None and profile.merging.has_blocks
        self._takes_use_cache = profile.takes_use_cache
        self._has_warned = False

    # Not compiled: the compiler can't trace a context variable.
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def run(
        self, model: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Runs the forward of a sharded batch, or leaves that of an ordinary one alone.

        Args:
            model: the module that is called.
            forward: its own forward.
            args: of the call.
            kwargs: of the call.

        Raises:
            BatchError: the arguments are not this rank's shard of the described batch.
            UnsupportedModelError: the batch needs what is not computed on shards.
        """
        description = kwargs.pop(DESCRIPTION_KEY, None)
        batch = RunningBatch(description)
        # For ordinary batches too: one inside of a sharded forward must not see that batch.
        with run_batch(batch):
            try:
                if description is not None:
                    return self._run_sharded(model, batch, forward, args, kwargs)
                refuse_undescribed_shard(args, kwargs)
                self._warn_of_full_batch(model, kwargs)
                with self._coverage.uncounted():
                    return forward(*args, **kwargs)
            finally:
                batch.is_in_forward = False

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def _run_sharded(
        self,
        model: nn.Module,
        batch: RunningBatch,
        forward: Forward,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        assert batch.description is not None
        self._check_arguments(batch.description, args, kwargs)
        self._remove_masks(kwargs)
        if self._takes_use_cache:
            kwargs["use_cache"] = False
        for feature in self._features:
            feature.before(model, batch, kwargs)
        output = forward(**kwargs)
        if output is None:
            return None
        for feature in reversed(self._features):
            output = feature.after(model, batch, output)
        return output

    def _check_arguments(
        self, description: SequenceDescription, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        check_batch(
            description,
            args,
            kwargs,
            self._position_keys,
            self._is_encoder_decoder,
            merges=self._merges and has_merged_inputs(kwargs),
            has_blocks=self._has_blocks,
        )

    def _remove_masks(self, kwargs: dict[str, Any]) -> None:
        """Removes masks of shards: padding is part of the description, and the model would take
        them for the full sequence's.
        """
        kwargs.pop("decoder_attention_mask", None)
        is_full = self._has_full_encoder or (self._merges and has_merged_inputs(kwargs))
        if not is_full:
            kwargs.pop("attention_mask", None)

    def _warn_of_full_batch(self, model: nn.Module, kwargs: dict[str, Any]) -> None:
        """Says once that training goes on without sharding: most likely a loader that was not
        prepared.
        """
        if self._has_warned or not (
            model.training and torch.is_grad_enabled() and kwargs.get("labels") is not None
        ):
            return
        self._has_warned = True
        warnings.warn(
            f"{type(model).__name__} was prepared for {self._group_size} ranks that share each "
            "sequence, and trains on a whole batch: nothing is sharded. Pass the data loader to "
            "accelerator.prepare too.",
            stacklevel=2,
        )

    def close(self) -> None:
        """Restores the model."""
        self._changes.close()


def shard_forward(
    model: nn.Module,
    profile: ModelProfile,
    attention: SequenceAttention,
    group: ProcessGroup,
    world_group: ProcessGroup,
    num_steps: Callable[[], int] = lambda: 1,
) -> ShardedForward:
    """Makes a model compute sharded batches exactly.

    Args:
        model: a transformers model, or a module that holds one; changed in place, reversibly.
        profile: of the model, without findings.
        attention: how its attention is computed.
        group: the ranks that share each sequence, over which a loss is aggregated.
        world_group: the ranks that `num_items_in_batch` is counted over.
        num_steps: returns the micro-steps that the engine divides a loss by.

    Returns:
        The installation; its `close()` restores the model.
    """
    changes = Installation()
    try:
        installed = install(model, attention)
        changes.callback(installed.close)
        target = ModelToShard(model, profile, installed, group, world_group, num_steps)
        coverage = Coverage(target, changes)
        features = [*(feature(target, changes) for feature in FEATURES), coverage]
        sharded = ShardedForward(target, features, coverage, changes)
        # The last and outermost, so that features' overrides run within the running batch.
        override_forward(model, sharded.run, changes)
    except BaseException:
        changes.close()
        raise
    return sharded
