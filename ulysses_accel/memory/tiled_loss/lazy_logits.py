"""Lazy logits: the output layer returns this object instead of a tensor, and the loss is computed
from it without the logits of all tokens.

What models do to logits before the loss (a factor, a bound, another shape) is recorded, and
anything else is refused by name. `torch.nn.functional.cross_entropy` of lazy logits is the tiled
one, so that a loss function that calls it works unchanged, with its own shift of the labels,
normalisation and options.
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
    """A loss that the output layer's forward computes instead of logits.

    Args:
        labels: `[..]`, one for each token.
        chain: what the model does to the logits.
        ignore_index: the label of tokens that are not counted.
        label_smoothing: as for `torch.nn.functional.cross_entropy`.
        per_token: whether each token's loss is returned; otherwise their sum.
    """

    labels: Tensor
    chain: Chain
    ignore_index: int
    label_smoothing: float
    per_token: bool


@dataclass(frozen=True)
class Chain:
    """What a model does to its logits: `after * tanh(scale * logits + offset)`; without `after` and
    tanh where not `bounded`.

    Args:
        scale: factor of the logits.
        offset: `[V]`, added to them.
        bounded: whether there is a tanh.
        after: factor after the tanh.
    """

    scale: float = 1.0
    offset: Tensor | None = None
    bounded: bool = False
    after: float = 1.0

    def times(self, factor: float) -> Chain | None:
        """Returns the chain followed by a factor; None where a chain can't express that."""
        if self.offset is not None:
            return None
        if self.bounded:
            return replace(self, after=self.after * factor)
        return replace(self, scale=self.scale * factor)

    def tanh(self) -> Chain | None:
        """Returns the chain followed by a tanh; None where a chain can't express that."""
        if self.bounded or self.offset is not None:
            return None
        return replace(self, bounded=True)

    def plus(self, offset: Tensor, vocab_size: int) -> Chain | None:
        """Returns the chain followed by a bias; None where a chain can't express that."""
        fits = offset.numel() == vocab_size and not offset.requires_grad
        if not fits or self != Chain():
            return None
        return replace(self, offset=offset.reshape(-1))

    def apply(self, logits: Tensor) -> Tensor:
        """Returns what the model computes from logits `[.., V]`."""
        logits = logits * self.scale if self.offset is None else logits + self.offset
        return logits.tanh() * self.after if self.bounded else logits


class LazyLogits:
    """The logits `[.., V]` of hidden states `[.., D]`, which are not computed.

    Args:
        head: called with hidden states and a `LossRequest`, returns the loss; without a request,
            logits.
        hidden: `[.., D]`.
        vocab_size: V.
        dtype: the dtype that the logits would have.
        chain: what the model has done to them.
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
        """Casts to a wider dtype, which the loss does anyway; other casts and devices are
        refused.
        """
        dtype = None
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.dtype):
                if value != self.dtype and value not in _FLOATS:
                    raise refusal(f"casts its logits to {value}")
                dtype = value
                continue
            is_device = isinstance(value, str | torch.device)
            if is_device and torch.device(value).type != self.device.type:
                raise refusal(f"moves its logits to {value}")
        return self if dtype is None else self._with(dtype=dtype)

    def view(self, *shape: Any) -> LazyLogits:
        """Changes the leading dims, those of tokens."""
        sizes = shape
        if len(shape) == 1 and not isinstance(shape[0], int):
            sizes = tuple(shape[0])
        lead, last = sizes[:-1], sizes[-1] if sizes else None
        keeps_tokens = last == -1 and math.prod(lead) == self._hidden.shape[:-1].numel()
        if last != self._vocab_size and not keeps_tokens:
            raise refusal(f"reshapes its logits {tuple(self.shape)} to {sizes}")
        return self._with(hidden=self._hidden.reshape(*lead, self._hidden.shape[-1]))

    reshape = view

    def __getitem__(self, index: Any) -> LazyLogits:
        indices = index if isinstance(index, tuple) else (index,)
        if not all(item is Ellipsis or isinstance(item, int | slice) for item in indices):
            raise refusal(
                f"indexes its logits by {', '.join(type(item).__name__ for item in indices)}"
            )
        reaches_vocabulary = len(indices) == self.ndim or any(item is Ellipsis for item in indices)
        if reaches_vocabulary and indices[-1] is not Ellipsis and indices[-1] != slice(None):
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
        """Returns the logits as a tensor."""
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
        """Returns the sum of the tokens' losses and the number of counted tokens.

        Args:
            target: `[..]`, labels.
            ignore_index: the label of tokens that are not counted.
            label_smoothing: as for `torch.nn.functional.cross_entropy`.
            per_token: whether to return each token's loss `[..]` instead of the sum.
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
    is_deprecated = size_average is not None or reduce is not None
    if weight is not None or is_deprecated or target.shape != logits.shape[:-1]:
        raise refusal(
            "calls cross_entropy with class weights, probabilities or deprecated reductions"
        )
    loss, count = logits.loss(target, ignore_index, label_smoothing, per_token=reduction == "none")
    # As in torch, the mean over no counted token is NaN.
    return loss / count if reduction == "mean" else loss


def refusal(action: str) -> UnsupportedModelError:
    """Returns the error for a model that does something to its logits that is not recorded."""
    return UnsupportedModelError(
        f"the model {action}, which needs all of them at once: its loss can't be tiled. Pass "
        "return_logits=True to the model for the ordinary loss, or close() the tiled one."
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
