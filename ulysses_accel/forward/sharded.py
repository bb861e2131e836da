"""One model's sharded forward: takes the description from the batch, and makes `loss` the whole
batch's.

Whether a forward is sharded is decided by the batch, not by `model.training`: with a
`sequence_description` it is, and without one the model does what it always did, with its own mask.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ulysses_accel.attention import InstalledAttention, SequenceAttention, describe_forward, install
from ulysses_accel.forward.batch_checks import check_batch, check_labels, refuse_undescribed_shard
from ulysses_accel.forward.checkpoint_context import describe_checkpoints, restore_checkpoints
from ulysses_accel.forward.coverage import Canary
from ulysses_accel.forward.multimodal import (
    MergedBatch,
    begin_merged,
    hook_merged,
    hook_whole_encoder,
)
from ulysses_accel.forward.positions import (
    hook_counts,
    hook_positions,
    hook_rotary,
    longest_position,
)
from ulysses_accel.forward.router_loss import (
    RouterLosses,
    RouterRecord,
    first_tensor,
    put_router_loss,
    router_losses,
)
from ulysses_accel.forward.sample_heads import WholeHead, hook_first_tokens, mean_of_samples
from ulysses_accel.introspection.loss import LossUse
from ulysses_accel.introspection.profile import ModelProfile
from ulysses_accel.sequence.description import DESCRIPTION_KEY, SequenceDescription
from ulysses_accel.sequence.loss import aggregate_loss, mean_as_share, shared_scalar


@dataclass
class _Running:
    """A forward between its first and its last hook; `description` is None for an ordinary
    batch.
    """

    description: SequenceDescription | None
    context: AbstractContextManager[None]
    counts_before: tuple[int, int]
    labels: Tensor | None = None
    has_loss: bool = False
    num_items_in_batch: Tensor | int | None = None
    router: RouterRecord | None = None
    positions: dict[str, Tensor] = field(default_factory=dict)
    merged: MergedBatch | None = None


@dataclass
class ShardedForward:
    """The hooks on one model, and the way to take them off.

    Args:
        model: that the hooks are on.
        attention: the model's installed attention.
        group: the ranks that share each sequence.
        world_group: the ranks that `num_items_in_batch` is counted over.
        num_steps: returns the micro-steps that the engine divides a loss by.
        profile: of the model.
        canary: tells whether all attention comes to us.
        routers: the model's router loss.
        handles: the hooks.
        running: forwards between their two hooks, the innermost last.
        warned: whether the user was told of a whole batch in training.
    """

    model: nn.Module
    attention: InstalledAttention
    group: ProcessGroup
    world_group: ProcessGroup
    num_steps: Callable[[], int]
    profile: ModelProfile
    canary: Canary
    routers: RouterLosses
    handles: list[Any] = field(default_factory=list)
    running: list[_Running] = field(default_factory=list)
    warned: bool = False

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Prepares the arguments of a sharded forward; leaves those of an ordinary one alone."""
        kwargs = dict(kwargs)
        description = kwargs.pop(DESCRIPTION_KEY, None)
        # Ordinary forwards get a context too: one inside of a sharded forward must not see that
        # batch.
        context = describe_forward(description)
        context.__enter__()
        running = _Running(description, context, self.canary.counts())
        self.running.append(running)
        # Refused only now: `after` runs for a forward that raises too, and takes off what was put
        # up here.
        if description is None:
            refuse_undescribed_shard(args, kwargs)
            self._warn_of_whole_batch(model, kwargs)
            return args, kwargs
        keys = tuple(source.key for source in self.profile.positions)
        check_batch(
            description, args, kwargs, keys, self.profile.encoder is not None, self.profile.merging
        )
        describe_checkpoints(self.model)
        running.merged, whole = begin_merged(self.profile.merging, description, kwargs)
        return args, {**self._sharded_arguments(kwargs, running), **whole}

    def _warn_of_whole_batch(self, model: nn.Module, kwargs: dict[str, Any]) -> None:
        """Says once that training goes on without sharding: most likely a loader that was not
        prepared.
        """
        if self.warned or not (
            model.training and torch.is_grad_enabled() and kwargs.get("labels") is not None
        ):
            return
        self.warned = True
        warnings.warn(
            f"{type(model).__name__} was prepared for {self.group.size()} ranks that share each "
            "sequence, and trains "
            "on a whole batch: nothing is sharded. Pass the data loader to accelerator.prepare "
            "too.",
            stacklevel=2,
        )

    def _sharded_arguments(self, kwargs: dict[str, Any], running: _Running) -> dict[str, Any]:
        # Padding is part of the description; a shard's mask would be taken for the whole
        # sequence's.
        kwargs.pop("decoder_attention_mask", None)
        if not self.profile.has_full_encoder:
            kwargs.pop("attention_mask", None)
        if self.profile.takes_use_cache:
            kwargs["use_cache"] = False
        for source in self.profile.positions:
            running.positions[source.key] = kwargs[source.key]
            if not source.is_argument:
                del kwargs[source.key]
        self._use_labels(kwargs, running)
        running.router = self.routers.begin(kwargs)
        return kwargs

    def _use_labels(self, kwargs: dict[str, Any], running: _Running) -> None:
        """Gives the model the labels that its loss is to use, and keeps them to count."""
        loss = self.profile.loss
        running.num_items_in_batch = kwargs.get("num_items_in_batch")
        shifted = kwargs.get("shift_labels")
        if loss is None:
            kwargs.pop("shift_labels", None)
            return
        if loss.labels != "next_token":
            running.labels = kwargs.get("labels")
        elif shifted is not None:
            # transformers computes a loss only when it is given labels; beside shift_labels it does
            # not use them.
            running.labels = kwargs["labels"] = shifted
        if loss.labels != "whole" and running.description is not None:
            check_labels(running.description, kwargs.get("labels"), running.labels)
        running.has_loss = loss.labels == "whole" or running.labels is not None
        running.has_loss &= all(kwargs.get(name) is not None for name in loss.needs)
        if not loss.divides_by_items:
            kwargs.pop("num_items_in_batch", None)

    def after(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Replaces the shard's loss by the whole batch's; runs also when the forward raised, with
        no output.
        """
        running = self.running.pop()
        if running.router is not None:
            running.router.close()
        running.context.__exit__(None, None, None)
        if running.description is None or output is None:
            return None
        self.canary.check(model, running.counts_before)
        return self._aggregate(running, output)

    def _aggregate(self, running: _Running, output: Any) -> Any:
        """Returns `output` with its loss aggregated; the loss is the first entry of a tuple."""
        used, router, loss = self.profile.loss, running.router, None
        router_loss = None if router is None else router.loss(first_tensor(output))
        # Asked for log-probabilities, a model computes no loss.
        if (
            used is not None
            and running.has_loss
            and (isinstance(output, tuple) or output.loss is not None)
        ):
            added = (
                None if router is None or router_loss is None else router.coefficient * router_loss
            )
            loss = output[0] if isinstance(output, tuple) else output.loss
            loss = self._aggregated(loss, running, used, added)
            output = _with_loss(output, loss)
        if router is not None and router_loss is not None:
            output = put_router_loss(output, router_loss, router, 0 if loss is None else 1)
        return output

    def _aggregated(
        self, loss: Tensor, running: _Running, used: LossUse, added: Tensor | None
    ) -> Tensor:
        """Returns the whole batch's loss from this rank's, with what the whole sequence's routers
        add to it.
        """
        labels, num_items = running.labels, running.num_items_in_batch
        if used.is_of_both or labels is None:
            # Tokens alone are counted, and not what else it is a mean over.
            num_items = None
        group = self.group if num_items is None else self.world_group
        if used.labels == "whole":
            loss = mean_of_samples(loss, labels, num_items, group)
        else:
            assert labels is not None
            if num_items is not None and not used.divides_by_items:
                loss = mean_as_share(loss, labels, num_items)
            if added is not None and num_items is not None:
                loss = loss + added.to(loss.dtype) / self.group.size()
            loss = aggregate_loss(loss, labels, group, num_items_in_batch=num_items)
            if added is not None and num_items is None:
                loss = loss + added.to(loss.dtype)
            loss = shared_scalar(loss, group)
        # The engine divides each micro-step's loss by their number, which num_items_in_batch has in
        # it already.
        return loss if num_items is None else loss * self.num_steps()

    def current_positions(self, key: str) -> Tensor | None:
        """Returns the running forward's positions `[B, S / P]`, None outside of a sharded one."""
        return self.running[-1].positions.get(key) if self.running else None

    def current_merged(self) -> MergedBatch | None:
        """Returns the running forward's batch where it has images or sound that its model
        merges.
        """
        return self.running[-1].merged if self.running else None

    def longest(self, module: nn.Module) -> int | None:
        """Returns the longest position of a module's sequence, None outside of a sharded
        forward.
        """
        description = self.running[-1].description if self.running else None
        if description is None:
            return None
        return longest_position(description, module in (self.attention.roles.encoder or ()))

    def uninstall(self) -> None:
        """Takes the hooks off the model and restores its attention."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        restore_checkpoints(self.model)
        self.routers.uninstall()
        self.attention.uninstall()


def _with_loss(output: Any, loss: Tensor) -> Any:
    if isinstance(output, tuple):
        return (loss, *output[1:])
    output["loss"] = loss
    return output


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
        The installation; its `uninstall()` restores the model.
    """
    installed = install(model, attention)
    canary, routers = Canary(profile.attending, installed), router_losses(profile, group)
    sharded = ShardedForward(
        model, installed, group, world_group, num_steps, profile, canary, routers
    )
    sharded.handles = [
        *canary.handles,
        model.register_forward_pre_hook(sharded.before, with_kwargs=True),
        model.register_forward_hook(sharded.after, with_kwargs=True, always_call=True),
        *hook_counts(profile.own_counts, attention),
    ]
    for source in profile.positions:
        sharded.handles += (
            hook_positions(source, sharded.current_positions) if not source.is_argument else []
        )
    if profile.encoder is None:
        is_of_samples = profile.loss is not None and profile.loss.is_of_samples
        sharded.handles += hook_first_tokens(profile.first_tokens, group, is_of_samples)
    elif profile.has_full_encoder:
        sharded.handles += hook_whole_encoder(profile.encoder)
    if profile.sample_head is not None:
        sharded.handles += WholeHead(profile.model, profile.sample_head, group).install()
    if profile.merging is not None:
        sharded.handles += hook_merged(profile.merging, group, sharded.current_merged)
    # Behind those that give a module its positions.
    sharded.handles += hook_rotary(profile.rotary, sharded.longest)
    return sharded
