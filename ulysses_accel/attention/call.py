"""The arguments of one attention call, apart from its tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one attention call, apart from query, key and value.

    Args:
        is_causal: whether a token sees only itself and the tokens before it.
        scale: factor on the scores; 1 / sqrt(D) when None.
        dropout: probability of dropping an attention weight.
        softcap: bound of the scores through tanh; None for no bound.
        sinks: `[H]`, a learned per-head logit in the softmax denominator; None for none.
        alibi_slopes: `[H]`; slope * (key position - query position) is added to the scores; None
            for none.
    """

    is_causal: bool = True
    scale: float | None = None
    dropout: float = 0.0
    softcap: float | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None

    def for_heads(self, first: int, last: int) -> AttentionCall:
        """Returns the call for the query heads from `first` up to `last`, with their sinks and
        slopes.
        """
        sinks = None if self.sinks is None else self.sinks[first:last]
        slopes = None if self.alibi_slopes is None else self.alibi_slopes[first:last]
        return replace(self, sinks=sinks, alibi_slopes=slopes)
