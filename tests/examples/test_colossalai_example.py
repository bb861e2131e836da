"""The benchmark in ColossalAI's three modes: the same losses, from a fourth of the tokens on each
process.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from accelerate.state import AcceleratorState

import tests.helpers.tensor_parallel_jobs  # noqa: F401  what ranks need is imported before the fork
from tests.helpers.ranks import run_ranks
from tests.helpers.support import Support

FILE = Path(__file__).parents[2] / "examples" / "colossalai" / "benchmark.py"
SHORT = ["--max_length", "32", "--num_steps", "3"]
# The degrees of the document, and the query heads (of 8) behind the projection.
MODES = {"split_gather": (4, 1, 2), "all_to_all": (2, 2, 4), "ring_attn": (2, 2, 4)}


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("colossalai_benchmark", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(script: ModuleType, mode: str) -> dict[str, Any]:
    AcceleratorState._reset_state(True)
    tp_size, sp_size, _ = MODES[mode]
    found: dict[str, Any] = script.main(
        [*SHORT, "--tp", str(tp_size), "--sp", str(sp_size), "--mode", mode]
    )
    return found


def test_the_three_modes_give_one_process_s_losses(support: Support) -> None:
    script = _script()
    alone = script.main(SHORT)
    assert (alone["tokens"], alone["heads"]) == (32, 8)
    assert len(alone["losses"]) == 3
    for mode, (_, _, heads) in MODES.items():
        for found in run_ranks(_run, 4, script, mode, init=False):
            # float32, as the script trains.
            assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5), mode
            assert (found["tokens"], found["heads"]) == (32 // 4, heads), mode
    code = "ParallelismConfig(tp_size={}, sp_size={}, sequence_parallelism_mode={!r})"
    for mode, (tp_size, sp_size, _) in MODES.items():
        axes = {"split_gather": "tp", "all_to_all": "tp × sp", "ring_attn": "tp × cp"}[mode]
        support("system", "ColossalAI", axes, code=code.format(tp_size, sp_size, mode))


def test_the_readme_shows_the_script_s_words() -> None:
    text = (FILE.parent / "README.md").read_text()
    for mode, (tp_size, sp_size, _) in MODES.items():
        degrees = f"--tp {tp_size}" + (f" --sp {sp_size}" if sp_size > 1 else "")
        assert f"examples/colossalai/benchmark.py {degrees} --mode {mode}" in text
