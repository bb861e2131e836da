"""What sequence parallelism knows of a model, found out once for each prepare.

`profile_of` is the list of its questions. Structure, use of the loss and sources of positions are
read from modules, configuration and source; whether tokens see each other outside of attention is
found out by running a tiny twin (`probe`), and the source only explains why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ulysses_accel.errors import UnsupportedModelError
from ulysses_accel.introspection.findings import Finding
from ulysses_accel.introspection.layers import (
    check_attention,
    check_masks,
    check_neighbours,
    check_selections,
    check_statistics,
)
from ulysses_accel.introspection.loss import LossUse, read_loss
from ulysses_accel.introspection.positions import (
    OwnCount,
    PositionSource,
    check_positions,
    own_counts,
    position_sources,
    rotary_modules,
)
from ulysses_accel.introspection.probe import Probe, probe
from ulysses_accel.introspection.requirements import Requirements, requirements_of
from ulysses_accel.introspection.routers import RouterLossUse, read_router_loss
from ulysses_accel.introspection.routing import (
    check_adapters,
    check_heads,
    check_layer_types,
    check_routing,
)
from ulysses_accel.introspection.sample_heads import (
    FirstToken,
    SampleHead,
    first_token_modules,
    read_sample_head,
)
from ulysses_accel.introspection.source import takes_keywords
from ulysses_accel.introspection.structure import (
    Merging,
    ModelReading,
    merging_of,
    transformers_model,
)

_REMEDY = "Use a model without it, or sp_size=1 and cp_size=1."


@dataclass(frozen=True)
class ModelProfile:
    """A transformers model as sequence parallelism sees it.

    Args:
        model: the transformers model.
        encoder: the encoder of an encoder-decoder; None for models of one sequence.
        has_full_encoder: whether every rank runs all of the encoder, whose input is no tokens.
        attending: the attention layers that see sharded tokens, by name.
        text_config: the configuration of the part that reads tokens.
        loss: how it uses labels; None where it computes no loss.
        positions: how the positions of each of its sequences come in.
        own_counts: attention layers that count their tokens by themselves.
        rotary: modules whose angles follow from the longest position.
        sample_head: the head of a model whose loss is one of whole samples.
        first_tokens: the modules that read each row's first token.
        router_loss: how it computes a router loss; a finding where that is not known.
        merging: where it merges images or audio into its tokens; None where it doesn't.
        takes_use_cache: whether its forward can be told to keep no keys.
        requirements: what it requires of a batch.
        findings: what keeps it from being computed exactly on shards.
        decided_by: whether running it or reading it decided that tokens don't see each other
            outside of attention.
        needs_agreement: whether other ranks may have found out something else, as they may hold
            other parts of the parameters.
    """

    model: Any
    encoder: nn.Module | None
    has_full_encoder: bool
    attending: dict[str, nn.Module]
    text_config: Any
    loss: LossUse | None
    positions: tuple[PositionSource, ...]
    own_counts: tuple[OwnCount, ...]
    rotary: tuple[nn.Module, ...]
    sample_head: SampleHead | None
    first_tokens: tuple[FirstToken, ...]
    router_loss: RouterLossUse | Finding | None
    merging: Merging | None
    takes_use_cache: bool
    requirements: Requirements
    findings: tuple[Finding, ...]
    decided_by: Literal["source", "probe"]
    needs_agreement: bool

    def check(self, sources: str) -> None:
        """Refuses a model that has a part which attention over shards would not compute exactly.

        Args:
            sources: the sizes and where they came from, for the message.

        Raises:
            UnsupportedModelError: with every finding and its remedy.
        """
        if self.findings:
            listed = "\n".join(f"- {finding}" for finding in self.findings)
            raise UnsupportedModelError(
                f"{type(self.model).__name__} can't be trained exactly with {sources}:\n{listed}"
            )


def profile_of(model: nn.Module, sp_size: int = 1) -> ModelProfile:
    """Returns what sequence parallelism knows of a model; nothing of it is changed.

    Args:
        model: a transformers model, or a module that holds one.
        sp_size: ranks that its heads are distributed over.

    Raises:
        UnsupportedModelError: it holds no transformers model.
    """
    reading = ModelReading(transformers_model(model))
    loss = read_loss(reading)
    findings = [*check_adapters(model), *_read_findings(reading)]
    findings += check_heads(reading.text_config, sp_size)
    # A model that is refused already need not be run.
    result = None if findings else probe(reading.model, reading.around_sharded)
    if result is not None:
        findings += _probe_findings(reading, result)
    return ModelProfile(
        model=reading.model,
        encoder=reading.encoder,
        has_full_encoder=reading.has_full_encoder,
        attending=reading.sharded_attending,
        text_config=reading.text_config,
        loss=loss if isinstance(loss, LossUse) else None,
        positions=position_sources(reading),
        own_counts=own_counts(reading),
        rotary=rotary_modules(reading),
        sample_head=read_sample_head(reading),
        first_tokens=first_token_modules(reading),
        router_loss=read_router_loss(reading),
        merging=merging_of(reading),
        takes_use_cache="use_cache" in reading.parameters or takes_keywords(reading.model),
        requirements=requirements_of(reading),
        findings=tuple(findings),
        decided_by="probe" if result is not None and result.ran else "source",
        needs_agreement=result is not None and not result.is_of_twin,
    )


def check_model(model: nn.Module, sp_size: int, sources: str = "") -> None:
    """Refuses a model that has a part which attention over shards would not compute exactly.

    Args:
        model: a transformers model, or a module that holds one.
        sp_size: ranks that exchange tokens for heads.
        sources: the sizes and where they came from, for the message; `sp_size` alone when empty.

    Raises:
        UnsupportedModelError: with every finding and its remedy.
    """
    profile_of(model, sp_size).check(sources or f"sp_size={sp_size}")


def _read_findings(reading: ModelReading) -> Iterator[Finding]:
    """Yields what structure, configuration and source say."""
    checks: tuple[Callable[[ModelReading], Iterator[Finding]], ...] = (
        check_routing,
        _check_loss,
        check_positions,
        check_layer_types,
        check_masks,
        check_attention,
        check_neighbours,
        check_statistics,
        check_selections,
    )
    for check in checks:
        yield from check(reading)


def _check_loss(reading: ModelReading) -> Iterator[Finding]:
    loss = read_loss(reading)
    if isinstance(loss, list):
        yield from loss


def _probe_findings(reading: ModelReading, result: Probe) -> Iterator[Finding]:
    """Yields what running the model says."""
    if result.mixing is not None:
        where = result.mixing or "its forward"
        yield Finding(
            "layers",
            result.mixing or "forward",
            f"{where} ({result.class_name}) lets tokens see each other outside of attention: with "
            "another token in one place, its output changed at others. A shard has only some of "
            "them.",
            _REMEDY,
        )
    for name in result.unknown:
        yield Finding(
            "layers",
            name or "forward",
            f"the code of {name or 'its forward'} ({type(reading.modules[name]).__name__}) is not "
            "its architecture's, and whether it lets tokens see each other can't be found out by "
            f"running it ({result.failure}).",
            "Remove it, or use sp_size=1 and cp_size=1.",
        )
