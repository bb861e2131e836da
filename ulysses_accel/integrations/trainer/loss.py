"""A user's loss function, or label smoothing, on this rank's tokens of a sharded sequence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ulysses_accel.errors import BatchError, ConfigError
from ulysses_accel.sequence.labels import IGNORE_INDEX
from ulysses_accel.sequence.loss import aggregate_loss


def with_local_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    """Returns a sharded batch whose labels, shifted or not, are called `labels`, so that the
    Trainer takes them out.
    """
    batch = dict(inputs)
    labels = batch.pop("shift_labels", None)
    labels = batch.get("labels") if labels is None else labels
    if labels is None:
        raise BatchError(
            "compute_loss_func or label smoothing is on, but the batch has no labels whose tokens "
            "could be counted. Return labels from the collate function."
        )
    return {**batch, "labels": labels}


@dataclass(frozen=True)
class ShardedLoss:
    """A loss function of full batches, called with one rank's shard; its values are summed over
    ranks.

    The function must return a sum over tokens divided by `num_items_in_batch`, as the Trainer
    requires on several devices. One that takes a causal model's labels shifts them inside: it gets
    this rank's logits with one more at the end, and this rank's shifted labels with an ignored one
    in front, so that what it compares is exact.

    Args:
        function: the Trainer's `compute_loss_func` or its label smoother.
        group: the ranks that share each sequence.
        world_group: the ranks that `num_items_in_batch` is counted over.
        next_token: whether labels were shifted before they were sharded.
        shifting: functions that were seen to shift, added to; None for one that is known to.
    """

    function: Callable[..., Any]
    group: ProcessGroup
    world_group: ProcessGroup
    next_token: bool
    shifting: list[Callable[..., Any]] | None = None

    def __call__(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None, **_: Any
    ) -> Tensor:
        """Returns the loss of the full batch.

        Args:
            outputs: the model's, with logits `[B, S / P, V]`.
            labels: `[B, S / P]`, this rank's.
            num_items_in_batch: tokens that the loss is divided by; None for a mean.
        """
        group = self.group if num_items_in_batch is None else self.world_group
        if self.next_token:
            loss = self._of_next_tokens(outputs, labels, num_items_in_batch)
        else:
            loss = self.function(outputs, labels, num_items_in_batch=num_items_in_batch)
        return aggregate_loss(loss, labels, group, num_items_in_batch=num_items_in_batch)

    def _of_next_tokens(self, outputs: Any, labels: Tensor, num_items: Any) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        extra = torch.zeros_like(logits[:, :1]).requires_grad_(logits.requires_grad)
        # [B, S/P, V] -> [B, S/P + 1, V]
        longer = torch.cat([logits, extra], dim=1)
        ignored = torch.full_like(labels[:, :1], IGNORE_INDEX)
        loss: Tensor = self.function(
            _with_logits(outputs, longer),
            torch.cat([ignored, labels], dim=1),
            num_items_in_batch=num_items,
        )
        known = self.shifting
        if (
            known is not None
            and loss.requires_grad
            and not any(function is self.function for function in known)
        ):
            self._refuse_unshifted(loss, extra)
            known.append(self.function)
        return loss

    def _refuse_unshifted(self, loss: Tensor, extra: Tensor) -> None:
        """Refuses a function that uses the logits that were only added to be shifted away; checked
        once, on all ranks.
        """
        (grad,) = torch.autograd.grad(loss, extra, retain_graph=True, allow_unused=True)
        used = (
            torch.zeros((), device=extra.device)
            if grad is None
            else grad.ne(0).any().to(torch.float32)
        )
        dist.all_reduce(used, op=dist.ReduceOp.MAX, group=self.world_group)
        if bool(used):
            name = getattr(self.function, "__qualname__", type(self.function).__name__)
            raise ConfigError(
                f"compute_loss_func {name} uses the last token's logits, which have no next token: "
                "it does not compare logits[:, :-1] with labels[:, 1:], so its labels would be "
                "wrong at the ends of shards. Shift inside of the function, as transformers' "
                "causal losses do."
            )


def _with_logits(outputs: Any, logits: Tensor) -> Any:
    """Returns a copy of a model's outputs with other logits."""
    if not isinstance(outputs, dict):
        return (logits, *outputs[1:])
    changed = copy.copy(outputs)
    changed["logits"] = logits
    return changed
