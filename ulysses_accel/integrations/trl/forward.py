"""TRL's forwards: whole batches in, each token's numbers of the whole sequence out, a shard of it
in between.

TRL's trainers make labels, masks and reference passes of whole batches, and their losses of one
number for each token, which a `fused_lm_head` computes without logits. So all ranks of a sequence
group give the model the same whole batch; what costs memory, hidden states and logits, is only ever
there for this rank's tokens.
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
from ulysses_accel.sequence.batch_rules import RulesSource
from ulysses_accel.sequence.description import DESCRIPTION_KEY, SequenceDescription
from ulysses_accel.sequence.gather import gather_sequence

# What transformers' outputs hold of each token, besides logits, which a user's own metrics or loss
# may ask for.
_FUSED = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")
_NOT_GATHERED = ("output_hidden_states", "output_attentions")


@dataclass(frozen=True)
class _Running:
    """A forward between its two hooks: its batch, and the tokens in a row of it before padding."""

    description: SequenceDescription
    length: int


@dataclass
class WholeForward:
    """The hooks on one model, and the way to take them off.

    Args:
        groups: this rank's place in the mesh.
        refiller: agrees on a batch and cuts it.
        handles: the hooks.
        running: forwards between their two hooks, the innermost last; None for those that are left
            alone.
        count: forwards so far.
    """

    groups: SequenceGroups
    refiller: Refiller
    handles: list[Any] = field(default_factory=list)
    running: list[_Running | None] = field(default_factory=list)
    count: int = 0

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Gives the model this rank's shard in place of a whole batch; forwards that keep keys are
        generation's.
        """
        # `after` runs for a forward that raises here, too.
        self.running.append(None)
        is_loss = kwargs.get("fused_lm_head") or kwargs.get("use_cache") is False
        if args or not is_loss or DESCRIPTION_KEY in kwargs:
            return None
        refuse_lost_outputs(model, kwargs)
        tokens = next(
            kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None
        )
        batch = {name: _on_host(value) for name, value in kwargs.items() if value is not None}
        self.count += 1
        refilled = self.refiller.refill(lambda: (batch, False), self.count)
        assert refilled is not None
        ((local,), _) = refilled
        self.running[-1] = _Running(local[DESCRIPTION_KEY], tokens.shape[1])
        return args, {name: _placed(value, tokens.device) for name, value in local.items()}

    def after(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Puts the whole sequence's numbers into the output; runs also when the forward raised,
        with no output.
        """
        running = self.running.pop()
        if running is None or output is None:
            return None
        shard_shape = (running.description.batch_size, running.description.shard_length)
        found = {name: output[name] for name in _FUSED if output.get(name) is not None}
        if found:
            self._gather_fused(output, found, running)
        elif output.get("logits") is not None and tuple(output["logits"].shape[:2]) == shard_shape:
            output["logits"] = self._whole(output["logits"], running)[:, : running.length]
        return output

    def _gather_fused(self, output: Any, found: dict[str, Tensor], running: _Running) -> None:
        """Gathers all numbers of the tokens in one exchange; the label of a row's last token is no
        token's.
        """
        widest = found["log_probs"].dtype
        # [B, S/P] each -> [B, S, N]
        whole = self._whole(
            torch.stack([tensor.to(widest) for tensor in found.values()], dim=-1), running
        )
        parts = whole[:, : running.length - 1].unbind(-1)
        for (name, tensor), part in zip(found.items(), parts, strict=True):
            output[name] = part.to(tensor.dtype)

    def _whole(self, tensor: Tensor, running: _Running) -> Tensor:
        return gather_sequence(tensor, running.description, self.groups.group)

    def uninstall(self) -> None:
        """Takes the hooks off the model."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def whole_forward(
    model: nn.Module, groups: SequenceGroups, layout: BatchLayout, rules: RulesSource
) -> WholeForward:
    """Makes a model take whole batches, of which every rank of a sequence group has the same one.

    Args:
        model: that `shard_forward` installs its hooks on, after these.
        groups: this rank's place in the mesh.
        layout: how batches are padded and cut.
        rules: what the model asks of a batch.

    Returns:
        The installation; its `uninstall()` restores the model.
    """
    refiller = Refiller(layout, groups.rank, groups.cpu_group, True, "error", False, rules)
    whole = WholeForward(groups, refiller)
    whole.handles = [
        model.register_forward_pre_hook(whole.before, prepend=True, with_kwargs=True),
        model.register_forward_hook(whole.after, with_kwargs=True, always_call=True),
    ]
    return whole


def refuse_lost_outputs(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuses outputs of layers, which would be a shard's where the caller counts on the whole
    sequence's.
    """
    found = [name for name in _NOT_GATHERED if kwargs.get(name)]
    if found:
        raise BatchError(
            f"{type(model).__name__} was called with {', '.join(found)}, which are not gathered "
            "over the "
            f"ranks that share a sequence. Leave it out, or use sp_size=1 and cp_size=1."
        )


def _on_host(value: Any) -> Any:
    """Returns tokens, masks and labels on the host, where batches are described; other tensors
    stay.
    """
    is_token_data = isinstance(value, Tensor) and not value.is_floating_point()
    return value.cpu() if is_token_data else value


def _placed(value: Any, device: torch.device) -> Any:
    return value.to(device).contiguous() if isinstance(value, Tensor) else value
