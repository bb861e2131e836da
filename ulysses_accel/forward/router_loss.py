"""The router (load balancing) loss of mixture-of-experts models, over the whole sequence.

It is not linear in the tokens, so the mean of shards' losses is another number. Hooks on the
routers sum its terms over a forward's layers, one all-reduce of 2E + 1 numbers adds the ranks', and
the loss follows from the sums; no logits are exchanged, and the shard's are kept only for a call
with `output_router_logits=True`. The gradient by the logits is added in the backward of a router's
output, so that it is right in a recompute too, of whatever kind of checkpointing: the forward alone
counts tokens.

Normalisation. The loss is the sequence group's, as in stock data parallelism it is each process's;
without `num_items_in_batch` data parallel ranks and micro-steps are averaged. With it,
transformers adds the loss of every process and micro-step to the step's loss undivided, and so it
is here.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ulysses_accel import _private_api
from ulysses_accel.errors import ShapeError, UnsupportedModelError
from ulysses_accel.forward.context import sharded_batch
from ulysses_accel.installation import Installation
from ulysses_accel.introspection.findings import Finding
from ulysses_accel.introspection.profile import ModelProfile
from ulysses_accel.introspection.routers import (
    FLAG,
    load_balance,
    load_balance_gradient,
    recorded_routers,
    router_probabilities,
    router_statistics,
)
from ulysses_accel.introspection.structure import text_config
from ulysses_accel.sequence.description import SequenceDescription
from ulysses_accel.sequence.gather import shard_sequence
from ulysses_accel.sequence.loss import shared_scalar


@dataclass(eq=False)
class RouterRecord:
    """What one forward's routers did.

    Args:
        group: the ranks that share each sequence.
        top_k: experts that a token is sent to.
        coefficient: what the loss is multiplied by.
        keeps_logits: whether the caller requested the shard's router logits.
        statistics: `[2E + 1]` of this rank's tokens, None before the first router; of all ranks'
            after `loss`.
        gradient: `[E]`, the loss's gradient by each expert's summed probability, while a backward
            pass runs.
        dtype: of the loss.
        logits: of the layers so far, where requested.
        mask: `[B * S / P]`, False for padding; None where there is none.
    """

    group: ProcessGroup
    top_k: int
    coefficient: float
    keeps_logits: bool
    statistics: Tensor | None = None
    gradient: Tensor | None = None
    dtype: torch.dtype = torch.float32
    logits: list[Tensor] = field(default_factory=list)
    mask: Tensor | None = None

    def count(self, logits: Tensor, description: SequenceDescription | None) -> None:
        """Adds one router's rows `[T, E]` of the described batch."""
        if self.statistics is None:
            self.mask = _counted(description, self.group, logits.device)
        if self.mask is not None and self.mask.numel() != logits.shape[0]:
            raise ShapeError(
                f"a router saw {logits.shape[0]} tokens of a shard of {self.mask.numel()}, so its "
                f"padding can't be told. Set {FLAG}=False, or don't tile the block that has the "
                "router."
            )
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        statistics = router_statistics(logits, self.top_k, self.mask)
        self.statistics = statistics if self.statistics is None else self.statistics + statistics

    def loss(self, anchor: Tensor) -> Tensor:
        """Returns the router loss of the whole sequence, a scalar whose gradient reaches the
        routers.

        Args:
            anchor: a tensor that the forward computed after all routers; it gets no gradient of
                this.
        """
        if self.statistics is None:
            raise UnsupportedModelError(
                f"no router ran in a forward whose router loss was requested. Set {FLAG}=False."
            )
        loss: Tensor = _RouterLoss.apply(anchor, self)  # type: ignore[no-untyped-call]
        return loss


class _RouterLoss(torch.autograd.Function):
    """Computes the loss from the sums, and tells the routers its gradient before backward reaches
    any of them.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, record: RouterRecord) -> Tensor:
        assert record.statistics is not None
        dist.all_reduce(record.statistics, group=record.group)
        ctx.record = record
        ctx.shape, ctx.dtype = anchor.shape, anchor.dtype
        return load_balance(record.statistics).to(record.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        record = ctx.record
        # Each rank adds its local tokens' part alone: times their number, the mean over ranks is
        # the gradient.
        record.gradient = load_balance_gradient(record.statistics) * grad * record.group.size()
        _private_api.call_after_backward(partial(_forget, record))
        return torch.zeros((), dtype=ctx.dtype, device=grad.device).expand(ctx.shape), None


def _forget(record: RouterRecord) -> None:
    """Removes the gradient, which a later backward pass through the same graph, without this loss,
    must not add again.
    """
    record.gradient = None


class _AtRouter(torch.autograd.Function):
    """A router's outputs, unchanged; their backward adds the router loss's gradient to that of the
    logits.

    All outputs pass through, because models differ in which they use: one that is used is enough.
    """

    @staticmethod
    def forward(
        ctx: Any, record: RouterRecord, logits: Tensor, *others: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.record = record
        ctx.save_for_backward(logits)
        # Copies may be changed in place, as routers' weights are by some models; they are small
        # beside the logits.
        return (logits, *(other.clone() for other in others))

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        record, (logits,) = ctx.record, ctx.saved_tensors
        if record.gradient is not None:
            probabilities = router_probabilities(logits)
            gradient = record.gradient.to(probabilities.dtype)
            # [T, E] * [E] -> [T, E]: the backward of a softmax.
            added = probabilities * (gradient - (probabilities * gradient).sum(-1, keepdim=True))
            mask = record.mask
            added = added if mask is None else added * mask[:, None]
            grad = grad + added.to(grad.dtype)
        return None, grad, *others


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _at_router(index: int, _module: nn.Module, _args: Any, output: Any) -> Any:
    """Hook: counts a router's tokens, and lets its backward know of the loss.

    Not compiled: the compiler would take the backward for one that never has a gradient to add.

    Args:
        index: of the logits in a tuple that the router returns.
    """
    batch = sharded_batch()
    record = None if batch is None else batch.router
    if batch is None or record is None:
        return None
    outputs = output if isinstance(output, tuple) else (output,)
    index = index if isinstance(output, tuple) else 0
    logits = outputs[index]
    if logits is None:
        return None
    # Once the forward is over, routers run for a recompute, and their tokens have been counted.
    if batch.is_in_forward:
        with torch.no_grad():
            record.count(logits.detach(), batch.description)
        if record.keeps_logits:
            record.logits.append(logits)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return None
    indices = [index]
    for other, value in enumerate(outputs):
        if other != index and isinstance(value, Tensor) and value.requires_grad:
            indices.append(other)
    changed = _AtRouter.apply(record, *(outputs[each] for each in indices))  # type: ignore[no-untyped-call]
    results = list(outputs)
    for each, value in zip(indices, changed, strict=True):
        results[each] = value
    return tuple(results) if isinstance(output, tuple) else results[0]


def _counted(
    description: SequenceDescription | None, group: ProcessGroup, device: torch.device
) -> Tensor | None:
    """Returns which tokens of this rank's shard are not padding, `[B * S / P]`; None where
    none is.
    """
    if description is None:
        return None
    full = torch.zeros(description.batch_size, description.sequence_length, dtype=torch.bool)
    for row, documents in enumerate(description.rows):
        for start, stop in documents:
            full[row, start:stop] = True
        for start, stop in description.holes[row] if description.holes else ():
            full[row, start:stop] = False
    if bool(full.all()):
        return None
    # [B, S] -> [B * S/P]
    return shard_sequence(full, description, group).reshape(-1).to(device)


class RouterLosses:
    """One model's router loss: the hooks on its routers, and what a forward requests.

    Args:
        profile: of the model, which is held weakly.
        group: the ranks that share each sequence.
        changes: takes over the hooks, which the first forward that requests the loss registers.
    """

    def __init__(
        self,
        profile: ModelProfile,
        group: ProcessGroup,
        changes: Installation,
    ) -> None:
        self._model = weakref.ref(profile.model)
        self._use, self._group = profile.router_loss, group
        self._router_hooks: Installation | None = None
        changes.callback(self._remove_hooks)

    def begin(self, kwargs: dict[str, Any]) -> RouterRecord | None:
        """Starts to count where the loss is requested, and keeps the model from computing the
        shard's.

        Args:
            kwargs: the forward's; changed in place.

        Raises:
            UnsupportedModelError: it is requested in this call, and can't be computed on shards.
        """
        model: Any = self._model()
        if self._use is None or model is None:
            return None
        flag = kwargs.get(FLAG)
        is_requested = getattr(text_config(model), FLAG, False) if flag is None else flag
        if not is_requested:
            return None
        if isinstance(self._use, Finding):
            raise UnsupportedModelError(f"{type(model).__name__}: {self._use}")
        kwargs[FLAG] = False
        self._hook_routers(model)
        top_k, coefficient = _value(model, self._use.top_k), _value(model, self._use.coefficient)
        return RouterRecord(
            self._group, int(top_k), float(coefficient), keeps_logits=flag is not None
        )

    def _hook_routers(self, model: nn.Module) -> None:
        if self._router_hooks is not None:
            return
        self._router_hooks = Installation()
        for router, index in recorded_routers(model):
            self._router_hooks.hooks([router.register_forward_hook(partial(_at_router, index))])

    def _remove_hooks(self) -> None:
        if self._router_hooks is not None:
            self._router_hooks.close()
            self._router_hooks = None


def _value(model: Any, path: tuple[str, ...]) -> Any:
    value = model
    for name in path:
        value = getattr(value, name)
    return value


def first_tensor(output: Any) -> Tensor:
    """Returns a tensor of a model's output that was computed after its routers."""
    values = output if isinstance(output, tuple) else output.values()
    return next(
        value for value in values if isinstance(value, Tensor) and value.is_floating_point()
    )


def put_router_loss(output: Any, loss: Tensor, record: RouterRecord, index: int = 0) -> Any:
    """Returns a model's output with its router loss, where transformers puts it.

    Args:
        output: of the forward.
        loss: the router loss, the same on every rank of the group.
        record: of the forward.
        index: the loss's, where the output is a tuple.
    """
    loss = shared_scalar(loss, record.group)
    # The graph holds the record: what it kept of the graph would never be freed.
    logits = tuple(record.logits)
    record.logits.clear()
    if isinstance(output, tuple):
        return (*output[:index], loss, *output[index:], *([logits] if record.keeps_logits else []))
    output["aux_loss"] = loss
    names = [entry.name for entry in fields(output)]
    # Engines rebuild outputs from their fields; those of TRL's loss heads have none for the logits.
    if record.keeps_logits and "router_logits" in names:
        output["router_logits"] = logits
    for name in names:
        # transformers' Trainer tells outputs apart by their order.
        if name in output:
            output.move_to_end(name)
    return output
