"""XTuner's `dispatch_modules`: one call makes a model compute split batches exactly, without an
Accelerator.

A forward is sharded in training, and wherever it is given what `split_for_sequence_parallel`
returned, or parts with a whole mask. In evaluation anything else (parts that were moved to another
device and have no mask) is taken for whole, as XTuner takes it, unless `in_evaluation` says that
all batches are split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ulysses_accel.attention import SequenceAttention
from ulysses_accel.compat.xtuner.batch import described, is_split
from ulysses_accel.compat.xtuner.groups import get_sequence_parallel_group
from ulysses_accel.compat.xtuner.models import OwnAttention, adapt, find_own_attention
from ulysses_accel.distributed.mesh import ring_and_ulysses_groups
from ulysses_accel.errors import MeshError, UnsupportedModelError
from ulysses_accel.forward.sharded import ShardedForward, shard_forward
from ulysses_accel.introspection.requirements import rules_of
from ulysses_accel.introspection.source import parameters
from ulysses_accel.introspection.structure import text_config, transformers_model
from ulysses_accel.introspection.supports import find
from ulysses_accel.sequence.batch_rules import BatchRules
from ulysses_accel.sequence.description import DESCRIPTION_KEY
from ulysses_accel.sequence.loss import aggregate_loss, shared_scalar

_ATTRIBUTE = "xtuner_dispatch"


@dataclass
class Dispatched:
    """What `dispatch_modules` did to one model.

    Args:
        model: the model.
        group: the ranks that share its sequences; None where no sequence is shared, and nothing was
            changed.
        ring_size: ranks beyond those that the heads are dealt to, which form a ring.
        rules: what it asks of a batch.
        makes_loss: whether the loss is computed here, of the model's logits.
        in_evaluation: whether batches are split in evaluation too.
        forward: its sharded forward.
        undo: what takes the rest back, the last first.
        pending: for each running forward the labels of its loss.
    """

    model: nn.Module
    group: ProcessGroup | None
    ring_size: int = 1
    rules: BatchRules = field(default_factory=BatchRules)
    makes_loss: bool = False
    in_evaluation: bool = False
    forward: ShardedForward | None = None
    undo: list[Callable[[], None]] = field(default_factory=list)
    pending: list[Tensor | None] = field(default_factory=list)

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Describes a split batch; leaves a whole one, and one that is described already, alone."""
        self.pending.append(None)
        return self._described(model, args, kwargs)

    def _described(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = [
            name for name, one in parameters(model).items() if one.kind is one.POSITIONAL_OR_KEYWORD
        ][1:]
        if self.group is None or DESCRIPTION_KEY in kwargs or len(args) > len(names):
            return None
        given = {**dict(zip(names, args)), **kwargs}
        if not (model.training or self.in_evaluation or is_split(given, self.group.size())):
            return None
        made = described(given, self.group, self.ring_size, self.rules, type(model).__name__)
        if self.makes_loss:
            self.pending[-1] = made.pop("shift_labels", None)
        return (), made

    def after(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Adds the whole batch's loss to the output of a model that can't compute it; runs also
        after a failure.
        """
        labels = self.pending.pop()
        if labels is None or output is None or self.group is None:
            return None
        logits: Tensor = output[0] if isinstance(output, tuple) else output.logits
        loss = shared_scalar(
            aggregate_loss(next_token_loss(logits, labels), labels, self.group), self.group
        )
        if isinstance(output, tuple):
            return (loss, *output)
        return type(output)(**{**dict(output), "loss": loss})

    def uninstall(self) -> None:
        """Gives the model back what it had."""
        while self.undo:
            self.undo.pop()()
        if hasattr(self.model, _ATTRIBUTE):
            delattr(self.model, _ATTRIBUTE)


def next_token_loss(logits: Tensor, shift_labels: Tensor) -> Tensor:
    """Returns the mean cross entropy of this rank's counted tokens, NaN where there is none, in
    float32 at least.

    Args:
        logits: `[B, s, V]`.
        shift_labels: `[B, s]`, each token's next one.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), shift_labels.flatten().to(logits.device))


def dispatch_modules(
    model: nn.Module, use_varlen_attn: bool = False, *, in_evaluation: bool = False
) -> Dispatched:
    """Makes a model compute what `split_for_sequence_parallel` returns exactly; every rank must
    call it.

    Call it behind `init_sequence_parallel`, and before the model is wrapped
    (DistributedDataParallel, DeepSpeed). The model's loss is then the whole sequence's, the same on
    every rank that shares it. Ranks beyond the model's heads form a ring.

    Args:
        model: a transformers model, or one that an adapter library wrapped; changed in place,
            reversibly.
        use_varlen_attn: taken and not needed: positions that start over tell packed documents
            apart.
        in_evaluation: whether all batches are split under `model.eval()` too, as for a reference
            model or a teacher.

    Returns:
        What was done; its `uninstall()` restores the model.

    Raises:
        MeshError: several processes run, and `init_sequence_parallel` was not called.
        UnsupportedModelError: the model has a part that can't be computed exactly, with every
            reason.
    """
    known = vars(model).get(_ATTRIBUTE)
    if isinstance(known, Dispatched):
        return known
    group = get_sequence_parallel_group()
    if group is None and dist.is_initialized() and dist.get_world_size() > 1:
        raise MeshError(
            "dispatch_modules was called before init_sequence_parallel, on "
            f"{dist.get_world_size()} processes. Call "
            f"init_sequence_parallel(n) first, with n=1 for no sequence parallelism."
        )
    if group is None or group.size() == 1:
        return Dispatched(model, None)
    done = _dispatch(model, group)
    done.in_evaluation = in_evaluation
    return done


def _dispatch(model: nn.Module, group: ProcessGroup) -> Dispatched:
    inner = transformers_model(model)
    own = find_own_attention(inner)
    ulysses_size = heads_size(inner, group.size())
    _check(inner, own, ulysses_size)
    ring_size = group.size() // ulysses_size
    ring, ulysses = (
        (None, group) if ring_size == 1 else ring_and_ulysses_groups(ring_size, ulysses_size)
    )
    done = Dispatched(model, group, ring_size, rules_of(inner), makes_loss=bool(own))
    try:
        _install(done, SequenceAttention(ulysses, ring), group, own)
    except UnsupportedModelError:
        done.uninstall()
        raise
    return done


def _install(
    done: Dispatched, attention: SequenceAttention, group: ProcessGroup, own: OwnAttention
) -> None:
    model, world = done.model, dist.group.WORLD
    assert world is not None
    # Before the sharded forward, which takes a described batch.
    done.undo.append(model.register_forward_pre_hook(done.before, with_kwargs=True).remove)
    done.forward = shard_forward(model, attention, group, world, computes_loss=not own)
    done.undo.append(done.forward.close)
    if own:
        done.undo.append(adapt(transformers_model(model), own, done.forward.attention))
    done.undo.append(
        model.register_forward_hook(done.after, with_kwargs=True, always_call=True).remove
    )
    setattr(model, _ATTRIBUTE, done)


def heads_size(model: Any, size: int) -> int:
    """Returns over how many of the ranks that share a sequence a model's heads are dealt: the most
    that have one.
    """
    config = text_config(model)
    heads = [getattr(config, name, None) for name in ("num_attention_heads", "n_head", "n_heads")]
    most = min([number for number in heads if isinstance(number, int)], default=size)
    return max(number for number in range(1, size + 1) if size % number == 0 and number <= most)


def _check(model: nn.Module, own: OwnAttention, ulysses_size: int) -> None:
    findings = [
        finding
        for finding in find(model, ulysses_size)
        if not (own and own.settles(finding, model))
    ]
    if findings:
        listed = "\n".join(f"- {finding}" for finding in findings)
        raise UnsupportedModelError(
            f"{type(model).__name__} can't be trained exactly with sequence_parallel_size above 1 "
            "(from "
            f"init_sequence_parallel):\n{listed}"
        )
