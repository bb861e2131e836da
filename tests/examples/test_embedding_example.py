"""The example of embeddings as a user runs it, on two processes that share each text."""

from __future__ import annotations

import re
from pathlib import Path

from tests.helpers.example_runs import run_example, write_documents


def test_pooled_vectors_learn_which_texts_belong_together(tmp_path: Path) -> None:
    write_documents(tmp_path)
    sizes = (
        "--sequence-length",
        "64",
        "--batch-size",
        "8",
        "--eval-documents",
        "4",
        "--steps",
        "30",
    )
    printed = run_example("embedding/train.py", "--sp-size", "2", "--data", str(tmp_path), *sizes)
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", printed)]
    assert len(losses) == 3
    # By chance: the logarithm of 8 texts.
    assert losses[-1] < 0.8 * 2.08
    found = re.search(r"found of 4 held-out texts: (\d+)% before, (\d+)% after", printed)
    assert found is not None
    assert int(found[2]) > 25
