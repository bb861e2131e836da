"""Gives poolers and heads of whole samples what they read, while the layers before them compute
shards.

A head's forward is run on every rank as one process runs it: it is given the whole tokens and mask,
and of the layers' result whichever part it reads: the first token, each token's logits, or all. The
layers between get their shards back. What is behind the exchange is the same on all ranks, so the
mean over ranks of its gradients is one process's; the exchange's backward sums over ranks, which
makes that true of the layers too.

Rows end at the batch's last token that is not padding. Padding is no answer's start or end: its
logits are the lowest number there is, so that a padded row has the loss that it has alone, where
one process would count its padding.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ulysses_accel.attention import active_description
from ulysses_accel.distributed.collectives import all_reduce
from ulysses_accel.errors import BatchError
from ulysses_accel.introspection.sample_heads import FirstToken, SampleHead
from ulysses_accel.introspection.source import parameters
from ulysses_accel.sequence.description import SequenceDescription
from ulysses_accel.sequence.gather import gather_sequence, unit_numbers
from ulysses_accel.sequence.loss import mean_as_share

Handles = list[Any]


def hook_first_tokens(
    found: Sequence[FirstToken], group: ProcessGroup, must_be_known: bool
) -> Handles:
    """Gives modules that read a row's first token the one of the whole row.

    Args:
        found: the modules.
        group: the ranks that share each sequence, of which the first holds the first token.
        must_be_known: whether a row that begins with padding is refused, because a loss is made of
            its first token; otherwise what is made of it is NaN.

    Returns:
        What takes the hooks off.
    """
    return [
        one.module.register_forward_pre_hook(
            _GiveFirst(group, one.is_cut, must_be_known), with_kwargs=True
        )
        for one in found
    ]


def mean_of_samples(
    loss: Tensor,
    labels: Tensor | None,
    num_items: Tensor | int | None,
    group: ProcessGroup,
) -> Tensor:
    """Returns the mean over samples from each rank's, which differ by dropout behind the exchange
    at most.

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
class _GiveFirst:
    """Replaces a module's sequence, or its own shard's first token, by the first token of the whole
    row.
    """

    group: ProcessGroup
    is_cut: bool
    must_be_known: bool

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        description = active_description()
        if description is None or description.num_shards == 1 or not args:
            return None
        hidden = args[0]
        expected = (
            (description.batch_size,)
            if self.is_cut
            else (description.batch_size, description.shard_length)
        )
        if tuple(hidden.shape[:-1]) != expected:
            return None
        padded = _begin_with_padding(description)
        if padded and self.must_be_known:
            raise BatchError(
                f"row {padded[0]} of the batch begins with padding, and {type(module).__name__} "
                "makes the loss of each "
                f"row's first token. Pad the rows on the right (padding_side='right')."
            )
        first = _first(hidden if self.is_cut else hidden[:, :1], self.group)
        if padded:
            first = first.index_fill(0, torch.tensor(padded, device=first.device), torch.nan)
        return (first, *args[1:]), kwargs


def _first(tokens: Tensor, group: ProcessGroup) -> Tensor:
    """Returns the first rank's tokens on all ranks; in every layout its first one is the
    sequence's.
    """
    # Filled, not made anew: backward's collective runs on the ranks whose autograd knows of it.
    return all_reduce(
        tokens.masked_fill(torch.tensor(group.rank() != 0, device=tokens.device), 0.0), group
    )


def _begin_with_padding(description: SequenceDescription) -> list[int]:
    return [number for number, row in enumerate(description.rows) if not row or row[0][0] > 0]


@dataclass(frozen=True)
class _View:
    """One forward's batch, as the layers see it and as the head does.

    Args:
        description: of the batch.
        input_ids: `[B, S / P]` of this rank.
        real: `[B, T]`, True for tokens that are not padding.
    """

    description: SequenceDescription
    input_ids: Tensor | None
    real: Tensor


@dataclass
class WholeHead:
    """The hooks between a model's layers and its head.

    Args:
        model: whose forward is the head's.
        head: what it reads of its layers.
        group: the ranks that share each sequence.
        running: forwards between their first and last hook, the innermost last; None for ordinary
            batches.
        warned: whether the user was told of padding that is no answer.
    """

    model: nn.Module
    head: SampleHead
    group: ProcessGroup
    running: list[_View | None] = field(default_factory=list)
    warned: bool = False

    def install(self) -> Handles:
        """Puts the hooks on.

        Returns:
            What takes them off.
        """
        return [
            self.model.register_forward_pre_hook(self.before, with_kwargs=True),
            self.model.register_forward_hook(self.after, always_call=True),
            self.head.base.register_forward_pre_hook(self.before_layers, with_kwargs=True),
            self.head.base.register_forward_hook(self.after_layers),
            *(linear.register_forward_hook(self.after_linear) for linear in self.head.linears),
        ]

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Gives the head the whole batch's tokens and mask."""
        self.running.append(None)
        description = active_description()
        if description is None:
            return None
        kwargs = _by_name(model, args, kwargs)
        ids = kwargs.get("input_ids")
        real = (unit_numbers(description) >= 0)[:, : _length(description)]
        self._check(description, ids is not None, real)
        self._warn_of_padding(real)
        real = real.to((ids if ids is not None else kwargs["inputs_embeds"]).device)
        view = self.running[-1] = _View(description, ids, real)
        if ids is not None:
            kwargs["input_ids"] = self._whole_ids(ids, view)
        if "attention_mask" in parameters(model):
            kwargs["attention_mask"] = real.to(torch.long)
        return (), kwargs

    def _check(self, description: SequenceDescription, has_ids: bool, real: Tensor) -> None:
        """Refuses batches that the head can't be computed for; all ranks see the same."""
        name = type(self.model).__name__
        if description.is_packed:
            row, count = next(
                (row, len(found)) for row, found in enumerate(description.rows) if len(found) > 1
            )
            raise BatchError(
                f"row {row} of the batch holds {count} packed documents, but {name} computes one "
                "loss for each row. "
                f"Give each document a row of its own."
            )
        padded = _begin_with_padding(description)
        if padded and self.head.reads == "first":
            raise BatchError(
                f"row {padded[0]} of the batch begins with padding, and {name} makes its loss of "
                "each row's first "
                f"token. Pad the rows on the right (padding_side='right')."
            )
        if self.head.answers and self.head.reads != "logits" and not bool(real.all()):
            raise BatchError(
                f"the batch is padded, and {name} finds answers among all tokens in a way that "
                "padding can't be taken "
                f"out of. Give rows of equal length, or one row at a time."
            )
        if (
            not has_ids
            and not self.head.answers
            and self.head.reads == "logits"
            and not bool(real[:, -1].all())
        ):
            raise BatchError(
                f"the batch is padded on the right and has inputs_embeds alone, of which {name} "
                "would read the last "
                f"place of each row. Pad the rows on the left, or give input_ids."
            )

    def _warn_of_padding(self, real: Tensor) -> None:
        """Says once that the loss of padded rows is not the one that one process has of them."""
        if self.warned or not self.head.answers or bool(real.all()):
            return
        self.warned = True
        warnings.warn(
            f"{type(self.model).__name__} is given padded rows: on sharded sequences no answer "
            "starts or ends in "
            "padding, so each row has the loss that it has alone. One process counts padding "
            "among the places of an "
            f"answer, so its loss is another one.",
            stacklevel=2,
        )

    def _whole_ids(self, ids: Tensor, view: _View) -> Tensor:
        """Returns the whole tokens, in which padding is the padding token that the head looks
        for.
        """
        whole = self._gathered(ids, view)
        config: Any = self.model.config
        padding = config.get_text_config().pad_token_id
        return whole if padding is None else whole.masked_fill(~view.real, padding)

    def after(self, _model: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        """Ends the forward, also one that raised."""
        self.running.pop()

    def before_layers(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Gives the layers their shard back."""
        view = self._view()
        if view is None:
            return None
        kwargs = {**_by_name(base, args, kwargs), "input_ids": view.input_ids}
        kwargs.pop("attention_mask", None)
        return (), kwargs

    def after_layers(self, _base: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        """Gives the head what it reads of the layers' result."""
        view = self._view()
        if view is None or self.head.reads not in ("first", "all"):
            return None
        hidden = output[0]
        read = (
            _first(hidden[:, :1], self.group)
            if self.head.reads == "first"
            else self._gathered(hidden, view)
        )
        if isinstance(output, tuple):
            return (read, *output[1:])
        output["last_hidden_state"] = read
        return output

    def after_linear(
        self, _linear: nn.Module, _args: tuple[Any, ...], logits: Tensor
    ) -> Tensor | None:
        """Gives the head every token's logits."""
        view = self._view()
        if view is None:
            return None
        whole = self._gathered(logits, view)
        if self.head.answers:
            return whole.masked_fill(~view.real.unsqueeze(-1), torch.finfo(whole.dtype).min)
        return whole

    def _gathered(self, tensor: Tensor, view: _View) -> Tensor:
        # [B, S/P, ...] -> [B, T, ...]
        return gather_sequence(tensor, view.description, self.group)[:, : view.real.shape[1]]

    def _view(self) -> _View | None:
        return self.running[-1] if self.running else None


def _length(description: SequenceDescription) -> int:
    """Returns where the batch's last token that is not padding lies, counted from 1."""
    return max((row[-1][1] for row in description.rows if row), default=description.sequence_length)


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns all arguments of a call by their names."""
    names = list(parameters(module))[1:]
    return {**dict(zip(names, args)), **kwargs}
