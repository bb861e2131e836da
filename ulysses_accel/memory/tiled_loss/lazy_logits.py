"""Logits that are not there: they stand in for a head's output from the head to the loss, which is
made without them.

What models do to logits in between is written down (a factor, a bound, another shape), and anything
else is refused by name. `torch.nn.functional.cross_entropy` on them is the tiled one, so that every
loss function that ends there works as it is, with its own shift of the labels, its own
normalisation and its own options.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ulysses_accel.errors import UnsupportedModelError
from ulysses_accel.sequence.labels import IGNORE_INDEX

_FLOATS = (torch.float32, torch.float64)


@dataclass(frozen=True)
class LossRequest:
    """What a head is asked for in place of logits.

    Args:
        labels: `[..]`, one for each token.
        chain: what the model does to the logits.
        ignore_index: the label of tokens that don't count.
        label_smoothing: as of `cross_entropy`.
        per_token: each token's loss instead of the sum and the count.
    """

    labels: Tensor
    chain: Chain
    ignore_index: int
    label_smoothing: float
    per_token: bool


@dataclass(frozen=True)
class Chain:
    """What a model does to its logits, in order: `after * tanh(scale * logits + offset)`, the tanh
    where `bounded`.

    Args:
        scale: factor of the logits.
        offset: `[V]`, added to them.
        bounded: whether there is a tanh.
        after: factor behind it.
    """

    scale: float = 1.0
    offset: Tensor | None = None
    bounded: bool = False
    after: float = 1.0

    def times(self, factor: float) -> Chain | None:
        """Returns the chain with a factor at its end; None where it can't be said."""
        if self.offset is not None:
            return None
        if self.bounded:
            return replace(self, after=self.after * factor)
        return replace(self, scale=self.scale * factor)

    def tanh(self) -> Chain | None:
        """Returns the chain with a tanh at its end; None where it can't be said."""
        return None if self.bounded or self.offset is not None else replace(self, bounded=True)

    def plus(self, offset: Tensor, vocab_size: int) -> Chain | None:
        """Returns the chain with a bias at its end; None where it can't be said."""
        fits = offset.numel() == vocab_size and not offset.requires_grad
        return replace(self, offset=offset.reshape(-1)) if fits and self == Chain() else None

    def apply(self, logits: Tensor) -> Tensor:
        """Does it to logits that are there."""
        logits = logits * self.scale if self.offset is None else logits + self.offset
        return logits.tanh() * self.after if self.bounded else logits


class LazyLogits:
    """Stands in for the logits `[.., V]` of hidden states `[.., D]`.

    Args:
        head: called with hidden states and a request; returns what was asked for, real logits
            without a request.
        hidden: `[.., D]`.
        vocab_size: V.
        dtype: the dtype that the logits would have.
        chain: what was done to them.
    """

    def __init__(
        self,
        head: Callable[..., Any],
        hidden: Tensor,
        vocab_size: int,
        dtype: torch.dtype,
        chain: Chain,
    ) -> None:
        self._head, self._hidden, self._vocab_size, self._chain = head, hidden, vocab_size, chain
        self.dtype = dtype

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self._hidden.shape[:-1], self._vocab_size))

    @property
    def device(self) -> torch.device:
        return self._hidden.device

    @property
    def ndim(self) -> int:
        return self._hidden.dim()

    def dim(self) -> int:
        return self._hidden.dim()

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def contiguous(self) -> LazyLogits:
        return self

    def float(self) -> LazyLogits:
        return self.to(torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> LazyLogits:
        """Casts upwards, which the loss does in any case, and stays where it is."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.dtype):
                if value != self.dtype and value not in _FLOATS:
                    raise refusal(f"casts its logits to {value}")
            elif (
                isinstance(value, str | torch.device)
                and torch.device(value).type != self.device.type
            ):
                raise refusal(f"moves its logits to {value}")
        casts = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
        return self._with(dtype=casts[-1]) if casts else self

    def view(self, *shape: Any) -> LazyLogits:
        """Gives the tokens another shape."""
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        lead, last = sizes[:-1], sizes[-1] if sizes else None
        keeps_tokens = last == -1 and math.prod(lead) == self._hidden.shape[:-1].numel()
        if last != self._vocab_size and not keeps_tokens:
            raise refusal(f"reshapes its logits {tuple(self.shape)} to {sizes}")
        return self._with(hidden=self._hidden.reshape(*lead, self._hidden.shape[-1]))

    reshape = view

    def __getitem__(self, index: Any) -> LazyLogits:
        places = index if isinstance(index, tuple) else (index,)
        if not all(place is Ellipsis or isinstance(place, int | slice) for place in places):
            raise refusal(
                f"indexes its logits by {', '.join(type(place).__name__ for place in places)}"
            )
        reaches_vocabulary = len(places) == self.ndim or any(place is Ellipsis for place in places)
        if reaches_vocabulary and places[-1] is not Ellipsis and places[-1] != slice(None):
            raise refusal("takes some of the vocabulary's logits")
        return self._with(hidden=self._hidden[index])

    def __mul__(self, factor: Any) -> LazyLogits:
        return self._chained(
            self._chain.times(factor) if _is_number(factor) else None, "multiplies its logits"
        )

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> LazyLogits:
        return self._chained(
            self._chain.times(1.0 / divisor) if _is_number(divisor) else None, "divides its logits"
        )

    def __add__(self, offset: Any) -> LazyLogits:
        chain = self._chain.plus(offset, self._vocab_size) if isinstance(offset, Tensor) else None
        return self._chained(chain, "adds to its logits")

    def tanh(self) -> LazyLogits:
        return self._chained(self._chain.tanh(), "takes the tanh of its logits")

    def materialize(self) -> Tensor:
        """Returns the logits."""
        return self._chain.apply(self._head(self._hidden)).to(self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy and isinstance(args[0], LazyLogits):
            return _cross_entropy(*args, **kwargs)
        if func is torch.tanh:
            return args[0].tanh()
        raise refusal(f"uses {getattr(func, '__name__', func)} on its logits")

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and hasattr(Tensor, name):
            raise refusal(f"uses '{name}' of its logits")
        raise AttributeError(name)

    def loss(
        self, target: Tensor, ignore_index: int, label_smoothing: Any, *, per_token: bool
    ) -> tuple[Tensor, Tensor]:
        """Returns the sum of the tokens' losses, or the losses one by one, and the number of
        counted tokens.
        """
        request = LossRequest(target, self._chain, ignore_index, label_smoothing, per_token)
        result: tuple[Tensor, Tensor] = self._head(self._hidden, request)
        return result

    def _with(self, hidden: Tensor | None = None, dtype: torch.dtype | None = None) -> LazyLogits:
        hidden = self._hidden if hidden is None else hidden
        return LazyLogits(self._head, hidden, self._vocab_size, dtype or self.dtype, self._chain)

    def _chained(self, chain: Chain | None, action: str) -> LazyLogits:
        if chain is None:
            raise refusal(f"{action} in a way that the tiled loss does not know")
        return LazyLogits(self._head, self._hidden, self._vocab_size, self.dtype, chain)


def _cross_entropy(
    logits: LazyLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    if (
        weight is not None
        or size_average is not None
        or reduce is not None
        or target.shape != logits.shape[:-1]
    ):
        raise refusal(
            "calls cross_entropy with class weights, probabilities or deprecated reductions"
        )
    loss, count = logits.loss(target, ignore_index, label_smoothing, per_token=reduction == "none")
    # As torch's: the mean of no token is not a number.
    return loss / count if reduction == "mean" else loss


def refusal(action: str) -> UnsupportedModelError:
    """Returns the error for a model that does something unknown to its logits."""
    return UnsupportedModelError(
        f"the model {action}, which needs all of them at once: its loss can't be tiled. Pass "
        "return_logits=True to the "
        f"model for the ordinary loss, or uninstall the tiled one."
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
