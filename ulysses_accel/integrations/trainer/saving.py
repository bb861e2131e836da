"""A Trainer's checkpoints of models whose parts lie on several ranks, without an engine that would
gather them.

Stock code has the main process alone ask for states. Here every rank does, and the main process
writes what it gets.
"""

from __future__ import annotations

from typing import Any

from ulysses_accel import _private_api
from ulysses_accel.config.parallelism import ParallelismConfig
from ulysses_accel.errors import ConfigError
from ulysses_accel.installation import replaced

_WRAPPED = (_private_api.TRAINER_SAVE, _private_api.TRAINER_SAVE_OPTIMIZER)


def whole_saves(trainer: Any, accelerator: Any, config: ParallelismConfig) -> WholeSaves | None:
    """Makes a Trainer's checkpoints whole ones, where dealt experts or cut weights make its own
    code write parts.

    Args:
        trainer: that constructs the accelerator; None where no Trainer does.
        accelerator: that knows how its models' states are gathered.
        config: of the accelerator.

    Returns:
        What `uninstall()` restores the Trainer with; None where its own code is right.

    Raises:
        ConfigError: the Trainer would save an optimizer that can't be gathered.
    """
    if trainer is None or accelerator.is_fsdp2:
        return None
    args = trainer.args
    has_optimizer = config.tp_size > 1 and not args.save_only_model
    if has_optimizer and str(getattr(args.save_strategy, "value", args.save_strategy)) != "no":
        raise ConfigError(
            f"save_strategy={str(getattr(args.save_strategy, 'value', args.save_strategy))!r} with "
            "tp_size="
            f"{config.tp_size} (from {config.source_of('tp_size')}) and no engine: checkpoints "
            "would hold one rank's "
            f"part of the optimizer. Use FSDP2, save_only_model=True or save_strategy='no'."
        )
    return WholeSaves(trainer, accelerator)


class WholeSaves:
    """The methods that stand before a Trainer's own, and the way to take them off.

    Args:
        trainer: whose methods are wrapped.
        accelerator: its accelerator.
    """

    def __init__(self, trainer: Any, accelerator: Any) -> None:
        self.trainer, self.accelerator = trainer, accelerator
        self._stock = {name: getattr(trainer, name) for name in _WRAPPED}
        for name in _WRAPPED:
            setattr(trainer, name, getattr(self, name))

    def uninstall(self) -> None:
        """Restores the Trainer's own methods."""
        for name in _WRAPPED:
            delattr(self.trainer, name)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Stands in for `Trainer._save`, which every rank calls."""
        if state_dict is None:
            state_dict = self.accelerator.get_state_dict(self.trainer.model)
        self._stock[_private_api.TRAINER_SAVE](output_dir, state_dict=state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Stands in for `Trainer._save_optimizer_and_scheduler`, which every rank calls."""
        experts, optimizer = (
            getattr(self.accelerator, "expert_parallel", None),
            self.trainer.optimizer,
        )
        if experts is None or optimizer is None:
            self._stock[_private_api.TRAINER_SAVE_OPTIMIZER](output_dir)
            return
        state = experts.whole_state(optimizer)
        with replaced(optimizer, state_dict=lambda: state):
            self._stock[_private_api.TRAINER_SAVE_OPTIMIZER](output_dir)
