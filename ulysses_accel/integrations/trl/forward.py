"""TRL's forwards: full batches in, each token's numbers of the full sequence out, a shard of it in
between.

TRL's trainers compute labels, masks and reference passes of full batches, and losses of one number
for each token, which a `fused_lm_head` computes without logits. So all ranks of a sequence group
give the model the same full batch; what costs memory, hidden states and logits, only ever exists
for this rank's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ulysses_accel.dataloader.batch_layout import BatchLayout
from ulysses_accel.dataloader.pipeline import Refiller
from ulysses_accel.distributed.mesh import SequenceGroups
from ulysses_accel.errors import BatchError
from ulysses_accel.installation import Removable
from ulysses_accel.sequence.batch_rules import RulesSource
from ulysses_accel.sequence.description import DESCRIPTION_KEY, SequenceDescription
from ulysses_accel.sequence.gather import gather_sequence

# What TRL's models return for each token, besides logits, which a user's metrics or loss may need.
_FUSED = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")
_NOT_GATHERED = ("output_hidden_states", "output_attentions")


@dataclass(frozen=True)
class _Running:
    """A forward between its two hooks: its batch, and the tokens in a row of it before padding."""

    description: SequenceDescription
    length: int


@dataclass
class FullBatchForward:
    """The two hooks on one model.

    Args:
        groups: this rank's place in the mesh.
        refiller: agrees on a batch and shards it.
        running: forwards between their two hooks, the innermost last; None for those that stay as
            they are.
        count: forwards so far.
    """

    groups: SequenceGroups
    refiller: Refiller
    running: list[_Running | None] = field(default_factory=list)
    count: int = 0

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Gives the model this rank's shard in place of a full batch; forwards that keep keys are
        those of generation.
        """
        # `after` runs for a forward that raises here, too.
        self.running.append(None)
        is_loss = kwargs.get("fused_lm_head") or kwargs.get("use_cache") is False
        if args or not is_loss or DESCRIPTION_KEY in kwargs:
            return None
        refuse_lost_outputs(model, kwargs)
        tokens = kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        batch = {name: _on_host(value) for name, value in kwargs.items() if value is not None}
        self.count += 1
        refilled = self.refiller.refill(lambda: (batch, False), self.count)
        assert refilled is not None
        ((local,), _) = refilled
        self.running[-1] = _Running(local[DESCRIPTION_KEY], tokens.shape[1])
        return args, {name: _placed(value, tokens.device) for name, value in local.items()}

    def after(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Puts the full sequence's numbers into the output; runs also when the forward raised, with
        no output.
        """
        running = self.running.pop()
        if running is None or output is None:
            return None
        shard_shape = (running.description.batch_size, running.description.shard_length)
        fused = {name: output[name] for name in _FUSED if output.get(name) is not None}
        if fused:
            self._gather_fused(output, fused, running)
        elif output.get("logits") is not None and tuple(output["logits"].shape[:2]) == shard_shape:
            # [B, S/P, V] -> [B, S, V]
            full = gather_sequence(output["logits"], running.description, self.groups.group)
            output["logits"] = full[:, : running.length]
        return output

    def _gather_fused(self, output: Any, fused: dict[str, Tensor], running: _Running) -> None:
        """Gathers all numbers of the tokens in one exchange; a row's last token has no label."""
        widest = fused["log_probs"].dtype
        local = torch.stack([tensor.to(widest) for tensor in fused.values()], dim=-1)
        # [B, S/P, N] -> [B, S, N]
        full = gather_sequence(local, running.description, self.groups.group)
        numbers = full[:, : running.length - 1].unbind(-1)
        for (name, tensor), gathered in zip(fused.items(), numbers, strict=True):
            output[name] = gathered.to(tensor.dtype)


def take_full_batches(
    model: nn.Module, groups: SequenceGroups, layout: BatchLayout, rules: RulesSource
) -> tuple[Removable, Removable]:
    """Makes a model take full batches, of which every rank of a sequence group has the same one.

    Args:
        model: which `shard_forward` changes after this.
        groups: this rank's place in the mesh.
        layout: how batches are padded and sharded.
        rules: what the model requires of a batch.

    Returns:
        The hook handles.
    """
    refiller = Refiller(layout, groups.rank, groups.cpu_group, True, "error", False, rules)
    forward = FullBatchForward(groups, refiller)
    return (
        model.register_forward_pre_hook(forward.before, prepend=True, with_kwargs=True),
        model.register_forward_hook(forward.after, with_kwargs=True, always_call=True),
    )


def refuse_lost_outputs(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuses outputs of layers, which would be a shard's where the caller counts on the full
    sequence's.
    """
    lost = [name for name in _NOT_GATHERED if kwargs.get(name)]
    if lost:
        raise BatchError(
            f"{type(model).__name__} was called with {', '.join(lost)}, which are not gathered "
            "over the ranks that share a sequence. Leave it out, or use sp_size=1 and cp_size=1."
        )


def _on_host(value: Any) -> Any:
    """Returns tokens, masks and labels on the host, where batches are described; other tensors
    stay.
    """
    is_token_data = isinstance(value, Tensor) and not value.is_floating_point()
    return value.cpu() if is_token_data else value


def _placed(value: Any, device: torch.device) -> Any:
    return value.to(device).contiguous() if isinstance(value, Tensor) else value
