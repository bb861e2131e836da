"""The example of distillation as a user runs it, on two processes in a ring."""

from __future__ import annotations

import re
from pathlib import Path

from tests.helpers.example_runs import run_example, write_documents


def test_the_student_comes_near_the_sharded_teacher(tmp_path: Path) -> None:
    write_documents(tmp_path)
    sizes = (
        "--sequence-length",
        "128",
        "--teacher-steps",
        "10",
        "--steps",
        "20",
        "--eval-documents",
        "2",
    )
    printed = run_example(
        "distillation/train.py", "--sp-size", "1", "--cp-size", "2", "--data", str(tmp_path), *sizes
    )
    assert "teacher, step 10: loss" in printed
    found = re.search(r"divergence from the teacher: ([\d.]+) before, ([\d.]+) after", printed)
    assert found is not None
    assert float(found[2]) < 0.2 * float(found[1])
