"""Whether a model lets tokens see each other outside of attention, from running it.

A tiny twin of the model (its class, its configuration at tiny sizes, weights of its own) computes
some rows twice, with an attention in which each token sees itself only. One token differs the
second time. If the values of any other token change, then something besides attention mixes
tokens: a statistic of the sequence, a convolution, a state, attention of its own. Sharding
attention can't make that exact. The module named is the first whose output changes for other
tokens although its inputs don't.

Code is what counts, so that a forward without source says as much as one with it. Where a forward
was set on a module of this model, the twin gets it too; if it is bound to the module in a way that
the twin can't have, then the model itself is run on the same few tokens, and left as it was.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ulysses_accel import _private_api
from ulysses_accel.installation import Installation
from ulysses_accel.introspection.probe.forwards import (
    ReplacedForward,
    architecture_class,
    foreign_modules,
    is_materialized,
    replaced_forwards,
)
from ulysses_accel.introspection.probe.twin import VOCAB, build_twin, configs_of
from ulysses_accel.introspection.source import forward_of, parameters

NAME = "ulysses_accel_token_by_token"
"""Of the probe's attention in transformers' registries, where it is only while a probe runs."""
# Lengths that no size of a layer is equal to, which the token dim is recognised by.
_LENGTH, _DECODER_LENGTH, _ROWS = 13, 11, 3
# Rounding, relative to the largest value: experts compute other numbers of tokens together.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
_MAX_CACHED = 256
NOT_HERE = "this rank does not hold all of its parameters"


@dataclass(frozen=True)
class Probe:
    """What running a model said.

    Args:
        ran: whether it did run.
        mixing: name of the first module that mixes tokens outside of attention; "" for the model
            itself, None where none does.
        class_name: of that module.
        failure: why it did not run.
        is_of_twin: whether a twin was run, which says the same on every rank.
        unknown: the modules of which nothing is known, as neither running nor reading them says
            anything.
    """

    ran: bool
    mixing: str | None = None
    class_name: str = ""
    failure: str = ""
    is_of_twin: bool = True
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class _TwinSays:
    """What a model's twin said, and of which classes its modules are."""

    result: Probe
    classes: frozenset[type[nn.Module]]


_CACHE: OrderedDict[Any, _TwinSays] = OrderedDict()


def probe(model: Any, sharded: Mapping[str, nn.Module]) -> Probe:
    """Returns whether a transformers model lets tokens see each other outside of attention.

    Args:
        model: a transformers model; left as it was.
        sharded: the modules that see sharded tokens or hold one that does, by name; what others
            mix does not count.
    """
    twin = _cached(model, sharded)
    replaced = replaced_forwards(sharded)
    foreign = foreign_modules(sharded, twin.classes)
    if twin.result.mixing is not None or not (replaced or foreign):
        return twin.result
    if not foreign and all(one.is_bound for one in replaced):
        result = _probe_twin(model, sharded, replaced).result
        if result.ran:
            return result
    result = _probe_model(model, sharded)
    if result.ran:
        return result
    # Code that can't be run is judged by its source, which is only the class's.
    unknown = [one.name for one in replaced]
    unknown += [name for name, module in foreign.items() if forward_of(module) is None]
    return dataclasses.replace(result, unknown=tuple(unknown))


def _cached(model: Any, sharded: Mapping[str, nn.Module]) -> _TwinSays:
    """Returns what the twin says, from the last time where classes and configuration are the
    same.
    """
    # A class's forward can be replaced as well, after the class was probed.
    forwards = frozenset((type(module), type(module).forward) for module in sharded.values())
    key = type(model), model.config.to_json_string(use_diff=False), forwards
    if key in _CACHE:
        _CACHE.move_to_end(key)
        return _CACHE[key]
    says = _CACHE[key] = _probe_twin(model, sharded, [])
    if len(_CACHE) > _MAX_CACHED:
        _CACHE.popitem(last=False)
    return says


def _probe_twin(
    model: Any, sharded: Mapping[str, nn.Module], replaced: list[ReplacedForward]
) -> _TwinSays:
    classes: frozenset[type[nn.Module]] = frozenset()
    try:
        with _quiet():
            twin = build_twin(architecture_class(model), model.config)
            modules = dict(twin.named_modules())
            classes = frozenset(type(module) for module in modules.values())
            for one in replaced:
                # Its layer may be one that the twin left out.
                name = one.name if one.name in modules else _first_alike(one, modules)
                modules[name].forward = MethodType(one.function, modules[name])
            # A shrunk tower may have fewer layers than the model's, never one of another name.
            watched = {name: module for name, module in modules.items() if name in sharded}
            return _TwinSays(_run(twin, watched), classes)
    except Exception as error:
        return _TwinSays(Probe(False, failure=f"{type(error).__name__}: {error}"), classes)


def _first_alike(one: ReplacedForward, modules: Mapping[str, nn.Module]) -> str:
    """Returns the name of the twin's first module of the class that a replaced forward is for."""
    return next(
        name for name, module in modules.items() if type(module) is architecture_class(one.module)
    )


def _probe_model(model: Any, sharded: Mapping[str, nn.Module]) -> Probe:
    """Runs the model itself, which keeps its weights, buffers, modes and configurations."""
    if not is_materialized(model):
        return Probe(False, failure=NOT_HERE, is_of_twin=False)
    try:
        with _quiet(), _unchanged(model):
            model.eval()
            return dataclasses.replace(_run(model, sharded), is_of_twin=False)
    except Exception as error:
        return Probe(False, failure=f"{type(error).__name__}: {error}", is_of_twin=False)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Suspends a model's hooks, which may count its calls, and restores all that a forward may
    leave in modules: modes, lengths that were reached, buffers, and the hooks by which
    transformers 5.23 records outputs.
    """
    states = [_ModuleState(module) for module in model.modules()]
    try:
        for module in model.modules():
            for kind in _private_api.MODULE_HOOKS:
                getattr(module, kind).clear()
        yield
    finally:
        for state in states:
            state.restore()


class _ModuleState:
    """A module's attributes, the entries of those that are tables, and its buffers' values."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._attributes = dict(vars(module))
        self._tables: dict[str, dict[Any, Any]] = {}
        for name, value in self._attributes.items():
            if isinstance(value, dict):
                self._tables[name] = dict(value)
        self._buffers: list[tuple[Tensor, Tensor]] = []
        for buffer in _private_api.module_buffers(module).values():
            if buffer is not None:
                self._buffers.append((buffer, buffer.clone()))

    def restore(self) -> None:
        """Gives the module everything back, in place."""
        attributes = vars(self._module)
        attributes.clear()
        attributes.update(self._attributes)
        for name, entries in self._tables.items():
            table = attributes[name]
            table.clear()
            table.update(entries)
        for buffer, values in self._buffers:
            buffer.copy_(values)


@contextmanager
def _quiet() -> Iterator[None]:
    """Computes without gradients, autocast or hints to the user; restores the random state."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(list(devices)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(_silent())
        yield


@contextmanager
def _silent() -> Iterator[None]:
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


@dataclass(frozen=True)
class _Call:
    """The tensors that went into a module's forward and came out of it, where they are of tokens.

    Args:
        inputs: `[rows, tokens, ...]` each.
        outputs: likewise.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]


# By the module's name and how many of its calls came before; in the order in which they ended.
_Calls = dict[tuple[str, int], _Call]


def _run(model: Any, watched: Mapping[str, nn.Module]) -> Probe:
    """Runs a model twice, one token apart, and compares the other tokens of the watched modules."""
    device = next(model.parameters()).device
    *usual, other = _ordinary_tokens(model.config)
    arguments = _arguments(model, usual, device)
    before = _values(model, watched, arguments)
    after = _values(model, watched, _perturbed(arguments, other))
    for call, first in before.items():
        # Other tokens may have been sent to other experts.
        second = after.get(call, first)
        ends = _others_changed(first.outputs, second.outputs)
        if ends and not _others_changed(first.inputs, second.inputs):
            name, _number = call
            return Probe(True, name, type(watched[name]).__name__)
    return Probe(True)


def _ordinary_tokens(config: Any) -> list[int]:
    """Returns tokens that a model has no special use for."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    special: set[Any] = set()
    for part in (config, text):
        for name, value in vars(part).items():
            if name.endswith(("token_id", "token_index")):
                special |= set(value) if isinstance(value, list | tuple) else {value}
    size = min(getattr(text, "vocab_size", None) or VOCAB, VOCAB)
    return [token for token in range(size) if token not in special]


def _arguments(model: Any, usual: list[int], device: torch.device) -> dict[str, Any]:
    """Returns some rows of tokens for a model, with their positions, as it takes them."""
    taken = parameters(model)
    tokens = _tokens(usual, _LENGTH).to(device)
    arguments: dict[str, Any] = {"use_cache": False} if "use_cache" in taken else {}
    if "position_ids" in taken:
        arguments["position_ids"] = _positions(_LENGTH).to(device)
    if not getattr(model.config, "is_encoder_decoder", False):
        return {**arguments, "input_ids": tokens}
    arguments["decoder_input_ids"] = _tokens(usual, _DECODER_LENGTH).to(device)
    if "decoder_position_ids" in taken:
        arguments["decoder_position_ids"] = _positions(_DECODER_LENGTH).to(device)
    if "input_ids" in taken:
        return {**arguments, "input_ids": tokens}
    # An encoder of images or audio runs in full on every rank; the decoder is what is asked about.
    from transformers.modeling_outputs import BaseModelOutput

    encoder = model.get_encoder().config
    width = getattr(encoder, "hidden_size", None) or encoder.d_model
    dtype = next(model.parameters()).dtype
    hidden = torch.zeros(_ROWS, _LENGTH, width, dtype=dtype, device=device)
    arguments.pop("position_ids", None)
    outputs: Any = BaseModelOutput(last_hidden_state=hidden)
    # Moonshine and others read the mask of what their encoder has merged.
    outputs.attention_mask = None
    return {**arguments, "encoder_outputs": outputs}


def _tokens(usual: list[int], length: int) -> Tensor:
    chosen = torch.randint(len(usual), (length,), generator=torch.Generator().manual_seed(length))
    return torch.tensor(usual)[chosen].expand(_ROWS, -1).clone()


def _positions(length: int) -> Tensor:
    return torch.arange(length).expand(_ROWS, -1)


def _indices(length: int) -> list[int]:
    """Returns which token differs, row by row: the first, one in the middle, the last."""
    return [0, length // 2, length - 1]


def _perturbed(arguments: dict[str, Any], other: int) -> dict[str, Any]:
    """Returns the arguments with the token `other` at one index of each row."""
    changed = dict(arguments)
    for name in ("input_ids", "decoder_input_ids"):
        if name in arguments:
            tokens = changed[name] = arguments[name].clone()
            tokens[torch.arange(_ROWS), _indices(tokens.shape[1])] = other
    return changed


def _values(model: Any, watched: Mapping[str, nn.Module], arguments: Mapping[str, Any]) -> _Calls:
    """Runs a model with attention token by token, and returns the values of the watched modules."""
    calls: _Calls = {}
    counts: Counter[str] = Counter()

    def watch(name: str, module: nn.Module) -> Any:
        def record(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            inputs = [_by_token(tensor) for tensor in _tensors([args, kwargs])]
            calls[name, counts[name]] = _Call(
                inputs, [_by_token(part) for part in _tensors(output)]
            )
            counts[name] += 1

        return module.register_forward_hook(record, with_kwargs=True)

    with ExitStack() as stack:
        stack.enter_context(_token_by_token(model))
        for name, module in watched.items():
            stack.callback(watch(name, module).remove)
        model(**arguments)
    return calls


@contextmanager
def _token_by_token(model: nn.Module) -> Iterator[None]:
    """Points a model at an attention in which each token sees itself only, for a while."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    changes, copies = Installation(), dict[int, Any]()
    ALL_ATTENTION_FUNCTIONS.register(NAME, _own_value)
    # Models that are older than the registry need a mask; none of them depends on the tokens.
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        changes.callback(_private_api.unregister_attention, registry, NAME)
    try:
        for module in model.modules():
            config = vars(module).get("config")
            if _private_api.has_attention_setting(config):
                private = copy.deepcopy(config, copies)
                for part in configs_of(private):
                    _private_api.set_attention(part, NAME)
                changes.set(module, "config", private)
        yield
    finally:
        changes.close()


def _own_value(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """Attention in which each token sees itself only; nothing where it asks another sequence.

    Args:
        module: that calls.
        query: `[B, H, S, D]`.
        key: `[B, K, S, D]`.
        value: `[B, K, S, Dv]`.

    Returns:
        `[B, S, H, Dv]`.
    """
    rows, heads, length, _width = query.shape
    if length != value.shape[2]:
        return query.new_zeros(rows, length, heads, value.shape[3]), None
    repeated = value.repeat_interleave(heads // value.shape[1], dim=1)
    return repeated.transpose(1, 2).contiguous(), None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _by_token(value: Tensor) -> Tensor:
    """Returns a copy `[rows, tokens, ...]`; an empty one where no dims are those of tokens."""
    if value.dtype == torch.bool:
        return value.new_zeros(0)
    for length in (_LENGTH, _DECODER_LENGTH):
        shape = tuple(value.shape)
        if shape[:1] == (_ROWS * length,):
            return value.detach().clone().view(_ROWS, length, *shape[1:])
        if shape[:2] == (length, _ROWS):
            return value.detach().transpose(0, 1).clone()
        if shape[:1] == (_ROWS,) and length in shape[1:]:
            return value.detach().clone().movedim(shape.index(length, 1), 1)
    return value.new_zeros(0)


def _others_changed(before: list[Tensor], after: list[Tensor]) -> bool:
    return any(map(_other_tokens_changed, before, after))


def _other_tokens_changed(before: Tensor, after: Tensor) -> bool:
    if before.shape != after.shape or not before.numel():
        return False
    others = torch.ones(before.shape[:2], dtype=torch.bool, device=before.device)
    others[torch.arange(_ROWS), _indices(before.shape[1])] = False
    wide = torch.complex128 if before.is_complex() else torch.float64
    first, second = before[others].to(wide), after[others].to(wide)
    tolerance = _TOLERANCES.get(before.dtype, _TOLERANCES[torch.float32])
    scale = float(first.abs().nan_to_num(0.0, 0.0, 0.0).max())
    return float((first - second).nan_to_num(0.0, 0.0, 0.0).abs().max()) > tolerance * scale
