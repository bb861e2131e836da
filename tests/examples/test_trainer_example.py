"""The Trainer example as a user runs it: two processes that share each row print what one process
prints.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from transformers import ByT5Tokenizer, Trainer  # noqa: F401  imported before the fork, so that ranks start warm

import ulysses_accel.integrations.attach  # noqa: F401
from tests.helpers.ranks import run_ranks

SCRIPT = Path(__file__).parents[2] / "examples" / "trainer" / "train.py"
DOCUMENTS = ["ast", "calendar", "csv", "dis", "enum"]
STEPS, SAVED = 4, 2


def run(*arguments: str) -> None:
    """Runs the script on this rank."""
    spec = importlib.util.spec_from_file_location("trainer_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    sys.argv = [str(SCRIPT), *arguments]
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()


def history(folder: Path, step: int) -> list[dict[str, Any]]:
    """Returns what the Trainer logged up to a checkpoint, without times."""
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [
        {
            name: value
            for name, value in entry.items()
            if "second" not in name and "runtime" not in name
        }
        for entry in state["log_history"]
    ]


def test_two_processes_print_what_one_prints(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name in DOCUMENTS:
        text = Path(sysconfig.get_paths()["stdlib"], f"{name}.py").read_text()[:600]
        (tmp_path / "texts" / f"{name}.txt").write_text(text)
    data = (
        "--data",
        str(tmp_path / "texts"),
        "--sequence-length",
        "64",
        "--save-steps",
        str(SAVED),
    )
    output = {name: tmp_path / name for name in ("alone", "shared", "resumed")}
    whole = ("--steps", str(STEPS), "--output")
    run_ranks(run, 1, *data, *whole, str(output["alone"]), init=False)
    run_ranks(run, 2, *data, *whole, str(output["shared"]), "--sp-size", "2", init=False)
    expected, found = history(output["alone"], STEPS), history(output["shared"], STEPS)
    assert len(expected) == STEPS + 2
    assert [list(entry) for entry in found] == [list(entry) for entry in expected]
    for entry, right in zip(found, expected):
        # float32: the same sums in another order.
        assert entry == pytest.approx(right, rel=1e-4)
    assert expected[-1]["eval_loss"] < expected[0]["eval_loss"]
    assert (output["shared"] / "model.safetensors").is_file()
    checkpoint = output["resumed"] / f"checkpoint-{SAVED}"
    checkpoint.parent.mkdir()
    (output["shared"] / f"checkpoint-{SAVED}").rename(checkpoint)
    run_ranks(
        run, 2, *data, *whole, str(output["resumed"]), "--sp-size", "2", "--resume", init=False
    )
    again = [entry for entry in history(output["resumed"], STEPS) if "loss" in entry]
    assert again == [entry for entry in found if "loss" in entry]
