"""XTuner's `dispatch_modules`: one call makes a model compute split batches exactly, without an
Accelerator.

A forward is sharded in training, and wherever its arguments are what `split_for_sequence_parallel`
returned, or shards with a full mask. In evaluation any other batch (shards that were moved to
another device and have no mask) is taken for a full one, as by XTuner, unless `in_evaluation` says
that all batches are split.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ulysses_accel.attention import SequenceAttention
from ulysses_accel.compat.xtuner.batch import described, is_split
from ulysses_accel.compat.xtuner.groups import get_sequence_parallel_group
from ulysses_accel.compat.xtuner.models import CustomAttention, adapt, find_custom_attention
from ulysses_accel.distributed.mesh import ring_and_ulysses_groups
from ulysses_accel.errors import MeshError, UnsupportedModelError
from ulysses_accel.forward.sharded import ShardedForward, shard_forward
from ulysses_accel.installation import Installation
from ulysses_accel.introspection.profile import ModelProfile, profile_of
from ulysses_accel.introspection.source import parameters
from ulysses_accel.introspection.structure import text_config, transformers_model
from ulysses_accel.sequence.batch_rules import BatchRules
from ulysses_accel.sequence.description import DESCRIPTION_KEY
from ulysses_accel.sequence.loss import aggregate_loss, shared_scalar

_ATTRIBUTE = "xtuner_dispatch"


@dataclass
class Dispatched:
    """What `dispatch_modules` did to one model.

    Args:
        group: the ranks that share its sequences; None where no sequence is shared, and nothing was
            changed.
        ring_size: ring attention degree: the ranks beyond those that the heads are partitioned
            over.
        rules: what the model requires of a batch.
        makes_loss: whether the loss is computed here, from the model's logits.
        in_evaluation: whether batches are split in evaluation too.
        forward: its sharded forward.
        changes: what was set on the model, and its hooks.
        pending: for each running forward the labels of its loss.
    """

    group: ProcessGroup | None
    ring_size: int = 1
    rules: BatchRules = field(default_factory=BatchRules)
    makes_loss: bool = False
    in_evaluation: bool = False
    forward: ShardedForward | None = None
    changes: Installation = field(default_factory=Installation)
    pending: list[Tensor | None] = field(default_factory=list)

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Describes a split batch; a full one, and one described already, stays unchanged."""
        self.pending.append(None)
        names = [
            name for name, one in parameters(model).items() if one.kind is one.POSITIONAL_OR_KEYWORD
        ][1:]
        if self.group is None or DESCRIPTION_KEY in kwargs or len(args) > len(names):
            return None
        batch = {**dict(zip(names, args)), **kwargs}
        if not (model.training or self.in_evaluation or is_split(batch, self.group.size())):
            return None
        batch = described(batch, self.group, self.ring_size, self.rules, type(model).__name__)
        if self.makes_loss:
            self.pending[-1] = batch.pop("shift_labels", None)
        return (), batch

    def after(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Adds the full batch's loss to the output of a model that can't compute it; runs also
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

    def close(self) -> None:
        """Restores the model."""
        self.changes.close()


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

    Call it after `init_sequence_parallel`, and before the model is wrapped
    (DistributedDataParallel, DeepSpeed). The model's loss is then that of the full sequence, the
    same on every rank that shares it. Ranks beyond the model's heads form a ring.

    Args:
        model: a transformers model, or one that an adapter library wrapped; changed in place,
            reversibly.
        use_varlen_attn: accepted and not needed: packed documents are recognized by positions that
            start again.
        in_evaluation: whether all batches are split under `model.eval()` too, as for a reference
            model or a teacher.

    Returns:
        What was done; its `close()` restores the model.

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
            f"{dist.get_world_size()} processes. Call init_sequence_parallel(n) first, with n=1 "
            "for no sequence parallelism."
        )
    if group is None or group.size() == 1:
        return Dispatched(None)
    done = _dispatch(model, group)
    done.in_evaluation = in_evaluation
    return done


def _dispatch(model: nn.Module, group: ProcessGroup) -> Dispatched:
    inner = transformers_model(model)
    custom = find_custom_attention(inner)
    ulysses_size = heads_size(inner, group.size())
    profile = profile_of(inner, ulysses_size)
    _check(profile, custom)
    ring_size = group.size() // ulysses_size
    ring, ulysses = (
        (None, group) if ring_size == 1 else ring_and_ulysses_groups(ring_size, ulysses_size)
    )
    done = Dispatched(group, ring_size, profile.requirements.rules, makes_loss=bool(custom))
    if custom:
        # The loss of such a model is computed here, from its logits.
        profile = replace(profile, loss=None)
    try:
        _install(done, model, profile, SequenceAttention(ulysses, ring), group, custom)
    except UnsupportedModelError:
        done.close()
        raise
    return done


def _install(
    done: Dispatched,
    model: nn.Module,
    profile: ModelProfile,
    attention: SequenceAttention,
    group: ProcessGroup,
    custom: CustomAttention,
) -> None:
    world = dist.group.WORLD
    assert world is not None
    # Before the sharded forward, which takes a described batch.
    done.changes.hooks([model.register_forward_pre_hook(done.before, with_kwargs=True)])
    done.forward = shard_forward(model, profile, attention, group, world)
    done.changes.callback(done.forward.close)
    if custom:
        adapt(transformers_model(model), custom, done.forward.attention, done.changes)
    done.changes.hooks(
        [model.register_forward_hook(done.after, with_kwargs=True, always_call=True)]
    )
    done.changes.set(model, _ATTRIBUTE, done)


def heads_size(model: Any, size: int) -> int:
    """Returns the Ulysses degree: the largest divisor of the ranks that share a sequence at which
    every rank has a head.
    """
    config = text_config(model)
    heads = [getattr(config, name, None) for name in ("num_attention_heads", "n_head", "n_heads")]
    most = min([number for number in heads if isinstance(number, int)], default=size)
    return max(number for number in range(1, size + 1) if size % number == 0 and number <= most)


def _check(profile: ModelProfile, custom: CustomAttention) -> None:
    model = profile.model
    findings = [
        finding for finding in profile.findings if not (custom and custom.covers(finding, model))
    ]
    if findings:
        listed = "\n".join(f"- {finding}" for finding in findings)
        raise UnsupportedModelError(
            f"{type(model).__name__} can't be trained exactly with sequence_parallel_size above 1 "
            f"(from init_sequence_parallel):\n{listed}"
        )
