"""How a model's loss uses labels: its token's, the next one's or its sample's, and who counts
them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ulysses_accel.introspection.findings import Finding
from ulysses_accel.introspection.sample_heads import ANSWERS, first_token_modules, read_sample_head
from ulysses_accel.introspection.source import (
    assignments,
    calls_of,
    keyword,
    mentions,
    parameters,
    syntax_of,
    takes_keywords,
    text_of,
)
from ulysses_accel.introspection.structure import ModelReading, once_per_reading

_OUTSIDE = "Compute the loss from its logits, outside of the model, or use sp_size=1 and cp_size=1."
# What some models take beside the labels of tokens.
_SAMPLE_LABELS = ("next_sentence_label", "sentence_order_label")
_OTHER_LOSSES = ("MSELoss", "BCEWithLogitsLoss", "CTCLoss", "L1Loss", "KLDivLoss")


@dataclass(frozen=True)
class LossUse:
    """How a model computes its loss from labels.

    Args:
        labels: as in `BatchRules`: whether a token's label is the next token's or its own, or they
            are the sample's.
        divides_by_items: whether it takes `num_items_in_batch` and divides the sum by it; otherwise
            it is a mean.
        needs: the arguments that it is computed from; beside the `labels` of tokens one of samples,
            whose mean it adds.
    """

    labels: Literal["next_token", "same_token", "whole"]
    divides_by_items: bool
    needs: tuple[str, ...] = ("labels",)

    @property
    def is_of_both(self) -> bool:
        """Whether it is a mean over tokens and one over samples, added."""
        return self.labels != "whole" and len(self.needs) > 1

    @property
    def is_of_samples(self) -> bool:
        """Whether some of it is a loss of samples."""
        return self.labels == "whole" or self.is_of_both


@once_per_reading
def read_loss(reading: ModelReading) -> LossUse | list[Finding] | None:
    """Returns how a transformers model uses labels; None where it takes none, findings where it
    can't be aggregated.
    """
    model, forward, taken = reading.model, reading.forward, reading.parameters
    head = read_sample_head(reading)
    if head is not None:
        return LossUse("whole", False, ANSWERS if head.answers else ("labels",))
    if set(ANSWERS) <= set(taken):
        return [
            Finding("loss", "forward", "it looks for answers in a way that is not known.", _OUTSIDE)
        ]
    if "labels" not in taken:
        return None
    if forward is None:
        # transformers takes a model without a loss of its own for one of next tokens, too.
        return LossUse("next_token", True)
    findings = [*_slices(forward)]
    forward = _where_loss_is(model, forward)
    called = calls_of(forward, "self.loss_function")
    used = (
        _by_loss_function(model, forward, called) if called else _by_cross_entropy(reading, forward)
    )
    if isinstance(used, Finding):
        return [*findings, used]
    return findings or used


def _slices(forward: ast.FunctionDef) -> Iterator[Finding]:
    sliced = [
        node
        for node in ast.walk(forward)
        if isinstance(node, ast.Subscript) and mentions(node.value, "labels") and _is_part(node)
    ]
    if sliced:
        yield Finding(
            "loss",
            "forward",
            f"its forward cuts the labels by itself ({text_of(sliced[0])}), as if it had the whole "
            "sequence.",
            _OUTSIDE,
        )


def _is_part(node: ast.AST) -> bool:
    """Whether an expression takes a part of a tensor by indices; choosing tokens by a mask does
    not.
    """
    return isinstance(node, ast.Subscript) and any(
        isinstance(part, ast.Slice) for part in ast.walk(node.slice)
    )


def _where_loss_is(model: nn.Module, forward: ast.FunctionDef) -> ast.FunctionDef:
    """Returns the forward that has the loss, where a class leaves it to its parent's."""
    classes = [cls for cls in type(model).__mro__ if "forward" in vars(cls)]
    while calls_of(forward, "super().forward") and not _computes_loss(forward) and len(classes) > 1:
        classes.pop(0)
        forward = syntax_of(vars(classes[0])["forward"]) or forward
    return forward


def _computes_loss(forward: ast.FunctionDef) -> bool:
    return any(
        "loss" in ast.unparse(call.func) or "entropy" in ast.unparse(call.func)
        for call in _calls(forward)
    )


def _by_loss_function(
    model: Any, forward: ast.FunctionDef, calls: list[ast.Call]
) -> LossUse | Finding:
    """Reads the use of transformers' loss functions, which `loss_type` chooses."""
    from transformers.loss.loss_utils import LOSS_MAPPING

    loss_type = getattr(model, "loss_type", None)
    loss_type = loss_type if loss_type in LOSS_MAPPING else "ForCausalLM"
    function = LOSS_MAPPING[loss_type]
    divides = all(keyword(call, None) is not None for call in calls)
    if function in (LOSS_MAPPING["ForMaskedLM"], LOSS_MAPPING["ForTokenClassification"]):
        return LossUse("same_token", divides)
    if function is not LOSS_MAPPING["ForCausalLM"]:
        return Finding(
            "loss",
            "forward",
            f"its loss is {loss_type}, which is not a mean over tokens.",
            "Use sp_size=1 and cp_size=1.",
        )
    if len(calls) == 1 and _passes_unshifted(model, forward, keyword(calls[0], "shift_labels")):
        return LossUse("same_token", divides)
    if not takes_keywords(model) and "shift_labels" not in parameters(model):
        return Finding(
            "loss",
            "forward",
            "its forward takes no further keyword arguments, so shift_labels can't reach its loss.",
            _OUTSIDE,
        )
    if any(keyword(call, None) is None and keyword(call, "shift_labels") is None for call in calls):
        return Finding(
            "loss",
            "forward",
            "its forward does not pass keyword arguments on to its loss, so shift_labels can't "
            "reach it and a shard's "
            "labels would be shifted twice.",
            _OUTSIDE,
        )
    return LossUse("next_token", divides)


def _passes_unshifted(model: nn.Module, forward: ast.FunctionDef, passed: ast.expr | None) -> bool:
    """Whether the labels as they came are passed where the shifted ones belong: the decoder's
    inputs are shifted.
    """
    if passed is None:
        return False
    values = [
        value
        for name, value in assignments(forward, model)
        if isinstance(passed, ast.Name) and name == passed.id
    ]
    return any(mentions(value, "labels") for value in [passed, *values])


def _by_cross_entropy(reading: ModelReading, forward: ast.FunctionDef) -> LossUse | Finding:
    """Reads a loss that the forward computes with torch's cross entropy, of logits and labels as
    they are.
    """
    model = reading.model
    every = [
        node
        for node in ast.walk(forward)
        if isinstance(node, ast.Call) and _is_cross_entropy(node, forward, model)
    ]
    pooled = {name: call for call in every for name in _SAMPLE_LABELS if mentions(call, name)}
    calls = [call for call in every if call not in pooled.values()]
    others = [
        name
        for name in _OTHER_LOSSES
        if any(name in text_of(node.func) for node in _calls(forward))
    ]
    added = _are_added(forward, every) and bool(first_token_modules(reading))
    if len(calls) != 1 or others or (pooled and not added):
        listed = ", ".join([*others, *(text_of(call) for call in every)]) or "none that is known"
        return Finding("loss", "forward", f"its loss ({listed}) is not one mean over tokens.")
    (call,) = calls
    logits, labels = _arguments(call)
    of_labels = logits is not None and labels is not None and mentions(labels, "labels")
    if not of_labels or _is_sliced(logits, forward, model) or not _is_by_token(logits, model):
        return Finding(
            "loss", "forward", f"its loss ({text_of(call)}) is not one of each token.", _OUTSIDE
        )
    return LossUse("same_token", False, ("labels", *pooled))


def _arguments(call: ast.Call) -> tuple[ast.expr | None, ast.expr | None]:
    """Returns the logits and the labels of a call of cross entropy."""
    logits = call.args[0] if call.args else keyword(call, "input")
    return logits, call.args[1] if len(call.args) > 1 else keyword(call, "target")


def _are_added(forward: ast.FunctionDef, calls: list[ast.Call]) -> bool:
    """Whether two losses are added as they are, and not used otherwise."""
    stored = [node for node in ast.walk(forward) if isinstance(node, ast.Assign)]
    names = {
        ast.unparse(node.targets[0]) for node in stored if any(node.value is call for call in calls)
    }
    uses = [
        node
        for node in ast.walk(forward)
        if isinstance(node, ast.Name) and node.id in names and isinstance(node.ctx, ast.Load)
    ]
    sums = [
        {ast.unparse(node.left), ast.unparse(node.right)}
        for node in ast.walk(forward)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)
    ]
    return len(names) == len(uses) == len(calls) == 2 and names in sums


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def _is_cross_entropy(call: ast.Call, forward: ast.FunctionDef, model: Any) -> bool:
    function = ast.unparse(call.func)
    if function.endswith("cross_entropy"):
        return not _options(call)
    if function.startswith("self."):
        return isinstance(getattr(model, function.removeprefix("self."), None), nn.CrossEntropyLoss)
    values = [value for name, value in assignments(forward, model) if name == function]
    return any(
        isinstance(value, ast.Call)
        and ast.unparse(value.func).endswith("CrossEntropyLoss")
        and not _options(value)
        for value in values
    )


def _options(call: ast.Call) -> list[str]:
    """Returns what makes a cross entropy another than the mean over the labels that are not
    -100.
    """
    words = {word.arg: ast.unparse(word.value) for word in call.keywords}
    return [
        name
        for name, value in words.items()
        if name and name not in ("input", "target") and (name, value) != ("ignore_index", "-100")
    ]


def _is_sliced(logits: ast.expr | None, forward: ast.FunctionDef, model: Any) -> bool:
    """Whether logits are a part of what the model computed: without the last token, or one
    token's.
    """
    if logits is None:
        return True
    names = {node.id for node in ast.walk(logits) if isinstance(node, ast.Name)}
    values = [value for name, value in assignments(forward, model) if name in names]
    return any(_is_part(node) for value in [logits, *values] for node in ast.walk(value))


def _is_by_token(logits: ast.expr | None, model: Any) -> bool:
    """Whether logits are flattened to one row of a vocabulary, or of token labels, for each
    token.
    """
    text = ast.unparse(logits) if logits is not None else ""
    if "vocab" in text or "size(-1)" in text or "shape[-1]" in text:
        return True
    return "num_labels" in text and getattr(model, "loss_type", None) == "ForTokenClassification"
