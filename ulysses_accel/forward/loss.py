"""Makes the loss of a shard the loss of the full batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ulysses_accel.forward.batch_checks import check_labels
from ulysses_accel.forward.context import ForwardFeature, ModelToShard, RunningBatch
from ulysses_accel.forward.router_loss import RouterLosses, first_tensor, put_router_loss
from ulysses_accel.forward.sample_heads import mean_of_samples
from ulysses_accel.installation import Installation
from ulysses_accel.introspection.loss import LossUse
from ulysses_accel.sequence.loss import aggregate_loss, mean_as_share, shared_scalar


class BatchLoss(ForwardFeature):
    """Gives the model the labels that its loss is to use, and aggregates the loss over ranks."""

    def __init__(self, target: ModelToShard, changes: Installation) -> None:
        self._use = target.profile.loss
        self._group, self._world_group = target.group, target.world_group
        self._num_steps = target.num_steps
        self._routers = RouterLosses(target.profile, target.group, changes)

    def before(self, model: nn.Module, batch: RunningBatch, kwargs: dict[str, Any]) -> None:
        """Chooses the labels, and keeps them to count."""
        self._choose_labels(batch, kwargs)
        batch.router = self._routers.begin(kwargs)

    def _choose_labels(self, batch: RunningBatch, kwargs: dict[str, Any]) -> None:
        use = self._use
        batch.num_items_in_batch = kwargs.get("num_items_in_batch")
        shifted = kwargs.get("shift_labels")
        if use is None:
            kwargs.pop("shift_labels", None)
            return
        if use.labels != "next_token":
            batch.labels = kwargs.get("labels")
        elif shifted is not None:
            # transformers 5 computes a loss only when it is given labels; beside shift_labels it
            # does not use them.
            batch.labels = kwargs["labels"] = shifted
        if use.labels != "whole" and batch.description is not None:
            check_labels(batch.description, kwargs.get("labels"), batch.labels)
        batch.has_loss = use.labels == "whole" or batch.labels is not None
        batch.has_loss &= all(kwargs.get(name) is not None for name in use.needs)
        if not use.divides_by_items:
            kwargs.pop("num_items_in_batch", None)

    def after(self, model: nn.Module, batch: RunningBatch, output: Any) -> Any:
        """Returns the output with its loss aggregated; the loss is the first entry of a tuple."""
        use, router, loss, router_loss = self._use, batch.router, None, None
        if router is not None:
            router_loss = router.loss(first_tensor(output))
        # A model that is to return log-probabilities computes no loss.
        has_loss = batch.has_loss and (isinstance(output, tuple) or output.loss is not None)
        if use is not None and has_loss:
            added = None
            if router is not None and router_loss is not None:
                added = router.coefficient * router_loss
            loss = output[0] if isinstance(output, tuple) else output.loss
            loss = self._aggregated(loss, batch, use, added)
            output = _with_loss(output, loss)
        if router is not None and router_loss is not None:
            output = put_router_loss(output, router_loss, router, 0 if loss is None else 1)
        return output

    def _aggregated(
        self, loss: Tensor, batch: RunningBatch, use: LossUse, added: Tensor | None
    ) -> Tensor:
        """Returns the full batch's loss from this rank's, with what the routers of the full
        sequence add to it.
        """
        labels, num_items = batch.labels, batch.num_items_in_batch
        if use.is_of_both or labels is None:
            # Tokens alone are counted, and not what else it is a mean over.
            num_items = None
        group = self._group if num_items is None else self._world_group
        if use.labels == "whole":
            loss = mean_of_samples(loss, labels, num_items, group)
        else:
            assert labels is not None
            if num_items is not None and not use.divides_by_items:
                loss = mean_as_share(loss, labels, num_items)
            if added is not None and num_items is not None:
                loss = loss + added.to(loss.dtype) / self._group.size()
            loss = aggregate_loss(loss, labels, group, num_items_in_batch=num_items)
            if added is not None and num_items is None:
                loss = loss + added.to(loss.dtype)
            loss = shared_scalar(loss, group)
        # The engine divides each micro-step's loss by their number, which num_items_in_batch has in
        # it already.
        return loss if num_items is None else loss * self._num_steps()


def _with_loss(output: Any, loss: Tensor) -> Any:
    if isinstance(output, tuple):
        return (loss, *output[1:])
    output["loss"] = loss
    return output
