"""One model's sharded forward: takes the description from the batch, and makes `loss` the whole batch's.

Whether a forward is sharded is decided by the batch, not by `model.training`: with a `sequence_description` it is, and
without one the model does what it always did, with its own mask.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ulysses_accel.attention import (
    InstalledAttention,
    SequenceAttention,
    describe_forward,
    install,
    transformers_model,
)
from ulysses_accel.errors import BatchError, UnsupportedModelError
from ulysses_accel.loss import aggregate_loss, shared_scalar
from ulysses_accel.sequence import DESCRIPTION_KEY, SequenceDescription, is_marked_shard


@dataclass
class _Running:
    """A forward between its first and its last hook; `description` is None for an ordinary batch."""

    description: SequenceDescription | None
    context: AbstractContextManager[None]
    shift_labels: Tensor | None
    num_items_in_batch: Tensor | int | None
    calls_before: int


@dataclass
class ShardedForward:
    """The hooks on one model, and the way to take them off.

    Args:
        attention: the model's installed attention.
        group: the ranks that share each sequence.
        world_group: the ranks that `num_items_in_batch` is counted over.
        num_steps: returns the micro-steps that the engine divides a loss by.
        has_loss: whether the model computes a loss from labels.
        handles: the hooks.
        running: forwards between their two hooks, the innermost last.
        warned: whether the user was told of a whole batch in training.
        counts_from_mask: the module that takes positions from the attention mask where none are given, if there is one.
    """

    attention: InstalledAttention
    group: ProcessGroup
    world_group: ProcessGroup
    num_steps: Callable[[], int]
    has_loss: bool
    handles: list[Any] = field(default_factory=list)
    running: list[_Running] = field(default_factory=list)
    warned: bool = False
    counts_from_mask: str | None = None

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Prepares the arguments of a sharded forward; leaves those of an ordinary one alone."""
        kwargs = dict(kwargs)
        description = kwargs.pop(DESCRIPTION_KEY, None)
        # Ordinary forwards get a context too: one inside of a sharded forward must not see that batch.
        context = describe_forward(description)
        context.__enter__()
        self.running.append(
            _Running(
                description=description,
                context=context,
                shift_labels=kwargs.get("shift_labels"),
                num_items_in_batch=kwargs.get("num_items_in_batch"),
                calls_before=self.attention.num_calls,
            )
        )
        # Refused only now: `after` runs for a forward that raises too, and takes off what was put up here.
        if description is None:
            _refuse_undescribed_shard(args, kwargs)
            self._warn_of_whole_batch(model, kwargs)
            return args, kwargs
        _check_batch(description, args, kwargs)
        self._refuse_counted_positions(description)
        return args, self._sharded_arguments(kwargs)

    def _refuse_counted_positions(self, description: SequenceDescription) -> None:
        """Refuses positions that the loader made up, where the model would have made up others."""
        if self.counts_from_mask and description.counted_positions and description.is_padded_left:
            raise BatchError(
                f"the batch is padded on the left and has no position_ids, which {self.counts_from_mask} would count "
                f"from the first real token on. Put position_ids into the batch, or pad on the right."
            )

    def _warn_of_whole_batch(self, model: nn.Module, kwargs: dict[str, Any]) -> None:
        """Says once that training goes on without sharding: most likely a loader that was not prepared."""
        if self.warned or not (model.training and torch.is_grad_enabled() and kwargs.get("labels") is not None):
            return
        self.warned = True
        warnings.warn(
            f"{type(model).__name__} was prepared for {self.group.size()} ranks that share each sequence, and trains "
            f"on a whole batch: nothing is sharded. Pass the data loader to accelerator.prepare too.",
            stacklevel=2,
        )

    def _sharded_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        # Padding is part of the description; a shard's mask would be taken for the whole sequence's.
        kwargs.pop("attention_mask", None)
        kwargs["use_cache"] = False
        if not self.has_loss:
            kwargs.pop("shift_labels", None)
        elif kwargs.get("shift_labels") is not None:
            # transformers computes a loss only when it is given labels; beside shift_labels it does not use them.
            kwargs["labels"] = kwargs["shift_labels"]
        return kwargs

    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Replaces the shard's loss by the whole batch's; runs also when the forward raised, with no output."""
        running = self.running.pop()
        running.context.__exit__(None, None, None)
        if running.description is None or output is None:
            return None
        if self.attention.num_calls == running.calls_before:
            raise UnsupportedModelError(
                f"{type(model).__name__} computed a sharded batch without one attention call through "
                f"'{self.attention.implementation}': its tokens have only seen their own shard. Something replaced the "
                f"model's attention after prepare; prepare the model last."
            )
        return self._aggregate(running, output)

    def _aggregate(self, running: _Running, output: Any) -> Any:
        """Returns `output` with its loss aggregated; the loss is the first entry of a tuple."""
        if running.shift_labels is None or not self.has_loss:
            return None
        loss = output[0] if isinstance(output, tuple) else output.loss
        num_items = running.num_items_in_batch
        group = self.group if num_items is None else self.world_group
        loss = aggregate_loss(loss, running.shift_labels, group, num_items_in_batch=num_items)
        loss = shared_scalar(loss, group)
        if num_items is not None:
            # The engine divides each micro-step's loss by their number, which num_items_in_batch has in it already.
            loss = loss * self.num_steps()
        if isinstance(output, tuple):
            return (loss, *output[1:])
        output["loss"] = loss
        return output

    def uninstall(self) -> None:
        """Takes the hooks off the model and restores its attention."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.attention.uninstall()


def shard_forward(
    model: nn.Module,
    attention: SequenceAttention,
    group: ProcessGroup,
    world_group: ProcessGroup,
    num_steps: Callable[[], int] = lambda: 1,
) -> ShardedForward:
    """Makes a model compute sharded batches exactly; it must have passed `attention.check_model`.

    Args:
        model: a transformers model, or a module that holds one; changed in place, reversibly.
        attention: how its attention is computed.
        group: the ranks that share each sequence, over which a loss is aggregated.
        world_group: the ranks that `num_items_in_batch` is counted over.
        num_steps: returns the micro-steps that the engine divides a loss by.

    Returns:
        The installation; its `uninstall()` restores the model.
    """
    has_loss = "labels" in inspect.signature(type(transformers_model(model)).forward).parameters
    sharded = ShardedForward(install(model, attention), group, world_group, num_steps, has_loss)
    sharded.counts_from_mask = next((name for name, part in model.named_modules() if _counts_from_mask(part)), None)
    sharded.handles = [
        model.register_forward_pre_hook(sharded.before, with_kwargs=True),
        model.register_forward_hook(sharded.after, with_kwargs=True, always_call=True),
    ]
    return sharded


def _refuse_undescribed_shard(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses a shard that lost its description: attention would silently stay within the shard.

    Data loaders mark the shards that they yield; whole batches carry no mark, and `labels` instead of `shift_labels`.
    """
    found = ["tokens" for value in args[:1] if is_marked_shard(value)]
    found += [name for name in ("input_ids", "inputs_embeds", "position_ids") if is_marked_shard(kwargs.get(name))]
    found += ["shift_labels"] if kwargs.get("shift_labels") is not None else []
    if found:
        raise BatchError(
            f"the batch's {', '.join(found)} came without its {DESCRIPTION_KEY}, so each rank's tokens would only see "
            f"their own shard. Pass the batch as the data loader gave it: model(**batch). For a batch that is whole on "
            f"this rank, pass labels and not shift_labels."
        )


def _counts_from_mask(module: nn.Module) -> bool:
    """True for position embeddings that are given the attention mask."""
    return isinstance(module, nn.Embedding) and "attention_mask" in inspect.signature(type(module).forward).parameters


def _check_batch(description: SequenceDescription, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses arguments that are not this rank's shard of the described batch."""
    if args:
        raise BatchError(
            f"a sharded batch was passed with {len(args)} positional arguments. Pass all of it by name: model(**batch)."
        )
    tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    expected = (description.batch_size, description.shard_length)
    found = None if tokens is None else tuple(tokens.shape[:2])
    if found != expected:
        raise BatchError(
            f"the batch has {found} rows and tokens on this rank, its sequence_description says {expected} "
            f"({description.sequence_length} tokens over {description.num_shards} ranks). "
            f"Pass the batch as the data loader gave it."
        )
    if kwargs.get("position_ids") is None:
        raise BatchError("the sharded batch has no position_ids. Pass the batch as the data loader gave it: **batch.")
