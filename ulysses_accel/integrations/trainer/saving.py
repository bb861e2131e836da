"""A Trainer's checkpoints of models whose weights are sharded over ranks without an engine that
would gather them.

transformers 5.23 has the main process alone ask for states. Here every rank does, and the main
process writes what it gets.
"""

from __future__ import annotations

import weakref
from typing import Any

from ulysses_accel import _private_api
from ulysses_accel.config.parallelism import ParallelismConfig
from ulysses_accel.errors import ConfigError
from ulysses_accel.installation import Installation, replaced, stock_method
from ulysses_accel.integrations.accelerate.session import Session


def save_full_states(trainer: Any, session: Session, changes: Installation) -> None:
    """Makes a Trainer's checkpoints complete, where its own code would write one rank's part.

    Args:
        trainer: whose methods are overridden.
        session: of its accelerator, whose features gather states.
        changes: of the Trainer.
    """
    saves = _FullSaves(trainer, session)
    methods = {
        _private_api.TRAINER_SAVE: saves.save,
        _private_api.TRAINER_SAVE_OPTIMIZER: saves.save_optimizer_and_scheduler,
    }
    changes.override(trainer, methods)


def refuse_partial_optimizer(args: Any, config: ParallelismConfig) -> None:
    """Refuses checkpoints of an optimizer that can't be gathered.

    Args:
        args: the Trainer's.
        config: of its accelerator, which has no engine.
    """
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if config.tp_size > 1 and not args.save_only_model and strategy != "no":
        raise ConfigError(
            f"save_strategy={strategy!r} with tp_size={config.tp_size} (from "
            f"{config.source_of('tp_size')}) and no engine: checkpoints would hold one rank's part "
            "of the optimizer. Use FSDP2, save_only_model=True or save_strategy='no'."
        )


class _FullSaves:
    """Overrides of a Trainer's methods that save.

    Args:
        trainer: which owns this, and so is held weakly.
        session: of its accelerator.
    """

    def __init__(self, trainer: Any, session: Session) -> None:
        self._trainer, self._session = weakref.ref(trainer), weakref.ref(session)
        self._stock_save = stock_method(trainer, _private_api.TRAINER_SAVE)
        self._stock_save_optimizer = stock_method(trainer, _private_api.TRAINER_SAVE_OPTIMIZER)

    def save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Overrides `Trainer._save`, which every rank calls."""
        trainer: Any = self._trainer()
        if state_dict is None:
            state_dict = trainer.accelerator.get_state_dict(trainer.model)
        self._stock_save(output_dir, state_dict=state_dict)

    def save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Overrides `Trainer._save_optimizer_and_scheduler`, which every rank calls."""
        trainer, session = self._trainer(), self._session()
        assert trainer is not None, "only its own methods lead here"
        assert session is not None, "the Trainer's accelerator owns it"
        if trainer.optimizer is None:
            self._stock_save_optimizer(output_dir)
            return
        with session.gathering():
            state = trainer.optimizer.state_dict()
        with replaced(trainer.optimizer, state_dict=lambda: state):
            self._stock_save_optimizer(output_dir)
