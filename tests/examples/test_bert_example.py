"""BERT as a user pre-trains it: text is prepared, and the curve of the loss does not depend on the
number of ranks.

Tolerance of a curve in float64: 1e-10 after five AdamW steps. A step's sums in another order cost
some 1e-15, and AdamW divides by the gradient's own size, so that tiny elements, which are mostly
rounding, move as far as large ones.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import load_from_disk

import ulysses_accel.integrations.attach  # noqa: F401  imported before the fork, so that ranks start warm
from tests.helpers.ranks import run_ranks

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "bert"
CURVE_EXACT = 1e-10
DOCUMENTS = [
    "ast",
    "argparse",
    "calendar",
    "configparser",
    "csv",
    "dataclasses",
    "difflib",
    "dis",
    "doctest",
    "enum",
]
LENGTH = 64
STEPS = 5
SETTINGS = [
    *("--steps", str(STEPS), "--print-every", "1", "--batch-size", "6", "--hidden-size", "32"),
    *(
        "--max-positions",
        str(LENGTH),
        "--dtype",
        "float64",
        "--dropout",
        "0",
        "--learning-rate",
        "3e-3",
    ),
]
HELD_OUT = ("--held-out-documents", "2")
LAYOUTS = {"cp": (1, 2), "cp × sp": (2, 2)}
CODE = "loss = BertForPreTraining(config)(**batch).loss"
MEASURES = ("loss", "mlm_loss", "sop_loss", "mlm_accuracy", "sop_accuracy", "masked_words")


@pytest.fixture(scope="module")
def example() -> SimpleNamespace:
    """The example's modules, which find each other by short names that are nobody else's
    business.
    """
    names = ("data", "prepare", "pairs", "positions", "train", "embed")
    path, known = (
        list(sys.path),
        {name: sys.modules.pop(name) for name in names if name in sys.modules},
    )
    sys.path.insert(0, str(FOLDER))
    modules: dict[str, ModuleType] = {
        name: importlib.import_module(name) for name in ("prepare", *names[2:])
    }
    sys.path[:] = path
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(known)
    return SimpleNamespace(**modules)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, example: Any) -> Path:
    """A folder with documents, and what prepare.py made of them."""
    root = tmp_path_factory.mktemp("bert")
    (root / "text").mkdir()
    for name in DOCUMENTS:
        source = Path(sysconfig.get_paths()["stdlib"], f"{name}.py")
        (root / "text" / source.name).write_text(source.read_text())
    flags = [
        "--text",
        str(root / "text"),
        "--output",
        str(root),
        "--sequence-length",
        str(LENGTH),
        *HELD_OUT,
    ]
    # In a process of its own, because of the threads that it starts.
    (told,) = run_ranks(told_by, 1, example.prepare.main, flags, init=False)
    assert "pairs of segments" in told
    return root


def told_by(main: Callable[[list[str]], None], flags: list[str]) -> str:
    """Returns what a script prints."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with contextlib.redirect_stdout(io.StringIO()) as told:
        main(flags)
    return told.getvalue()


def launch(root: Path, script: str, *flags: str) -> str:
    """Runs a script on two processes as a user does; returns what it printed."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *launcher, str(FOLDER / script), *flags],
        cwd=root,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{script} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def train(example: Any, folder: Path, sp_size: int, cp_size: int, *flags: str) -> Path:
    """Trains on as many forked ranks; returns the output's folder."""
    output = folder / f"sp{sp_size}-cp{cp_size}"
    paths = [
        "--data-path",
        str(folder / "dataset"),
        "--vocab-path",
        str(folder / "vocab"),
        "--output",
        str(output),
    ]
    sizes = ["--sp-size", str(sp_size), "--cp-size", str(cp_size)]
    run_ranks(
        told_by,
        sp_size * cp_size,
        example.train.main,
        [*SETTINGS, *paths, *sizes, *flags],
        init=False,
    )
    return output


def records(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def measures(output: Path) -> list[list[float]]:
    """Returns all measures of each step, and the held-out ones before and after."""
    summary = json.loads((output / "summary.json").read_text())
    return [[record[name] for name in MEASURES] for record in (*records(output), *summary.values())]


@pytest.fixture(scope="module")
def alone(example: Any, folder: Path) -> Path:
    """The job on one process."""
    return train(example, folder, 1, 1)


def test_pairs_are_of_real_sentences(folder: Path, example: Any) -> None:
    dataset, tokenizer = load_from_disk(str(folder / "dataset")), load_tokenizer(folder)
    text = " ".join(
        example.prepare.prose((folder / "text" / f"{name}.py").read_text()) for name in DOCUMENTS
    )
    known = tokenizer.decode(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    for pair in [*dataset["train"].select(range(20)), *dataset["held_out"].select(range(5))]:
        decoded = tokenizer.decode(pair["input_ids"])
        first, second, rest = decoded.removeprefix("[CLS] ").split(" [SEP]")
        assert rest == ""
        assert len(pair["input_ids"]) <= LENGTH
        assert pair["token_type_ids"] == [0] * (
            pair["input_ids"].index(tokenizer.sep_token_id) + 1
        ) + [1] * (len(pair["input_ids"]) - pair["input_ids"].index(tokenizer.sep_token_id) - 1)
        words = (second if pair["next_sentence_label"] else first).strip().split()[:4]
        assert " ".join(words) in known
    assert set(dataset["train"]["next_sentence_label"]) == {0, 1}


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "vocab")


def test_masks_follow_from_the_number_of_the_pair(folder: Path, example: Any) -> None:
    pairs, tokenizer = load_from_disk(str(folder / "dataset"))["train"], load_tokenizer(folder)
    here, elsewhere = (example.pairs.MaskedPairs(pairs, tokenizer, seed=1) for _ in range(2))
    other = example.pairs.MaskedPairs(pairs, tokenizer, seed=1)
    other.set_epoch(1)
    share = []
    for index in range(30):
        row = here[index]
        assert all(torch.equal(row[name], elsewhere[index][name]) for name in row)
        assert not torch.equal(row["labels"], other[index]["labels"])
        chosen = row["labels"] != example.pairs.IGNORED
        original = torch.tensor(pairs[index]["input_ids"])
        assert torch.equal(row["labels"][chosen], original[chosen])
        assert torch.equal(row["input_ids"][~chosen], original[~chosen])
        assert not torch.isin(original[chosen], torch.tensor(tokenizer.all_special_ids)).any()
        share.append((row["input_ids"][chosen] == tokenizer.mask_token_id).double().mean())
        assert int(chosen.sum()) == max(1, round(0.15 * (len(original) - 3)))
    assert 0.7 < float(torch.stack(share).mean()) < 0.9


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_curve_does_not_depend_on_the_ranks(
    layout: str, example: Any, folder: Path, alone: Path, support: Any
) -> None:
    output = train(example, folder, *LAYOUTS[layout])
    for found, expected in zip(measures(output), measures(alone), strict=True):
        assert found == pytest.approx(expected, rel=CURVE_EXACT)
    support("model", "BERT, masked words and sentence order", layout, code=CODE)


def test_nor_does_it_as_a_user_runs_it(folder: Path, alone: Path, support: Any) -> None:
    paths = ["--data-path", "dataset", "--vocab-path", "vocab", "--output", "launched"]
    told = launch(folder, "train.py", *SETTINGS, *paths, "--sp-size", "2")
    assert f"step {STEPS}: loss" in told
    for found, expected in zip(measures(folder / "launched"), measures(alone), strict=True):
        assert found == pytest.approx(expected, rel=CURVE_EXACT)
    support("model", "BERT, masked words and sentence order", "sp", code=CODE)


def test_the_loss_falls(alone: Path) -> None:
    *steps, before, after = measures(alone)
    assert len(steps) == STEPS
    assert all(math.isfinite(value) for step in steps for value in step)
    assert after[1] < before[1] - 0.1


def test_a_saved_model_is_gone_on_from_with_more_positions(
    example: Any, folder: Path, alone: Path
) -> None:
    flags = ["--model", str(alone / "model"), "--max-positions", str(2 * LENGTH), "--steps", "1"]
    output = train(example, folder, 2, 1, *flags)
    # The same pairs, masked alike, and none of the new positions in use.
    assert measures(output)[-2] == pytest.approx(measures(alone)[-1], rel=CURVE_EXACT)
    config = json.loads((output / "model" / "config.json").read_text())
    assert config["max_position_embeddings"] == 2 * LENGTH


def test_embeddings_of_texts_longer_than_the_position_table(example: Any, folder: Path) -> None:
    flags = ["--text", str(folder / "text"), "--texts", "3", "--max-length", "640"]
    (alone,) = run_ranks(told_by, 1, example.embed.main, flags, init=False)
    shared, silent = run_ranks(
        told_by, 2, example.embed.main, [*flags, "--sp-size", "2"], init=False
    )
    assert silent == ""
    assert len(alone.splitlines()) == 3
    for line, expected in zip(shared.splitlines(), alone.splitlines(), strict=True):
        # Printed with three places.
        assert float(line.split()[0]) == pytest.approx(float(expected.split()[0]), abs=1.1e-3)
        assert line.split("  ")[1:] == expected.split("  ")[1:]
