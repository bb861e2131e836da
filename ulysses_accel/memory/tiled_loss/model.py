"""The tiled loss of a transformers model: `model(**batch).loss` without the logits.

The output layer's forward is overridden on that one instance. It is called as a module also when
the loss is computed, so that ZeRO-3's hooks gather its weight; under FSDP2 the weight is gathered
explicitly.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ulysses_accel.errors import BatchError, ConfigError, UnsupportedModelError
from ulysses_accel.installation import Installation
from ulysses_accel.memory.execution_state import linear_dtype
from ulysses_accel.memory.tiled_loss.cross_entropy import tiled_cross_entropy
from ulysses_accel.memory.tiled_loss.lazy_logits import Chain, LazyLogits, LossRequest
from ulysses_accel.memory.tiled_loss.log_probs import token_log_probs
from ulysses_accel.sequence.labels import IGNORE_INDEX

_LIGER = "liger_kernel.transformers.functional"


class TiledLoss:
    """The tiled loss of one model; `close` restores the model.

    Model and head are held weakly: they hold this object through the head's forward and through
    hooks, and a strong reference back would keep their memory until the garbage collector runs.

    Args:
        model: the model that computes the loss.
        head: its output layer.
        options: passed to `tiled_cross_entropy`.
        return_logits: whether models return logits beside a loss, which is then the ordinary one.
        liger: Liger's function, if it is to be used.
    """

    def __init__(
        self,
        model: nn.Module,
        head: nn.Linear,
        options: dict[str, Any],
        return_logits: bool,
        liger: Callable[..., Any] | None,
    ) -> None:
        self._model, self._head = weakref.ref(model), weakref.ref(head)
        self.options, self.return_logits, self.liger = options, return_logits, liger
        self._changes = Installation()
        # One entry for each forward that runs: whether its loss is tiled, how many losses the head
        # has computed, and the labels where log-probabilities are requested.
        self.running: list[bool] = []
        self._num_losses: list[int] = []
        self._scored_labels: list[Tensor | None] = []

    @property
    def head(self) -> nn.Linear:
        """The output layer."""
        head = self._head()
        assert head is not None, "the output layer calls this object, so it is alive"
        return head

    def install(self) -> None:
        """Overrides the head's forward and registers the hooks on the model."""
        model = self._model()
        assert model is not None
        self._changes.set(self.head, "forward", _HeadForward(self))
        self._changes.hooks(
            [
                model.register_forward_pre_hook(self.before, with_kwargs=True),
                model.register_forward_hook(self.after, with_kwargs=True, always_call=True),
            ]
        )

    def close(self) -> None:
        """Restores the model."""
        self._changes.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> TiledLoss:
        # For the copied model and head; the copy is closed with the model that it was copied with.
        twin = copy.copy(self)
        memo[id(self)] = twin
        model = self._model()
        # A head can be copied after its model is gone.
        if model is not None:
            twin._model = weakref.ref(copy.deepcopy(model, memo))
        twin._head = weakref.ref(copy.deepcopy(self.head, memo))
        twin._changes = Installation()
        twin.running, twin._num_losses, twin._scored_labels = [], [], []
        return twin

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Records whether this forward's loss is tiled; a pre-hook of the model."""
        kwargs = dict(kwargs)
        # TRL passes fused_lm_head where its own output layer replaces this one, in tiles too.
        keeps_logits = kwargs.pop("return_logits", self.return_logits) or kwargs.get(
            "fused_lm_head", False
        )
        returns_log_probs = kwargs.pop("return_log_probs", False)
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        arguments = {**dict(zip(names, args)), **kwargs}
        has_labels = any(arguments.get(name) is not None for name in ("labels", "shift_labels"))
        self.running.append(has_labels and not keeps_logits)
        self._num_losses.append(0)
        self._scored_labels.append(None)
        if returns_log_probs:
            self._scored_labels[-1] = _pop_shifted_labels(kwargs)
        return args, kwargs

    def after(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Replaces lazy logits in the output; a forward hook of the model, which also runs, without
        an output, when the forward raised.
        """
        is_tiled, num_losses, labels = (
            self.running.pop(),
            self._num_losses.pop(),
            self._scored_labels.pop(),
        )
        if output is None or not is_tiled:
            return None
        if labels is not None:
            return _with_log_probs(output, labels)
        if num_losses == 0 and _loss_of(output) is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} computed its loss without its output layer's forward or "
                "without cross_entropy, so it can't be tiled. Use tiled_loss=False for this model."
            )
        return _without_lazy_logits(output, materialize=num_losses == 0)

    def forward(self, hidden: Tensor, request: LossRequest | None = None) -> Any:
        """Returns logits `[.., V]`, lazy logits or the requested loss: the head's new forward.

        Args:
            hidden: `[.., D]`.
            request: a loss to compute instead of logits.
        """
        if request is not None:
            if self._num_losses:
                self._num_losses[-1] += 1
            return self._loss(hidden, request)
        if self.running and self.running[-1]:
            dtype = linear_dtype(hidden)
            return LazyLogits(self._call_head, hidden, self.head.weight.shape[0], dtype, Chain())
        return nn.functional.linear(hidden, self.head.weight, self.head.bias)

    def _call_head(self, hidden: Tensor, request: LossRequest | None = None) -> Any:
        if request is not None:
            owner = _fsdp_owner(self._model(), self.head)
            if owner is None:
                return self.head(hidden, request)
            return self._loss_under_fsdp(owner, hidden, request)
        self.running.append(False)
        try:
            return self.head(hidden)
        finally:
            self.running.pop()

    def _loss_under_fsdp(self, owner: FSDPModule, hidden: Tensor, request: LossRequest) -> Any:
        """Returns the loss without calling the head again: FSDP2 expects one call of each module in
        a parameter group.
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

        # FSDP2 of torch 2.13 registers its backward hooks on a module's output tensors, and lazy
        # logits are none.
        for tensor in (loss, hidden):
            if tensor.requires_grad:
                tensor.register_hook(gather)
        return loss, count

    def _loss(self, hidden: Tensor, request: LossRequest) -> tuple[Tensor, Tensor]:
        head, chain = self.head, request.chain
        if isinstance(head.weight, DTensor):
            raise UnsupportedModelError(
                f"the output layer's weight is sharded {tuple(head.weight.placements)} while it "
                "computes the loss, which tiles tokens and not the vocabulary. Keep the output "
                "layer out of tensor parallelism."
            )
        bias: Tensor | None = head.bias
        if chain.offset is not None:
            bias = chain.offset if bias is None else chain.offset + bias
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
    """Overrides a head's forward on one instance; its type tells that a head's loss is tiled."""

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
    """Makes a language model compute its loss without its logits.

    With labels, the output's `logits` are then None. Without labels, or with `return_logits=True`,
    a forward does what it did before. With `return_log_probs=True` and `shift_labels` `[B, S]`, it
    computes no loss; the output's `log_probs` `[B, S]` are those of the labels, differentiable, 0
    where a label is not counted. The model's loss function stays in use: its call of
    `torch.nn.functional.cross_entropy` is tiled. Under ZeRO-3, and under FSDP2 where the output
    layer is resharded after its forward, its weight is gathered twice in forward.

    Args:
        model: a transformers model with a linear output layer, or a module that holds one; changed
            in place, reversibly.
        label_smoothing: used where the loss function passes none.
        z_loss: weight of the squared log-sum-exp of each token's logits.
        tile_tokens: tokens of a tile.
        tile_bytes: bytes of a tile's logits where `tile_tokens` is None.
        recompute: whether backward computes the logits again, so that no gradients are held in
            between.
        return_logits: default of a forward's `return_logits`.
        use_liger: whether Liger's fused linear cross-entropy computes the loss.

    Returns:
        The installation; its `close()` restores the model.

    Raises:
        UnsupportedModelError: the model has no plain linear output layer.
        ConfigError: its loss is tiled already, or Liger is requested and not installed.
    """
    causal, head = check_tiled_loss(model, use_liger=use_liger)
    options: dict[str, Any] = {
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "tile_tokens": tile_tokens,
        "tile_bytes": tile_bytes,
        "recompute": recompute,
    }
    installed = TiledLoss(
        causal, head, options, return_logits, _liger_function() if use_liger else None
    )
    installed.install()
    return installed


def check_tiled_loss(model: nn.Module, *, use_liger: bool = False) -> tuple[nn.Module, nn.Linear]:
    """Returns the language model and its output layer, of a model whose loss can be tiled.

    Args:
        model: as for `tile_loss`; nothing of it is changed.
        use_liger: as for `tile_loss`.

    Raises:
        UnsupportedModelError: the model has no plain linear output layer.
        ConfigError: its loss is tiled already, or Liger is requested and not installed.
    """
    causal, head = _model_and_head(model)
    if isinstance(head.__dict__.get("forward"), _HeadForward):
        raise ConfigError(
            f"the loss of {type(causal).__name__} is tiled already. Call close() of the first "
            "installation."
        )
    if use_liger:
        _liger_function()
    return causal, head


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
    """Returns the model that computes the loss and its output layer, by transformers'
    `get_output_embeddings`.
    """
    other = "none"
    for part in model.modules():
        # Of the class: PEFT's models pass every attribute on to the model inside of them.
        get_output_embeddings = getattr(type(part), "get_output_embeddings", None)
        head = None if get_output_embeddings is None else get_output_embeddings(part)
        if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward:
            return part, head
        if head is not None:
            other = f"{type(head).__module__}.{type(head).__name__}"
    raise UnsupportedModelError(
        f"{type(model).__name__} has no plain nn.Linear as its output layer (found: {other}), so "
        "its loss can't be tiled. Use tiled_loss=False for this model."
    )


def _pop_shifted_labels(kwargs: dict[str, Any]) -> Tensor:
    """Removes the labels from a forward's arguments, so that the model computes no loss; returns
    the shifted ones.
    """
    labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    if shifted is None:
        raise BatchError(
            "return_log_probs=True needs shift_labels, each token's next one (labels: "
            f"{_shape(labels)}). A prepared data loader adds them to a batch with labels; "
            "otherwise shift them yourself."
        )
    return shifted  # type: ignore[no-any-return]


def _shape(labels: Any) -> str:
    return f"{list(labels.shape)}" if isinstance(labels, Tensor) else "none"


def _with_log_probs(output: Any, labels: Tensor) -> Any:
    """Returns the output with each label's log-probability instead of lazy logits."""
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


def _fsdp_owner(model: nn.Module | None, head: nn.Module) -> FSDPModule | None:
    """Returns the innermost module that FSDP2 shards and that contains the head, or is the head."""
    owner = None
    for part in model.modules() if model is not None else ():
        if isinstance(part, FSDPModule) and _holds(part, head):
            owner = part
    return owner


def _holds(part: Any, head: nn.Module) -> bool:
    return any(inner is head for inner in part.modules())


def _loss_of(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else getattr(output, "loss", None)


def _without_lazy_logits(output: Any, *, materialize: bool) -> Any:
    """Returns the output with logits instead of lazy logits, or None instead of both."""

    def logits_of(value: Any) -> Any:
        if not isinstance(value, LazyLogits):
            return value
        return value.materialize() if materialize else None

    if isinstance(output, tuple):
        return tuple(logits_of(value) for value in output)
    # A new ModelOutput, whose keys don't include entries that are None from the beginning.
    return type(output)(**{name: logits_of(value) for name, value in output.items()})


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
        # Liger has no factor for logits: scaling hidden states and bias scales the logits.
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
