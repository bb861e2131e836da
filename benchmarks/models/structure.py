"""Where a model mixes tokens, found by running it: through transformers' attention functions, or
also elsewhere.

All attention that goes through the functions' registry is replaced by one where a token sees itself
only. If other tokens' values still change with one token, then something else mixes: a state space,
a convolution, attention of its own, statistics over the sequence, or embeddings of several tokens.
The innermost modules in which it happens are named.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.batches import Batch, Form
from benchmarks.models.reference import InDouble, State, attention, without_cache

# Lengths that no layer's size is equal to, so that they tell the token dim.
SOURCE, TARGET = 13, 11
CHANGED = {SOURCE: 6, TARGET: 5}
NAME = "own_token_only"
# Rounding of matrix products whose row count changes, where experts share tokens.
SAME = 1e-9


@dataclass(frozen=True)
class Structure:
    """What a model does with its tokens.

    Args:
        routes: whether any attention goes through transformers' registry of attention functions.
        mixes_in: classes of the modules that mix tokens besides, the first layer's only.
    """

    routes: bool
    mixes_in: tuple[str, ...]


@dataclass
class _Seen:
    """What went into a module and came out of it, by its name, and the masks that attention was
    given.
    """

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    masks: list[tuple[str, Tensor | None]] = field(default_factory=list)


def structure_of(model: nn.Module, form: Form, features: Batch) -> Structure:
    """Runs a model twice, one token apart, and returns what follows for its structure.

    Args:
        model: tiny, in float64.
        form: of batches that it takes.
        features: the encoder's input where it is no tokens.
    """
    state, training = State(model), model.training
    model.eval()
    try:
        with attention(model, NAME), torch.no_grad():
            seen = [
                _run(model, form, _probe(form, features, changed), state)
                for changed in (False, True)
            ]
    finally:
        model.train(training)
        state.restore()
    mixing = [name for name in seen[0].outputs if _mixes(name, *seen)]
    innermost = [
        name
        for name in mixing
        if not any(other.startswith(f"{name}.") for other in mixing if other != name)
    ]
    innermost = [name for name in innermost if name or len(mixing) == 1]
    modules = dict(model.named_modules())
    found = [type(modules[name]).__name__ for name in innermost]
    found += [
        f"mask of {name}"
        for (name, mask), (_, other) in zip(seen[0].masks, seen[1].masks)
        if _differ(mask, other)
    ]
    return Structure(bool(seen[0].masks), tuple(dict.fromkeys(found)))


@contextmanager
def own_token_attention(masks: list[tuple[str, Tensor | None]]) -> Iterator[None]:
    """Registers an attention function where each token sees itself only, for a while.

    Args:
        masks: gets for each call the calling module's class and the mask that it gave.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def own(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, None]:
        masks.append(
            (
                type(module).__name__,
                attention_mask.clone() if isinstance(attention_mask, Tensor) else None,
            )
        )
        if query.shape[2] != value.shape[2]:
            return query.new_zeros(
                query.shape[0], query.shape[2], query.shape[1], value.shape[3]
            ), None
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(
            1, 2
        ).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register(NAME, own)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(NAME, None)
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(NAME, None)


def _probe(form: Form, features: Batch, changed: bool) -> Batch:
    """One row of tokens, for encoder and decoder; `changed` differs in one token of each."""
    made = {}
    for name, length in (("input_ids", SOURCE), ("decoder_input_ids", TARGET)):
        tokens = torch.randint(8, 60, (1, length), generator=torch.Generator().manual_seed(length))
        tokens[0, CHANGED[length]] = 5 if changed else 60
        made[name] = tokens
    if form in ("causal", "masked"):
        del made["decoder_input_ids"]
    if form == "features":
        return {
            **{name: value[:1] for name, value in features.items()},
            "decoder_input_ids": made["decoder_input_ids"],
        }
    return made


def _run(model: nn.Module, form: Form, batch: Batch, state: State) -> _Seen:
    seen = _Seen()
    state.restore()

    def watch(name: str, module: nn.Module) -> Any:
        def record(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            # A module that runs more than once is known by its first call.
            seen.inputs.setdefault(name, [_by_token(value) for value in _tensors([args, kwargs])])
            seen.outputs.setdefault(name, [_by_token(value) for value in _tensors(output)])

        return module.register_forward_hook(record, with_kwargs=True)

    handles = [watch(name, module) for name, module in model.named_modules()]
    try:
        with own_token_attention(seen.masks), InDouble():
            model(**batch, **without_cache(form, model))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (found for part in value.values() for found in _tensors(part))
    elif isinstance(value, (list, tuple)):
        yield from (found for part in value for found in _tensors(part))


def _by_token(value: Tensor) -> Tensor:
    """Returns a copy with the token dim first; empty where no dim is one."""
    dims = [dim for dim, size in enumerate(value.shape) if size in CHANGED]
    if not dims or value.dtype == torch.bool:
        return value.new_zeros(0)
    return value.detach().clone().movedim(dims[0], 0)


def _mixes(name: str, before: _Seen, after: _Seen) -> bool:
    """Whether other tokens' values change within a module: they do at its end, and do not at its
    beginning.
    """
    ends = any(map(_others_changed, before.outputs[name], after.outputs.get(name, [])))
    return ends and not any(map(_others_changed, before.inputs[name], after.inputs.get(name, [])))


def _differ(before: Tensor | None, after: Tensor | None) -> bool:
    if before is None or after is None:
        return before is not after
    return before.shape != after.shape or not torch.equal(before, after)


def _others_changed(before: Tensor, after: Tensor) -> bool:
    if before.shape != after.shape or not before.numel():
        return False
    others = torch.arange(len(before)) != CHANGED[len(before)]
    first, second = before[others].double(), after[others].double()
    return bool((first - second).abs().max() > SAME * (1 + first.abs().max()))
