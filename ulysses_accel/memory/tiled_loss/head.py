"""A language model's output layer, one tile of tokens at a time: a tile's logits, and gradients
accumulated over the tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ulysses_accel.attention.kernels.base import accumulation_dtype
from ulysses_accel.errors import ConfigError, ShapeError
from ulysses_accel.memory.accumulate import add_product

Rows = slice | Tensor

# Bytes of a tile's logits in float32. Each tile reads and writes the weight's gradient once; with
# 128,256 tokens of vocabulary a tile has 1,046 tokens, and that takes about as long as the matrix
# products.
TILE_BYTES = 512 * 2**20
MAX_TILE_TOKENS = 8192


def tokens_per_tile(
    vocab_size: int, dtype: torch.dtype, tile_tokens: int | None, tile_bytes: int | None
) -> int:
    """Returns the tokens of a tile, which don't depend on the sequence length.

    Args:
        vocab_size: entries of the vocabulary.
        dtype: of the hidden states.
        tile_tokens: tokens of a tile; None to compute them from `tile_bytes`.
        tile_bytes: bytes of a tile's logits; default 512 MiB, and 8,192 tokens at most.

    Raises:
        ConfigError: one of them is not positive.
    """
    for name, value in (("tile_tokens", tile_tokens), ("tile_bytes", tile_bytes)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} is not a size. Pass at least 1, or leave it out.")
    if tile_tokens is not None:
        return tile_tokens
    row_bytes = max(1, vocab_size) * accumulation_dtype(dtype).itemsize
    return max(1, min(MAX_TILE_TOKENS, (tile_bytes or TILE_BYTES) // row_bytes))


@dataclass(frozen=True)
class Head:
    """How logits are computed: `after * softcap * tanh(scale * (hidden @ weight.T + bias) /
    softcap)`.

    Args:
        scale: factor before the bound.
        softcap: bound of the logits; None for no tanh.
        after: factor after the bound.
    """

    scale: float = 1.0
    softcap: float | None = None
    after: float = 1.0

    def logits(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns a tile's logits, and the tanh; None for the tanh where there is no bound.

        Args:
            rows: `[tokens, D]`, in the weight's dtype.
            weight: `[V, D]`.
            bias: `[V]`.

        Returns:
            `[tokens, V]` each, in float32 or float64.
        """
        exact = accumulation_dtype(rows.dtype)
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
        """Turns the gradient of the logits into that of `hidden @ weight.T + bias`, in place;
        overwrites `bounded`.
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
    """The inputs of a head, as rows.

    Args:
        hidden: `[tokens, D]`.
        weight: `[V, D]`.
        bias: `[V]`.
        labels: `[tokens]`.
        ignore_index: the label of tokens that are not counted.
        dtype: of the matrix products.
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
        """Returns the inputs of a call.

        Args:
            tensors: hidden states `[.., D]`, weight and bias.
            labels: `[..]`.
            ignore_index: the label of tokens that are not counted.
            dtype: of the matrix products.
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
        """Yields the rows of each tile: counted tokens only.

        Args:
            tokens: rows of a tile.
        """
        # nonzero synchronises with the device: the number of tiles depends on the labels.
        counted = (self.labels != self.ignore_index).nonzero().squeeze(-1)
        all_count = len(counted) == len(self.labels)
        for start in range(0, len(counted), tokens):
            stop = min(start + tokens, len(counted))
            yield slice(start, stop) if all_count else counted[start:stop]

    def product_weight(self) -> Tensor:
        """Returns the weight in the dtype of the matrix products."""
        return self.weight.to(self.dtype)


def check_shapes(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    """Refuses tensors whose shapes don't fit.

    Raises:
        ShapeError: they are not hidden states `[.., D]`, weight `[V, D]`, labels `[..]` and bias
            `[V]`.
    """
    is_linear = weight.dim() == 2 and hidden.shape[-1] == weight.shape[1]
    if not is_linear or hidden.shape[:-1] != labels.shape:
        raise ShapeError(
            f"hidden states {tuple(hidden.shape)}, weight {tuple(weight.shape)} and labels "
            f"{tuple(labels.shape)} don't fit. Pass [.., D], [V, D] and [..]; a sharded weight "
            "must be gathered first."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(
            f"a bias {tuple(bias.shape)} does not fit a weight {tuple(weight.shape)}. Pass [V]."
        )


class HeadGradients:
    """Gradients of hidden states, written tile by tile, and of weight and bias, accumulated over
    the tiles in float32 (float64 for float64).

    Args:
        inputs: of the head.
        needed: whether hidden states, weight and bias need a gradient.
    """

    def __init__(self, inputs: Inputs, needed: Sequence[bool]) -> None:
        hidden, weight, bias = inputs.hidden, inputs.weight, inputs.bias
        exact = accumulation_dtype(inputs.dtype)
        self.is_zero = True
        self.hidden = torch.zeros_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=exact) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=exact) if needed[2] and bias is not None else None

    def results(
        self, inputs: Inputs, shape: torch.Size
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns the gradients in the inputs' dtypes, that of the hidden states in `shape`."""
        return (
            None if self.hidden is None else self.hidden.view(shape),
            None if self.weight is None else self.weight.to(inputs.weight.dtype),
            None if self.bias is None or inputs.bias is None else self.bias.to(inputs.bias.dtype),
        )

    def add(self, rows: Rows, tile: Tensor, grad: Tensor, weight: Tensor) -> None:
        """Adds one tile.

        Args:
            rows: of the tile.
            tile: `[tokens, D]`, its hidden states, in the dtype of the matrix products.
            grad: `[tokens, V]`, the gradient of `hidden @ weight.T + bias`, in float32 or float64.
            weight: `[V, D]`, in the dtype of the matrix products.
        """
        self.is_zero = False
        if self.bias is not None:
            self.bias.add_(grad.sum(0))
        rounded = grad.to(tile.dtype)
        if self.weight is not None:
            # On the CPU the product is computed in the total's dtype anyway.
            add_product(self.weight, rounded if self.weight.is_cuda else grad, tile)
        if self.hidden is None:
            return
        if isinstance(rows, slice) and self.hidden.dtype == rounded.dtype:
            torch.mm(rounded, weight, out=self.hidden[rows])
        else:
            self.hidden[rows] = torch.mm(rounded, weight).to(self.hidden.dtype)


def scale_(tensor: Tensor, factor: Tensor, tokens: int) -> Tensor:
    """Multiplies a tensor in place, `tokens` rows at a time, without rounding the factor to the
    tensor's dtype first.
    """
    if tensor.dtype == factor.dtype:
        return tensor.mul_(factor)
    for start in range(0, len(tensor), tokens):
        part = tensor[start : start + tokens]
        part.copy_(part.to(factor.dtype).mul_(factor))
    return tensor
