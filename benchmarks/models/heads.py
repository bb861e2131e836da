"""Which architectures the walk takes: every model of the installed transformers with a language
model's loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# The head's name, and the mapping of transformers that lists its models. A class that two mappings
# list is walked once.
HEADS: dict[str, str] = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING",
}

# Batches reach 32 tokens, twice the length up to which these scalings leave the positions alone.
_SCALED = {"factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
_LONG = {"long_factor": [1.5, 2.0, 3.0, 4.0], "short_factor": [1.0, 1.1, 1.2, 1.3]}
_ROPE: dict[str, dict[str, Any]] = {
    "linear": _SCALED,
    "yarn": _SCALED,
    "llama3": {**_SCALED, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "dynamic": _SCALED,
    "longrope": {**_SCALED, **_LONG},
}


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Args:
        head: a key of `HEADS`, or `rope` for a scaling of rotary positions.
        model_type: transformers' name of the configuration.
        class_name: the model's class.
        variant: what differs from the type's own configuration, in words.
        overrides: fields of the configuration that make the variant.
    """

    head: str
    model_type: str
    class_name: str
    variant: str = ""
    overrides: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        """The row's name: head, type and variant."""
        return f"{self.head}.{self.model_type}{'.' if self.variant else ''}{self.variant}"

    @property
    def mapping(self) -> str:
        """Name of transformers' mapping from configurations to this model's class."""
        return HEADS["causal" if self.head == "rope" else self.head]


def architectures() -> list[Architecture]:
    """Returns every architecture, each class under the first head that lists it, then the
    variants.
    """
    found: dict[tuple[str, str], Architecture] = {}
    for head in HEADS:
        for model_type, class_name in sorted(_listed(head).items()):
            found.setdefault((model_type, class_name), Architecture(head, model_type, class_name))
    return [*found.values(), *_rope_variants()]


def choose(names: list[str] | None, heads: list[str] | None) -> list[Architecture]:
    """Returns the architectures of some row names or model types, of some heads; all by default.

    Raises:
        ValueError: a name that no architecture has.
    """
    every = architectures()
    unknown = set(names or ()) - {one.name for one in every} - {one.model_type for one in every}
    if unknown:
        raise ValueError(
            f"no architecture is called {', '.join(sorted(unknown))}: give a row's name or a model "
            "type."
        )
    chosen = [one for one in every if not names or one.name in names or one.model_type in names]
    return [one for one in chosen if not heads or one.head in heads]


def _listed(head: str) -> dict[str, str]:
    from transformers.models.auto import modeling_auto

    names: dict[str, Any] = dict(getattr(modeling_auto, f"{HEADS[head]}_NAMES"))
    return {
        kind: listed if isinstance(listed, str) else listed[0] for kind, listed in names.items()
    }


def _rope_variants() -> Iterator[Architecture]:
    for model_type, scalings in (
        ("llama", tuple(_ROPE)),
        ("qwen2", ("dynamic",)),
        ("phi3", ("longrope",)),
    ):
        for scaling in scalings:
            rope = {"rope_type": scaling, **_ROPE[scaling]}
            length = {"max_position_embeddings": 16 if scaling == "dynamic" else 64}
            overrides = {"rope_parameters": rope, "original_max_position_embeddings": 16, **length}
            yield Architecture(
                "rope", model_type, _listed("causal")[model_type], scaling, overrides
            )
