"""One refill: a drawn batch, the agreement on it, and the micro-steps that follow from it on this
rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from ulysses_accel.dataloader.agreement import Header, Status, agree_on_batch
from ulysses_accel.dataloader.batch_layout import BatchLayout
from ulysses_accel.dataloader.completion.complete import complete
from ulysses_accel.dataloader.completion.full_batch import FullBatch
from ulysses_accel.dataloader.completion.labels import token_label_keys
from ulysses_accel.dataloader.exchange import encode_side, entries_of, exchange, keys_text
from ulysses_accel.distributed.consensus import describe_error
from ulysses_accel.errors import BatchError
from ulysses_accel.sequence.batch_rules import PLAIN_RULES, RulesSource, resolve_rules

Draw = Callable[[], tuple[Any, bool]]
"""Returns the next batch of this rank's loader and whether it knows that none follows; raises
StopIteration.
"""


@dataclass(frozen=True)
class Refiller:
    """Turns drawn batches into micro-steps, in agreement with the other ranks of the sequence
    group.

    Args:
        layout: how batches are padded and sharded.
        rank: of this process in the sequence group.
        group: whose ranks agree; None when this process is alone.
        same_batch: all ranks draw the same batch and keep their shards; otherwise each brings
            another.
        on_uneven: "error", "drop" or "pad", see `UlyssesSPDataLoaderAdapter`.
        allow_duplicates: whether ranks that should bring different batches may all bring the same
            first one.
        rules: what the model requires of a batch, or a function that returns it.
    """

    layout: BatchLayout
    rank: int
    group: dist.ProcessGroup | None
    same_batch: bool
    on_uneven: str
    allow_duplicates: bool
    rules: RulesSource = PLAIN_RULES

    def resolved(self) -> Refiller:
        """Returns this refiller with its rules known."""
        return replace(self, rules=resolve_rules(self.rules))

    def refill(
        self, draw: Draw, position: int, first: bool = False
    ) -> tuple[list[dict[str, Any]], bool] | None:
        """Draws a batch, agrees on it, and returns this rank's micro-steps and whether they are the
        last.

        Args:
            draw: see `Draw`; whatever it raises becomes the same error on every rank.
            position: micro-steps before this refill.
            first: whether this is the first refill of all.

        Returns:
            None when all ranks have come to the end.

        Raises:
            BatchError: a rank failed to produce a batch.
            RankDisagreementError: the ranks' batches don't belong together, or they end unevenly.
        """
        offer = self._offer(draw, position)
        error = offer.error
        # This frame is one of those that the error holds, so it may not hold the error.
        offer = replace(offer, error=None)
        try:
            decision, headers = agree_on_batch(
                offer.header,
                offer.text,
                self.group,
                on_uneven=self.on_uneven,
                same_batch=self.same_batch,
                distinct=first and not self.same_batch and not self.allow_duplicates,
                cause=error,
            )
        finally:
            del error
        if not decision.present:
            return None
        if self.same_batch:
            assert offer.full is not None
            return [offer.full.local_batch(self.rank)], decision.is_last
        return self._exchanged(offer, headers), decision.is_last

    def _offer(self, draw: Draw, position: int) -> _Offer:
        """Draws and completes a batch; a failure becomes a header, because the other ranks wait for
        one.
        """
        try:
            batch, is_last = draw()
        except StopIteration:
            return _Offer(Header(Status.END, position))
        except Exception as error:
            return _Offer.failed(error, position)
        try:
            # Here, before the agreement, because a user's function may fail on one rank.
            full = complete(batch, self.layout, resolve_rules(self.rules)).with_functions(
                self.layout, self.rank
            )
            side = b"" if self.same_batch else encode_side(full)
            header = Header(
                Status.OK,
                position,
                is_last,
                full.checksum(),
                side_bytes=len(side),
                entries=entries_of(full),
            )
        except Exception as error:
            return _Offer.failed(error, position)
        return _Offer(header, keys_text(full, with_shapes=self.same_batch), full, side)

    def _exchanged(self, offer: _Offer, headers: list[Header]) -> list[dict[str, Any]]:
        received = exchange(offer.full, offer.side, headers, self.group)
        template = next(batch for batch in received if batch is not None)
        labels = token_label_keys(template, self.layout, resolve_rules(self.rules))
        if any(batch is None for batch in received) and not labels:
            # All ranks are here: which ranks are out of data, and the keys, were agreed on.
            raise BatchError(
                "on_uneven='pad' fills the missing batches with ignored labels, but these batches "
                "have no labels of "
                "tokens. Use on_uneven='drop', or give every rank the same number of batches."
            )
        # A micro-step of the template's shape that counts no label.
        filler = {
            **template,
            **{key: torch.full_like(template[key], self.layout.ignore_index) for key in labels},
        }
        return [batch if batch is not None else filler for batch in received]


@dataclass(frozen=True)
class _Offer:
    """What this rank brings to a refill."""

    header: Header
    text: str = ""
    full: FullBatch | None = None
    side: bytes = b""
    error: Exception | None = None

    @staticmethod
    def failed(error: Exception, position: int) -> _Offer:
        return _Offer(Header(Status.ERROR, position), describe_error(error), error=error)
