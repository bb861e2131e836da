"""The tiled loss on a transformers model: `model(**batch).loss` without the logits.

The head's forward is replaced on that one instance. It is still called as a module, when the loss
is made too, so that ZeRO-3 gathers its weight around it; FSDP2 is asked to.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ulysses_accel.errors import BatchError, ConfigError, UnsupportedModelError
from ulysses_accel.memory.tiled_loss.cross_entropy import tiled_cross_entropy
from ulysses_accel.memory.tiled_loss.head import product_dtype
from ulysses_accel.memory.tiled_loss.lazy_logits import Chain, LazyLogits, LossRequest
from ulysses_accel.memory.tiled_loss.log_probs import token_log_probs
from ulysses_accel.sequence.labels import IGNORE_INDEX

_LIGER = "liger_kernel.transformers.functional"


@dataclass
class TiledLoss:
    """The tiled loss of one model, and the way to take it off.

    Args:
        model: the model that computes the loss.
        head: its output layer.
        options: passed to `tiled_cross_entropy`.
        return_logits: whether models return logits beside a loss, which is then the ordinary one.
        liger: Liger's function, if it is to be used.
    """

    model: nn.Module
    head: nn.Linear
    options: dict[str, Any]
    return_logits: bool
    liger: Callable[..., Any] | None
    handles: list[Any] = field(default_factory=list)
    running: list[bool] = field(default_factory=list)
    num_losses: list[int] = field(default_factory=list)
    # Labels of forwards that are asked for log-probabilities.
    scored: list[Tensor | None] = field(default_factory=list)

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Notes whether this forward computes a loss that is to be tiled."""
        kwargs = dict(kwargs)
        # TRL's own head takes the place of this one, and computes in tiles too.
        keeps_logits = kwargs.pop("return_logits", self.return_logits) or kwargs.get(
            "fused_lm_head", False
        )
        wants_log_probs = kwargs.pop("return_log_probs", False)
        given = {
            **dict(zip(list(inspect.signature(type(model).forward).parameters)[1:], args)),
            **kwargs,
        }
        has_labels = given.get("labels") is not None or given.get("shift_labels") is not None
        self.running.append(has_labels and not keeps_logits)
        self.num_losses.append(0)
        self.scored.append(None)
        if wants_log_probs:
            self.scored[-1] = _take_shifted(kwargs)
        return args, kwargs

    def after(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Takes stand-ins out of the output; runs also when the forward raised, with no output."""
        is_tiled, num_losses, labels = self.running.pop(), self.num_losses.pop(), self.scored.pop()
        if output is None or not is_tiled:
            return None
        if labels is not None:
            return _with_log_probs(output, labels)
        if num_losses == 0 and _loss_of(output) is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} computed its loss without its output layer's forward or "
                "without "
                f"cross_entropy, so it can't be tiled. Use tiled_loss=False for this model."
            )
        return _without_stand_ins(output, materialize=num_losses == 0)

    def forward(self, hidden: Tensor, request: LossRequest | None = None) -> Any:
        """The head's forward: logits, a stand-in for them, or the loss.

        Args:
            hidden: `[.., D]`.
            request: what is asked for in place of logits.
        """
        if request is not None:
            if self.num_losses:
                self.num_losses[-1] += 1
            return self._loss(hidden, request)
        if self.running and self.running[-1]:
            dtype = product_dtype(hidden)
            return LazyLogits(self._call_head, hidden, self.head.weight.shape[0], dtype, Chain())
        return nn.functional.linear(hidden, self.head.weight, self.head.bias)

    def uninstall(self) -> None:
        """Restores the model."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if isinstance(self.head.__dict__.get("forward"), _HeadForward):
            del self.head.forward

    def _call_head(self, hidden: Tensor, request: LossRequest | None = None) -> Any:
        if request is not None:
            owner = _fsdp_owner(self.model, self.head)
            return (
                self.head(hidden, request)
                if owner is None
                else self._loss_under_fsdp(owner, hidden, request)
            )
        self.running.append(False)
        try:
            return self.head(hidden)
        finally:
            self.running.pop()

    def _loss_under_fsdp(self, owner: FSDPModule, hidden: Tensor, request: LossRequest) -> Any:
        """The loss without calling the head again: FSDP2 counts on one call of every module of a
        group.
        """
        is_resharded = isinstance(self.head.weight, DTensor)
        if is_resharded:
            owner.unshard()
        try:
            loss, count = self.forward(hidden, request)
        finally:
            if is_resharded:
                owner.reshard()

        def gather(_: Tensor) -> None:
            owner.unshard()

        # FSDP2's own hooks for backward are on a module's output, and the stand-in is no tensor.
        for tensor in (loss, hidden):
            if tensor.requires_grad:
                tensor.register_hook(gather)
        return loss, count

    def _loss(self, hidden: Tensor, request: LossRequest) -> tuple[Tensor, Tensor]:
        head, chain = self.head, request.chain
        if isinstance(head.weight, DTensor):
            raise UnsupportedModelError(
                f"the output layer's weight is sharded {tuple(head.weight.placements)} while it "
                "computes the loss, "
                "which tiles tokens and not the vocabulary. Keep the output layer out of tensor "
                "parallelism."
            )
        bias = (
            head.bias
            if chain.offset is None
            else chain.offset + (0 if head.bias is None else head.bias)
        )
        kwargs: dict[str, Any] = {"bias": bias, "ignore_index": request.ignore_index}
        kwargs["logit_scale"] = chain.scale * chain.after
        kwargs["softcap"] = chain.after if chain.bounded else None
        options = dict(self.options)
        options["label_smoothing"] = request.label_smoothing or options["label_smoothing"]
        if self.liger is not None and not request.per_token:
            return _liger_loss(
                self.liger, hidden, head.weight, request.labels, {**kwargs, **options}
            )
        if not request.per_token:
            return tiled_cross_entropy(hidden, head.weight, request.labels, **kwargs, **options)
        if options["label_smoothing"] or options["z_loss"]:
            raise ConfigError(
                "a loss per token has neither label smoothing nor z-loss here. Leave both out."
            )
        sizes = {name: options[name] for name in ("tile_tokens", "tile_bytes")}
        log_probs, _ = token_log_probs(hidden, head.weight, request.labels, **kwargs, **sizes)
        return -log_probs, (request.labels != request.ignore_index).sum()


class _HeadForward:
    """A head's forward on one instance; a type of its own, so that it is recognised."""

    def __init__(self, installed: TiledLoss) -> None:
        self.installed = installed

    def __call__(self, hidden: Tensor, request: LossRequest | None = None) -> Any:
        return self.installed.forward(hidden, request)


def tile_loss(
    model: nn.Module,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    tile_tokens: int | None = None,
    tile_bytes: int | None = None,
    recompute: bool = False,
    return_logits: bool = False,
    use_liger: bool = False,
) -> TiledLoss:
    """Makes a language model compute its loss without its logits; changed in place, reversibly.

    With labels, the output's `logits` are then None. Without labels, or where a forward is passed
    `return_logits=True`, the model does what it always did. Passed `return_log_probs=True` and
    `shift_labels` `[B, S]`, it computes no loss; the output's `log_probs` `[B, S]` are those of the
    labels, differentiable, 0 where a label does not count. The model's own loss function stays:
    whatever reaches `torch.nn.functional.cross_entropy` is tiled. Under ZeRO-3, and under FSDP2
    where the head is resharded after its forward, its weight is gathered twice in forward.

    Args:
        model: a transformers model with a linear output layer, or a module that holds one.
        label_smoothing: where the loss function has none of its own.
        z_loss: weight of the squared log-sum-exp of each token's logits.
        tile_tokens: tokens of a tile.
        tile_bytes: bytes of a tile's logits where `tile_tokens` is not given.
        recompute: make the logits once more in backward, and hold no gradients in between.
        return_logits: what a forward does that is not passed `return_logits`.
        use_liger: compute with Liger's fused linear cross-entropy.

    Returns:
        The installation; its `uninstall()` restores the model.

    Raises:
        UnsupportedModelError: the model has no plain linear output layer.
        ConfigError: it is installed already, or Liger is asked for and not installed.
    """
    causal, head = _model_and_head(model)
    if isinstance(head.__dict__.get("forward"), _HeadForward):
        raise ConfigError(
            f"the loss of {type(causal).__name__} is tiled already. Call uninstall() of the first "
            "one."
        )
    options: dict[str, Any] = {
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "recompute": recompute,
    }
    options |= {"tile_tokens": tile_tokens, "tile_bytes": tile_bytes}
    installed = TiledLoss(
        causal, head, options, return_logits, _liger_function() if use_liger else None
    )
    head.forward = _HeadForward(installed)  # type: ignore[method-assign, assignment]
    installed.handles = [
        causal.register_forward_pre_hook(installed.before, with_kwargs=True),
        causal.register_forward_hook(installed.after, with_kwargs=True, always_call=True),
    ]
    return installed


def tiles_loss(model: nn.Module) -> bool:
    """Returns whether a model's forward with labels has no logits unless it is passed
    `return_logits=True`.

    Args:
        model: any module.
    """
    heads = [part.__dict__.get("forward") for part in model.modules()]
    return any(
        isinstance(forward, _HeadForward) and not forward.installed.return_logits
        for forward in heads
    )


def _model_and_head(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """Returns the model that computes the loss and its output layer, by what the model says of
    itself.
    """
    found = "none"
    for part in model.modules():
        # Of the class: adapter libraries' models hand on every attribute of the one inside of them.
        says = getattr(type(part), "get_output_embeddings", None)
        head = says(part) if says is not None else None
        if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward:
            return part, head
        found = found if head is None else f"{type(head).__module__}.{type(head).__name__}"
    raise UnsupportedModelError(
        f"{type(model).__name__} has no plain nn.Linear as its output layer (found: {found}), so "
        "its loss can't be "
        f"tiled. Use tiled_loss=False for this model."
    )


def _take_shifted(kwargs: dict[str, Any]) -> Tensor:
    """Takes the labels out of a forward's arguments, so that neither the model nor anyone around
    computes a loss.
    """
    labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    if shifted is None:
        raise BatchError(
            "return_log_probs=True needs shift_labels, each token's next one (labels: "
            f"{_shape(labels)}). A prepared "
            f"data loader gives them for labels; otherwise shift them yourself."
        )
    return shifted  # type: ignore[no-any-return]


def _shape(labels: Any) -> str:
    return f"{list(labels.shape)}" if isinstance(labels, Tensor) else "none"


def _with_log_probs(output: Any, labels: Tensor) -> Any:
    """Returns the output with each label's log-probability in place of the stand-in for logits."""
    logits = output.get("logits") if isinstance(output, dict) else None
    if not isinstance(logits, LazyLogits):
        raise UnsupportedModelError(
            "return_log_probs=True needs an output with the logits of the model's output layer. "
            "Pass return_dict=True."
        )
    # [B, S/P, D] -> [B, S/P]
    losses, _ = logits.loss(labels, IGNORE_INDEX, 0.0, per_token=True)
    entries = {name: value for name, value in output.items() if name != "logits"}
    scored = type(output)(**entries)
    scored["log_probs"] = -losses
    return scored


def _fsdp_owner(model: nn.Module, head: nn.Module) -> FSDPModule | None:
    """Returns the innermost module around the head, or the head, that FSDP2 gathers and
    reshards.
    """
    owners = [
        part for part in model.modules() if isinstance(part, FSDPModule) and _holds(part, head)
    ]
    return owners[-1] if owners else None


def _holds(part: Any, head: nn.Module) -> bool:
    return any(inner is head for inner in part.modules())


def _loss_of(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else getattr(output, "loss", None)


def _without_stand_ins(output: Any, *, materialize: bool) -> Any:
    """Returns the output with real logits in the places of stand-ins, or with None."""

    def real(value: Any) -> Any:
        if not isinstance(value, LazyLogits):
            return value
        return value.materialize() if materialize else None

    if isinstance(output, tuple):
        return tuple(real(value) for value in output)
    # Made anew, because an output does not count entries among its keys that are None from the
    # beginning.
    return type(output)(**{name: real(value) for name, value in output.items()})


def _liger_function() -> Callable[..., Any]:
    try:
        module = importlib.import_module(_LIGER)
    except ImportError as error:
        raise ConfigError(
            f"use_liger=True needs liger-kernel, which can't be imported ({error}). Install it, or "
            "leave use_liger out."
        ) from error
    function: Callable[..., Any] = module.liger_fused_linear_cross_entropy
    return function


def _liger_loss(
    function: Callable[..., Any],
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    settings: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Returns Liger's sum, and the number of counted tokens."""
    count = (labels != settings["ignore_index"]).sum()
    rows = hidden.reshape(-1, hidden.shape[-1])
    bias = settings["bias"]
    if settings["logit_scale"] != 1.0:
        # Liger has no factor of its own; the product's is its inputs'.
        rows = rows * settings["logit_scale"]
        bias = None if bias is None else bias * settings["logit_scale"]
    loss = function(
        rows,
        weight,
        labels.reshape(-1),
        bias=bias,
        ignore_index=settings["ignore_index"],
        lse_square_scale=settings["z_loss"],
        label_smoothing=settings["label_smoothing"],
        reduction="sum",
        softcap=settings["softcap"],
    )
    return loss, count
