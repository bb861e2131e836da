"""One accelerator's session: overrides its methods once, and runs the features that its config
requests.

`integrations.attach` shows the features and their order. No class and no module is patched; `close`
restores the accelerator, its models and its Trainer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ulysses_accel import _private_api
from ulysses_accel.installation import AcceleratorFeature, Installation, stock_method


class Session:
    """Runs the features of one accelerator, which owns it.

    The accelerator and everything that it prepares are referred to weakly: they are freed when the
    user deletes them, as without this package.

    Args:
        config: the accelerator's `ParallelismConfig`.
        accelerator: whose methods are overridden.
        features: classes of the features, in the order in which models pass through them.

    Raises:
        ConfigError: a feature does not go with the accelerator's engine or settings.
    """

    def __init__(
        self, config: Any, accelerator: Any, features: Sequence[type[AcceleratorFeature]]
    ) -> None:
        self._accelerator = weakref.ref(accelerator)
        self._installation = Installation()
        self._trainers: WeakKeyDictionary[Any, Installation] = WeakKeyDictionary()
        self._stock: dict[str, Callable[..., Any]] = {}
        self._is_in_engine = False
        self.features = [feature(config, accelerator, self) for feature in features]
        self._override_methods(accelerator)

    def _override_methods(self, accelerator: Any) -> None:
        methods: dict[str, Callable[..., Any]] = {
            "prepare": self.prepare,
            "prepare_model": self.prepare_model,
            "prepare_optimizer": partial(self.prepare_one, "prepare_optimizer"),
            "prepare_scheduler": partial(self.prepare_one, "prepare_scheduler"),
        }
        for feature in self.features:
            for name in feature.overrides():
                methods.setdefault(name, partial(self.call, name))
        for name in methods:
            self._stock[name] = stock_method(accelerator, name)
        self._installation.override(accelerator, methods)
        self._installation.set(accelerator, "ulysses_accel", self)
        for feature in self.features:
            self._installation.set(accelerator, feature.name, feature)

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """Overrides `Accelerator.prepare`: models, optimizers, loaders and schedulers, in any order
        and any number of calls.
        """
        for model in args:
            if isinstance(model, nn.Module):
                self.apply_features(model)
        for feature in self.features:
            feature.before_engine(args)
        with self._around_engine(args):
            result = self.call("prepare", *args, device_placement=device_placement)
        prepared = self._after_prepare(tuple(result) if len(args) > 1 else (result,))
        return prepared if len(args) > 1 else prepared[0]

    def prepare_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Overrides `Accelerator.prepare_model`, which `prepare` calls too, for DDP."""
        self.apply_features(model)
        with self._around_engine((model,)):
            prepared = self.call("prepare_model", model, *args, **kwargs)
        return self._after_prepare((prepared,))[0]

    def prepare_one(self, method: str, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Overrides `Accelerator.prepare_optimizer` and `Accelerator.prepare_scheduler`."""
        return self._after_prepare((self.call(method, obj, *args, **kwargs),))[0]

    def apply_features(self, model: nn.Module, first: AcceleratorFeature | None = None) -> None:
        """Has each feature check and change a model that it does not know yet.

        Args:
            model: that no engine has yet; one that was prepared stays as it is.
            first: the feature to begin with; all where None.

        Raises:
            UnsupportedModelError: a feature is not exact for the model, which is left as it is.
        """
        if _private_api.is_prepared(model):
            return
        features = self.features[0 if first is None else self.features.index(first) :]
        new = [feature for feature in features if feature.is_new(model)]
        checked = [feature.check_model(model) for feature in new]
        for feature, result in zip(new, checked, strict=True):
            feature.prepare_model(model, result)
            feature.models.add(model)

    @contextmanager
    def _around_engine(self, objects: tuple[Any, ...]) -> Iterator[None]:
        # Stock `prepare` calls `prepare_model` again.
        if self._is_in_engine:
            yield
            return
        self._is_in_engine = True
        try:
            with ExitStack() as stack:
                for feature in self.features:
                    stack.enter_context(feature.around_engine(objects))
                yield
        finally:
            self._is_in_engine = False

    def _after_prepare(self, prepared: tuple[Any, ...]) -> tuple[Any, ...]:
        for feature in reversed(self.features):
            prepared = feature.after_prepare(prepared)
        return prepared

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a method of the accelerator: the features' overrides, and in the end its own."""
        function = self._stock[method]
        for feature in reversed(self.features):
            override = feature.overrides().get(method)
            if override is not None:
                function = partial(override, function)
        return function(*args, **kwargs)

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """While open, on every rank, states of models and optimizers come with full tensors."""
        with ExitStack() as stack:
            for feature in self.features:
                stack.enter_context(feature.gathering())
            yield

    def insert(self, feature: AcceleratorFeature, before: Sequence[str]) -> None:
        """Adds a feature that only a Trainer brings along.

        Args:
            feature: the new one.
            before: names of the features that models pass through after it.
        """
        is_later = [known.name in before for known in self.features]
        self.features.insert(is_later.index(True), feature)

    def remove(self, feature: AcceleratorFeature) -> None:
        """Restores what a feature of `insert` changed, and forgets it."""
        if feature in self.features:
            self.features.remove(feature)
        feature.installation.close()

    def open_trainer(self, trainer: Any) -> Installation:
        """Returns the changes of a Trainer, which are still to be made."""
        return self._trainers.setdefault(trainer, Installation())

    def close_trainer(self, trainer: Any) -> None:
        """Restores a Trainer."""
        changes = self._trainers.pop(trainer, None)
        if changes is not None:
            changes.close()

    def close(self) -> None:
        """Restores the Trainers, every prepared model, and the accelerator; calling it again does
        nothing.

        Experts that are distributed over ranks are gathered, so every rank must call it. What
        `prepare` returned stays prepared: a loader goes on yielding shards.
        """
        for trainer in list(self._trainers):
            self.close_trainer(trainer)
        for feature in reversed(self.features):
            feature.installation.close()
        self._installation.close()
