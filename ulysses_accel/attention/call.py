"""What one attention call asks for, apart from its tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class AttentionCall:
    """What one attention call asks for, apart from its tensors.

    Args:
        is_causal: whether a token sees only itself and the tokens before it.
        scale: factor on the scores; 1 / sqrt(D) when None.
        dropout: probability of dropping an attention weight.
        softcap: bound of the scores through tanh; None for no bound.
        sinks: `[H]` scores of a key of no value that every token sees, one for each query head;
            None for none.
        alibi_slopes: `[H]`, by which scores grow with each token on the way from the query to the
            key; None for none.
    """

    is_causal: bool = True
    scale: float | None = None
    dropout: float = 0.0
    softcap: float | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None

    def for_heads(self, first: int, last: int) -> AttentionCall:
        """Returns the call for the query heads from `first` up to `last`: sinks and slopes are each
        head's own.
        """
        sinks, slopes = (
            None if t is None else t[first:last] for t in (self.sinks, self.alibi_slopes)
        )
        return replace(self, sinks=sinks, alibi_slopes=slopes)
