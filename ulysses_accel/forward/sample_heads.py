"""Gives poolers and heads of whole samples what they read, while the layers before them compute
shards.

A head's forward runs on every rank as it does in one process: it gets the full tokens and mask, and
whichever part of the layers' result it reads: the first token, each token's logits, or all. The
layers between get their shards back. What follows the exchange is the same on all ranks, so the
mean over ranks of its gradients is one process's; the exchange's backward sums over ranks, which
makes that true of the layers too.

Rows end at the batch's last token that is not padding. Padding is no answer's start or end: its
logits are the lowest number there is, so that a padded row has the loss that it has alone, where
one process would count its padding.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ulysses_accel.distributed.collectives import all_reduce
from ulysses_accel.errors import BatchError
from ulysses_accel.forward.context import ForwardFeature, ModelToShard, sharded_batch
from ulysses_accel.forward.override import Forward, override_forward
from ulysses_accel.installation import Installation
from ulysses_accel.introspection.source import parameters
from ulysses_accel.sequence.description import SequenceDescription
from ulysses_accel.sequence.gather import gather_sequence, unit_numbers
from ulysses_accel.sequence.loss import mean_as_share
from ulysses_accel.sequence.running import running_description


class FirstTokens(ForwardFeature):
    """Gives modules that read a row's first token the one of the full row."""

    def __init__(self, target: ModelToShard, changes: Installation) -> None:
        profile = target.profile
        if profile.encoder is not None:
            return
        # A loss of first tokens must not be one of padding; anything else made of it is NaN.
        must_be_known = profile.loss is not None and profile.loss.is_of_samples
        for one in profile.first_tokens:
            hook = FirstTokenHook(target.group, one.is_cut, must_be_known)
            changes.hooks([one.module.register_forward_pre_hook(hook, with_kwargs=True)])


def mean_of_samples(
    loss: Tensor,
    labels: Tensor | None,
    num_items: Tensor | int | None,
    group: ProcessGroup,
) -> Tensor:
    """Returns the mean over samples from each rank's, which differ at most by dropout after the
    exchange.

    Args:
        loss: scalar, the mean over the rows of this rank's batch, which the ranks of `group` share.
        labels: of these rows; None where there are others.
        num_items: `count_items` over all ranks and accumulation steps; None for the mean over this
            batch.
        group: the ranks that share each sequence, or with `num_items` all ranks.

    Returns:
        Scalar, the same on every rank of `group`.
    """
    if labels is None or num_items is None:
        return all_reduce(loss / group.size(), group)
    return all_reduce(mean_as_share(loss, labels, num_items), group)


@dataclass(frozen=True)
class FirstTokenHook:
    """Replaces a module's sequence, or its shard's first token, by the first token of the full row.

    Args:
        group: the ranks that share each sequence, of which the first holds the first token.
        takes_token: whether the module is given that token alone `[B, D]`.
        must_be_known: whether a row that begins with padding is refused.
    """

    group: ProcessGroup
    takes_token: bool
    must_be_known: bool

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replaces the module's first argument."""
        description = running_description()
        if description is None or description.num_shards == 1 or not args:
            return None
        hidden = args[0]
        expected = (
            (description.batch_size,)
            if self.takes_token
            else (description.batch_size, description.shard_length)
        )
        if tuple(hidden.shape[:-1]) != expected:
            return None
        padded = _begin_with_padding(description)
        if padded and self.must_be_known:
            raise BatchError(
                f"row {padded[0]} of the batch begins with padding, and {type(module).__name__} "
                "computes the loss from each row's first token. Pad the rows on the right "
                "(padding_side='right')."
            )
        first = _first(hidden if self.takes_token else hidden[:, :1], self.group)
        if padded:
            first = first.index_fill(0, torch.tensor(padded, device=first.device), torch.nan)
        return (first, *args[1:]), kwargs


def _first(tokens: Tensor, group: ProcessGroup) -> Tensor:
    """Returns the first rank's tokens on all ranks; in every layout its first one is the
    sequence's.
    """
    # Masked, not replaced by new zeros: backward's collective must run on every rank, so every
    # rank's tokens must be in the graph.
    return all_reduce(
        tokens.masked_fill(torch.tensor(group.rank() != 0, device=tokens.device), 0.0), group
    )


def _begin_with_padding(description: SequenceDescription) -> list[int]:
    return [number for number, row in enumerate(description.rows) if not row or row[0][0] > 0]


@dataclass(frozen=True)
class SampleView:
    """The full batch, as a head of whole samples sees it.

    Args:
        description: of the batch.
        input_ids: `[B, S / P]` of this rank, as the layers see it.
        real: `[B, T]`, True for tokens that are not padding.
    """

    description: SequenceDescription
    input_ids: Tensor | None
    real: Tensor


class SampleHeads(ForwardFeature):
    """Runs the forward of a model with a head of whole samples on the full batch, and its layers on
    shards.
    """

    def __init__(self, target: ModelToShard, changes: Installation) -> None:
        head = target.profile.sample_head
        if head is None:
            return
        self._group = target.group
        self._reads, self._answers = head.reads, head.answers
        self._has_warned = False
        changes.hooks(
            [
                head.base.register_forward_pre_hook(self._before_layers, with_kwargs=True),
                head.base.register_forward_hook(self._after_layers),
            ]
        )
        changes.hooks([linear.register_forward_hook(self._after_linear) for linear in head.linears])
        override_forward(target.profile.model, self._around_head, changes)

    def _around_head(
        self, model: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Gives the head the full batch's tokens and mask."""
        batch = sharded_batch()
        if batch is None or batch.description is None:
            return forward(*args, **kwargs)
        description, kwargs = batch.description, _by_name(model, args, kwargs)
        ids = kwargs.get("input_ids")
        real = (unit_numbers(description) >= 0)[:, : _length(description)]
        self._check(type(model).__name__, description, ids is not None, real)
        self._warn_of_padding(type(model).__name__, real)
        real = real.to((ids if ids is not None else kwargs["inputs_embeds"]).device)
        view = batch.samples = SampleView(description, ids, real)
        if ids is not None:
            kwargs["input_ids"] = self._full_ids(model, ids, view)
        if "attention_mask" in parameters(model):
            kwargs["attention_mask"] = real.to(torch.long)
        return forward(**kwargs)

    def _check(
        self, name: str, description: SequenceDescription, has_ids: bool, real: Tensor
    ) -> None:
        """Refuses batches that the head can't be computed for; all ranks see the same."""
        if description.is_packed:
            counts = [len(documents) for documents in description.rows]
            count = max(counts)
            row = counts.index(count)
            raise BatchError(
                f"row {row} of the batch holds {count} packed documents, but {name} computes one "
                "loss for each row. Give each document a row of its own."
            )
        padded = _begin_with_padding(description)
        if padded and self._reads == "first":
            raise BatchError(
                f"row {padded[0]} of the batch begins with padding, and {name} computes its loss "
                "from each row's first token. Pad the rows on the right (padding_side='right')."
            )
        if self._answers and self._reads != "logits" and not bool(real.all()):
            raise BatchError(
                f"the batch is padded, and {name} finds answers among all tokens in a way that "
                "padding can't be left out of. Give rows of equal length, or one row at a time."
            )
        if (
            not has_ids
            and not self._answers
            and self._reads == "logits"
            and not bool(real[:, -1].all())
        ):
            raise BatchError(
                f"the batch is padded on the right and has inputs_embeds alone, of which {name} "
                "would read the last index of each row. Pad the rows on the left, or give "
                "input_ids."
            )

    def _warn_of_padding(self, name: str, real: Tensor) -> None:
        """Says once that the loss of padded rows is not the one that one process computes."""
        if self._has_warned or not self._answers or bool(real.all()):
            return
        self._has_warned = True
        warnings.warn(
            f"{name} is given padded rows: on sharded sequences no answer starts or ends in "
            "padding, so each row has the loss that it has alone. One process counts padding among "
            "the places of an answer, so its loss is another one.",
            stacklevel=2,
        )

    def _full_ids(self, model: nn.Module, ids: Tensor, view: SampleView) -> Tensor:
        """Returns the full tokens, in which padding is the padding token that the head looks
        for.
        """
        full = self._gathered(ids, view)
        config: Any = model.config
        padding = config.get_text_config().pad_token_id
        return full if padding is None else full.masked_fill(~view.real, padding)

    def _before_layers(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Gives the layers their shard back."""
        view = _sample_view()
        if view is None:
            return None
        kwargs = {**_by_name(base, args, kwargs), "input_ids": view.input_ids}
        kwargs.pop("attention_mask", None)
        return (), kwargs

    def _after_layers(self, _base: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        """Gives the head what it reads of the layers' result."""
        view = _sample_view()
        if view is None or self._reads not in ("first", "all"):
            return None
        hidden = output[0]
        if self._reads == "first":
            read = _first(hidden[:, :1], self._group)
        else:
            read = self._gathered(hidden, view)
        if isinstance(output, tuple):
            return (read, *output[1:])
        output["last_hidden_state"] = read
        return output

    def _after_linear(
        self, _linear: nn.Module, _args: tuple[Any, ...], logits: Tensor
    ) -> Tensor | None:
        """Gives the head every token's logits."""
        view = _sample_view()
        if view is None:
            return None
        full = self._gathered(logits, view)
        if self._answers:
            return full.masked_fill(~view.real.unsqueeze(-1), torch.finfo(full.dtype).min)
        return full

    def _gathered(self, tensor: Tensor, view: SampleView) -> Tensor:
        # [B, S/P, ...] -> [B, T, ...]
        return gather_sequence(tensor, view.description, self._group)[:, : view.real.shape[1]]


def _sample_view() -> SampleView | None:
    batch = sharded_batch()
    return None if batch is None else batch.samples


def _length(description: SequenceDescription) -> int:
    """Returns where the batch's last token that is not padding lies, counted from 1."""
    return max((row[-1][1] for row in description.rows if row), default=description.sequence_length)


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns all arguments of a call by their names."""
    names = list(parameters(module))[1:]
    return {**dict(zip(names, args)), **kwargs}
