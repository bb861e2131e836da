"""ALiBi: adds slope * (key position - query position) to the scores, with a slope for each head.

Only differences count, so positions may be indices in the row, whatever document a token is in.
Keys before the query get a lower score; those after it, where they are seen at all, a higher one,
as in the models that have such biases. Source: Train Short, Test Long (arXiv 2108.12409).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ulysses_accel.errors import ShapeError, UnsupportedModelError


@dataclass(frozen=True)
class Alibi:
    """The biases of one block of attention.

    Args:
        slopes: `[H]`, of this rank's heads.
        queries: `[q]` positions of the queries in their row, in tokens.
        keys: `[k]` positions of the keys.
    """

    slopes: Tensor
    queries: Tensor
    keys: Tensor

    def for_heads(self, heads: slice) -> Alibi:
        """Returns the biases of some of the heads."""
        return replace(self, slopes=self.slopes[heads])

    def bias(self, chunk: slice, dtype: torch.dtype) -> Tensor:
        """Returns `[H, c, k]`, the biases of some of the queries; distances are taken before they
        are rounded.
        """
        distances = self.keys[None, :] - self.queries[chunk, None]
        return self.slopes.to(dtype)[:, None, None] * distances.to(dtype)


def alibi_slopes(num_heads: int, max_bias: float = 8.0) -> Tensor:
    """Returns the usual slopes `[H]`: powers of 2 ** (-max_bias / H), for H that is no power of two
    interleaved.

    Args:
        num_heads: query heads H.
        max_bias: minus the exponent of the least slope.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    base = 2.0 ** (-max_bias / power)
    slopes = [base**number for number in range(1, power + 1)]
    # The heads above the power of two take every other slope of twice as many heads.
    half = 2.0 ** (-max_bias / (2 * power))
    slopes += [half**number for number in range(1, 2 * (num_heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float64)


def check_slopes(slopes: Tensor, num_heads: int) -> None:
    """Refuses slopes that are not one constant number for each query head.

    Raises:
        ShapeError: there are more or fewer.
        UnsupportedModelError: they require a gradient.
    """
    if tuple(slopes.shape) != (num_heads,):
        raise ShapeError(
            f"alibi_slopes has shape {tuple(slopes.shape)} for {num_heads} query heads. Give one "
            "slope for each head."
        )
    if slopes.requires_grad:
        raise UnsupportedModelError(
            "alibi_slopes requires a gradient, which is not computed. Give constant slopes: "
            "slopes.detach()."
        )
