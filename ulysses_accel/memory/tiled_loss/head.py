"""A language model's head, a tile of tokens at a time: the logits of a tile, and gradients summed
over the tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ulysses_accel.errors import ConfigError, ShapeError
from ulysses_accel.memory.accumulate import add_product, sum_dtype

Rows = slice | Tensor

# One tile's logits in float32. Each tile adds to the weight's gradient once, which costs its
# reading and writing: at a vocabulary of 128,256 these are 1,046 tokens a tile, and the adding
# takes about as long as the products.
TILE_BYTES = 512 * 2**20
MAX_TILE_TOKENS = 8192


def tokens_per_tile(
    vocab_size: int, dtype: torch.dtype, tile_tokens: int | None, tile_bytes: int | None
) -> int:
    """Returns the tokens of a tile, which don't depend on how many tokens there are.

    Args:
        vocab_size: entries of the vocabulary.
        dtype: of the hidden states.
        tile_tokens: tokens, if they are asked for.
        tile_bytes: bytes of one tile's logits otherwise; default 512 MiB, and 8,192 tokens at most.
    """
    for name, value in (("tile_tokens", tile_tokens), ("tile_bytes", tile_bytes)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} is not a size. Pass at least 1, or leave it out.")
    if tile_tokens is not None:
        return tile_tokens
    row_bytes = max(1, vocab_size) * sum_dtype(dtype).itemsize
    return max(1, min(MAX_TILE_TOKENS, (tile_bytes or TILE_BYTES) // row_bytes))


@dataclass(frozen=True)
class Head:
    """How the logits are made: `after * softcap * tanh(scale * (hidden @ weight.T + bias) /
    softcap)`.

    Args:
        scale: factor of the product.
        softcap: bound of the logits; None: there is no tanh.
        after: factor behind the bound.
    """

    scale: float = 1.0
    softcap: float | None = None
    after: float = 1.0

    def logits(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns a tile's logits, and the tanh where there is one.

        Args:
            rows: `[tokens, D]`, in the weight's dtype.
            weight: `[V, D]`.
            bias: `[V]`.

        Returns:
            `[tokens, V]` each, in float32 or float64.
        """
        exact = sum_dtype(rows.dtype)
        if rows.is_cuda and rows.dtype != exact:
            logits = torch.mm(rows, weight.t(), out_dtype=exact)
        else:
            logits = torch.mm(rows, weight.t()).to(exact)
        if bias is not None:
            logits.add_(bias)
        if self.softcap is None:
            return _scaled_(logits, self.scale * self.after), None
        bounded = _scaled_(logits, self.scale / self.softcap).tanh_()
        return bounded * (self.softcap * self.after), bounded

    def product_gradient_(self, grad: Tensor, bounded: Tensor | None) -> Tensor:
        """Returns the gradient of the product from the logits', in the same memory; spends
        `bounded`.
        """
        if bounded is not None:
            grad.mul_(bounded.square_().neg_().add_(1.0))
        return _scaled_(grad, self.scale * self.after)


def _scaled_(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else tensor.mul_(factor)


def softmax_(logits: Tensor) -> Tensor:
    """Turns `[tokens, V]` logits into probabilities in place, and returns their log-sum-exp
    `[tokens, 1]`.
    """
    highest = logits.amax(-1, keepdim=True)
    total = logits.sub_(highest).exp_().sum(-1, keepdim=True)
    logits.div_(total)
    return total.log_().add_(highest)


@dataclass(frozen=True)
class Inputs:
    """What a head is computed on, as rows.

    Args:
        hidden: `[tokens, D]`.
        weight: `[V, D]`.
        bias: `[V]`.
        labels: `[tokens]`.
        ignore_index: the label of tokens that don't count.
        dtype: of the products.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    ignore_index: int
    dtype: torch.dtype

    @classmethod
    def of(
        cls, tensors: Sequence[Tensor | None], labels: Tensor, ignore_index: int, dtype: torch.dtype
    ) -> Inputs:
        """Returns the rows of `hidden [.., D]` and `labels [..]`; the tensors are hidden states,
        weight and bias.
        """
        hidden, weight, bias = (None if tensor is None else tensor.detach() for tensor in tensors)
        assert hidden is not None
        assert weight is not None
        return cls(
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            bias,
            labels.reshape(-1),
            ignore_index,
            dtype,
        )

    def tiles(self, tokens: int) -> Iterator[Rows]:
        """Yields the rows of each tile: counted tokens only, whose places the host must know.

        Args:
            tokens: rows of a tile.
        """
        places = (self.labels != self.ignore_index).nonzero().squeeze(-1)
        all_count = len(places) == len(self.labels)
        for start in range(0, len(places), tokens):
            stop = min(start + tokens, len(places))
            yield slice(start, stop) if all_count else places[start:stop]

    def product_weight(self) -> Tensor:
        """Returns the weight in the products' dtype."""
        return self.weight.to(self.dtype)


def product_dtype(hidden: Tensor) -> torch.dtype:
    """Returns the dtype that a linear layer would compute in: autocast's inside of autocast."""
    kind = hidden.device.type
    autocast = torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if autocast else hidden.dtype


def check_shapes(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    """Refuses tensors that are not one head's on one set of tokens."""
    if (
        weight.dim() != 2
        or hidden.shape[-1] != weight.shape[1]
        or hidden.shape[:-1] != labels.shape
    ):
        raise ShapeError(
            f"hidden states {tuple(hidden.shape)}, weight {tuple(weight.shape)} and labels "
            f"{tuple(labels.shape)} don't "
            f"fit. Pass [.., D], [V, D] and [..]; a sharded weight must be gathered first."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(
            f"a bias {tuple(bias.shape)} does not fit a weight {tuple(weight.shape)}. Pass [V]."
        )


class HeadGradients:
    """Gradients of hidden states, written tile by tile, and of weight and bias, summed over the
    tiles unrounded.

    Args:
        inputs: what the head is computed on.
        needed: whether hidden states, weight and bias need one.
    """

    def __init__(self, inputs: Inputs, needed: Sequence[bool]) -> None:
        hidden, weight, bias = inputs.hidden, inputs.weight, inputs.bias
        exact = sum_dtype(inputs.dtype)
        self.is_zero = True
        self.hidden = torch.zeros_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=exact) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=exact) if needed[2] and bias is not None else None

    def results(
        self, inputs: Inputs, shape: torch.Size
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns the gradients in the tensors' dtypes, the hidden states' with their shape."""
        return (
            None if self.hidden is None else self.hidden.view(shape),
            None if self.weight is None else self.weight.to(inputs.weight.dtype),
            None if self.bias is None or inputs.bias is None else self.bias.to(inputs.bias.dtype),
        )

    def add(self, rows: Rows, tile: Tensor, grad: Tensor, weight: Tensor) -> None:
        """Adds one tile.

        Args:
            rows: the tile's.
            tile: `[tokens, D]`, its hidden states in the products' dtype.
            grad: `[tokens, V]`, the gradient of its product, in float32 or float64.
            weight: `[V, D]`, in the products' dtype.
        """
        self.is_zero = False
        if self.bias is not None:
            self.bias.add_(grad.sum(0))
        rounded = grad.to(tile.dtype)
        if self.weight is not None:
            # On the CPU the sum is wide anyway, so the gradient need not be rounded for a fast
            # product.
            add_product(self.weight, rounded if self.weight.is_cuda else grad, tile)
        if self.hidden is None:
            return
        if isinstance(rows, slice) and self.hidden.dtype == rounded.dtype:
            torch.mm(rounded, weight, out=self.hidden[rows])
        else:
            self.hidden[rows] = torch.mm(rounded, weight).to(self.hidden.dtype)


def scale_(tensor: Tensor, factor: Tensor, tokens: int) -> Tensor:
    """Multiplies in place, `tokens` rows at a time; a factor that is not rounded to the tensor's
    dtype first.
    """
    if tensor.dtype == factor.dtype:
        return tensor.mul_(factor)
    for start in range(0, len(tensor), tokens):
        part = tensor[start : start + tokens]
        part.copy_(part.to(factor.dtype).mul_(factor))
    return tensor
