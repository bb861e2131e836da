"""The router (load balancing) loss of mixture-of-experts models, over the whole sequence.

It is not linear in the tokens, so the mean of shards' losses is another number. Hooks on the
routers sum what it is made of over a forward's layers, one all-reduce of 2E + 1 numbers adds the
ranks', and the loss follows from the sums; no logits travel, and the shard's are kept only for a
call with `output_router_logits=True`. The gradient by the logits is added where a router's output
goes back through the graph, so that it is right in a recompute too, of whatever kind of
checkpointing: the forward alone counts tokens.

Normalisation. The loss is the sequence group's, as in stock data parallelism it is each process's
own; without `num_items_in_batch` data parallel ranks and micro-steps are averaged. With it,
transformers adds the loss of every process and micro-step to the step's loss undivided, and so it
is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ulysses_accel import _private_api
from ulysses_accel.attention import active_description
from ulysses_accel.errors import ShapeError, UnsupportedModelError
from ulysses_accel.introspection.findings import Finding
from ulysses_accel.introspection.profile import ModelProfile
from ulysses_accel.introspection.routers import (
    FLAG,
    RouterLossUse,
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

_ACTIVE: ContextVar[RouterRecord | None] = ContextVar("ulysses_accel_router_record", default=None)


@dataclass(eq=False)
class RouterRecord:
    """What one forward's routers did.

    Args:
        group: the ranks that share each sequence.
        top_k: experts that a token is sent to.
        coefficient: what the loss is multiplied by.
        keeps_logits: whether the caller wants the shard's router logits.
        is_open: whether the forward still runs; afterwards routers run only for a recompute.
        statistics: `[2E + 1]` of this rank's tokens, None before the first router; of all ranks'
            behind `loss`.
        gradient: `[E]`, the wanted gradient by each expert's summed probability, while a backward
            pass runs.
        dtype: of the loss.
        logits: of the layers so far, where wanted.
        token: what `close` takes the record out of the context with.
        mask: `[B * S / P]`, False for padding; None where there is none.
    """

    group: ProcessGroup
    top_k: int
    coefficient: float
    keeps_logits: bool
    is_open: bool = True
    statistics: Tensor | None = None
    gradient: Tensor | None = None
    dtype: torch.dtype = torch.float32
    logits: list[Tensor] = field(default_factory=list)
    token: Token[RouterRecord | None] | None = None
    mask: Tensor | None = None

    def count(self, logits: Tensor) -> None:
        """Adds one router's rows `[T, E]`."""
        if self.statistics is None:
            self.mask = _counted(active_description(), self.group, logits.device)
        if self.mask is not None and self.mask.numel() != logits.shape[0]:
            raise ShapeError(
                f"a router saw {logits.shape[0]} tokens of a shard of {self.mask.numel()}, so its "
                "padding can't be "
                f"told. Set {FLAG}=False, or leave the block that has the router whole."
            )
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        found = router_statistics(logits, self.top_k, self.mask)
        self.statistics = found if self.statistics is None else self.statistics + found

    def loss(self, anchor: Tensor) -> Tensor:
        """Returns the router loss of the whole sequence, a scalar whose gradient reaches the
        routers.

        Args:
            anchor: a tensor that the forward computed behind all routers; it gets no gradient of
                this.
        """
        if self.statistics is None:
            raise UnsupportedModelError(
                f"no router ran in a forward that was asked for its router loss. Set {FLAG}=False."
            )
        loss: Tensor = _RouterLoss.apply(anchor, self)  # type: ignore[no-untyped-call]
        return loss

    def close(self) -> None:
        """Ends the forward; routers that run later for it do so in a recompute."""
        self.is_open = False
        if self.token is not None:
            _ACTIVE.reset(self.token)
            self.token = None


class _RouterLoss(torch.autograd.Function):
    """Makes the loss of the sums, and tells the routers its gradient before any of them goes
    back.
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
        # Each rank adds its own tokens' part alone: times their number, the mean over ranks is the
        # gradient.
        record.gradient = load_balance_gradient(record.statistics) * grad * record.group.size()
        _private_api.call_after_backward(partial(_forget, record))
        return torch.zeros((), dtype=ctx.dtype, device=grad.device).expand(ctx.shape), None


def _forget(record: RouterRecord) -> None:
    """A later backward pass through the same graph, without this loss, must not find the gradient
    again.
    """
    record.gradient = None


class _AtRouter(torch.autograd.Function):
    """A router's outputs as they are; their backward adds the router loss's gradient to that of the
    logits.

    All of them go through, because models differ in which they use: one that is used is enough.
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
            probabilities, wanted = router_probabilities(logits), record.gradient
            wanted = wanted.to(probabilities.dtype)
            # [T, E] * [E] -> [T, E]: the softmax's own backward.
            added = probabilities * (wanted - (probabilities * wanted).sum(-1, keepdim=True))
            mask = record.mask
            added = added if mask is None else added * mask[:, None]
            grad = grad + added.to(grad.dtype)
        return None, grad, *others


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _at_router(place: int, _module: nn.Module, _args: Any, output: Any) -> Any:
    """Hook: counts a router's tokens, and lets its backward know of the loss.

    Not compiled: the compiler would take the backward for one that never finds a gradient to add.
    """
    record = _ACTIVE.get()
    if record is None:
        return None
    outputs = output if isinstance(output, tuple) else (output,)
    place = place if isinstance(output, tuple) else 0
    logits = outputs[place]
    if logits is None:
        return None
    if record.is_open:
        with torch.no_grad():
            record.count(logits.detach())
        if record.keeps_logits:
            record.logits.append(logits)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return None
    others = [
        index
        for index, value in enumerate(outputs)
        if index != place and isinstance(value, Tensor) and value.requires_grad
    ]
    changed = _AtRouter.apply(record, logits, *(outputs[index] for index in others))  # type: ignore[no-untyped-call]
    replaced = dict(zip([place, *others], changed, strict=True))
    result = tuple(replaced.get(index, value) for index, value in enumerate(outputs))
    return result if isinstance(output, tuple) else result[0]


def _counted(
    description: SequenceDescription | None, group: ProcessGroup, device: torch.device
) -> Tensor | None:
    """Returns which tokens of this rank's shard are not padding, `[B * S / P]`; None where
    none is.
    """
    if description is None:
        return None
    size = description.batch_size * description.sequence_length
    if not description.has_holes and size == sum(
        stop - start for row in description.rows for start, stop in row
    ):
        return None
    whole = torch.zeros(description.batch_size, description.sequence_length, dtype=torch.bool)
    for row, documents in enumerate(description.rows):
        for start, stop in documents:
            whole[row, start:stop] = True
        for start, stop in description.holes[row] if description.holes else ():
            whole[row, start:stop] = False
    # [B, S] -> [B * S/P]
    return shard_sequence(whole, description, group).reshape(-1).to(device)


@dataclass
class RouterLosses:
    """One model's router loss: the hooks on its routers, and what a forward asks for.

    Args:
        model: the transformers model.
        use: how it makes the loss; a finding where it can't be computed of shards, None where it
            makes none.
        group: the ranks that share each sequence.
        handles: the hooks, from the first forward on that asks for the loss.
    """

    model: Any
    use: RouterLossUse | Finding | None
    group: ProcessGroup
    handles: list[Any] = field(default_factory=list)

    def begin(self, kwargs: dict[str, Any]) -> RouterRecord | None:
        """Starts to count where the loss is asked for, and keeps the model from computing the
        shard's.

        Args:
            kwargs: the forward's; changed in place.

        Raises:
            UnsupportedModelError: it is asked for in this call, and can't be computed of shards.
        """
        if self.use is None:
            return None
        asked = kwargs.get(FLAG)
        is_wanted = getattr(text_config(self.model), FLAG, False) if asked is None else asked
        if is_wanted and isinstance(self.use, Finding):
            raise UnsupportedModelError(f"{type(self.model).__name__}: {self.use}")
        record = None
        if is_wanted and isinstance(self.use, RouterLossUse):
            kwargs[FLAG] = False
            if not self.handles:
                routers = recorded_routers(self.model)
                self.handles += [
                    router.register_forward_hook(partial(_at_router, place))
                    for router, place in routers
                ]
            top_k, coefficient = self._value(self.use.top_k), self._value(self.use.coefficient)
            record = RouterRecord(
                self.group, int(top_k), float(coefficient), keeps_logits=asked is not None
            )
            record.token = _ACTIVE.set(record)
        return record

    def uninstall(self) -> None:
        """Takes the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _value(self, path: tuple[str, ...]) -> Any:
        value = self.model
        for name in path:
            value = getattr(value, name)
        return value


def router_losses(profile: ModelProfile, group: ProcessGroup) -> RouterLosses:
    """Returns a model's router loss, which changes nothing until a forward is asked for it.

    Args:
        profile: of the model.
        group: the ranks that share each sequence.
    """
    return RouterLosses(profile.model, profile.router_loss, group)


def active_record() -> RouterRecord | None:
    """Returns the record of the forward that is running, or runs again."""
    return _ACTIVE.get()


@contextmanager
def running_for(record: RouterRecord | None) -> Iterator[None]:
    """Lets routers inside belong to the forward of `record`, for its recompute."""
    token = _ACTIVE.set(record)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def first_tensor(output: Any) -> Tensor:
    """Returns a tensor of a model's output that lies behind its routers."""
    values = output if isinstance(output, tuple) else output.values()
    return next(
        value for value in values if isinstance(value, Tensor) and value.is_floating_point()
    )


def put_router_loss(output: Any, loss: Tensor, record: RouterRecord, place: int = 0) -> Any:
    """Returns a model's output with its router loss, in the place that transformers gives it.

    Args:
        output: of the forward.
        loss: the router loss, the same on every rank of the group.
        record: of the forward.
        place: the loss's, where the output is a tuple.
    """
    loss = shared_scalar(loss, record.group)
    # The graph holds the record: what it kept of the graph would never be freed.
    logits = tuple(record.logits)
    record.logits.clear()
    if isinstance(output, tuple):
        return (*output[:place], loss, *output[place:], *([logits] if record.keeps_logits else []))
    output["aux_loss"] = loss
    names = [entry.name for entry in fields(output)]
    # Outputs that have no place for them, as those of TRL's loss heads, could not be made anew by
    # an engine.
    if record.keeps_logits and "router_logits" in names:
        output["router_logits"] = logits
    for name in names:
        # By their places a Trainer's metrics tell them apart.
        if name in output:
            output.move_to_end(name)
    return output
