"""Rows of the example: every label is predicted from its own document, and held-out documents are
never trained on.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

SOURCE = Path(__file__).parents[2] / "examples" / "alst" / "data.py"


class Bytes:
    """A tokenizer of one token for each character."""

    def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


@pytest.fixture(scope="module")
def data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("alst_data", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_packing_keeps_every_token_and_restarts_positions(data: ModuleType) -> None:
    rows = data.make_rows(["aaaaa", "bb", "c"], Bytes(), sequence_length=4, packed=True)
    assert [bytes(row["input_ids"].tolist()) for row in rows] == [b"aaaa", b"abbc"]
    assert [row["position_ids"].tolist() for row in rows] == [[0, 1, 2, 3], [0, 0, 1, 0]]


def test_no_label_crosses_a_document(data: ModuleType) -> None:
    rows = data.make_rows(["aaaaa", "bb", "c"], Bytes(), sequence_length=4, packed=True)
    assert [row["labels"].tolist() for row in rows] == [[-100, 97, 97, 97], [-100, -100, 98, -100]]


def test_unpacked_rows_are_padded_without_labels(data: ModuleType) -> None:
    rows = data.make_rows(["aaaaa", "bb"], Bytes(), sequence_length=4, packed=False)
    batch = data.collate(rows, pad_token_id=0)
    assert batch["input_ids"].tolist() == [[97, 97, 97, 97], [98, 98, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 97, 97, 97], [-100, 98, -100, -100]]


def test_held_out_documents_are_not_trained_on(data: ModuleType) -> None:
    documents = data.load_documents(["stdlib"])
    training, held_out = data.split_documents(documents, 8, seed=0)
    assert len(held_out) == 8
    assert not set(training) & set(held_out)
    assert sorted(training + held_out) == sorted(documents)


def test_folders_hold_text_and_jsonl(data: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in ("two", "one", "three"))
    )
    assert data.load_documents([str(tmp_path)]) == ["one", "two", "three"]


@pytest.mark.parametrize("line", ['"text"', '{"body": "x"}'])
def test_a_jsonl_line_without_text_is_named(data: ModuleType, tmp_path: Path, line: str) -> None:
    (tmp_path / "b.jsonl").write_text(f'{{"text": "fine"}}\n{line}')
    with pytest.raises(SystemExit, match=r"b\.jsonl, line 2"):
        data.load_documents([str(tmp_path)])


def test_too_few_documents_are_refused(data: ModuleType) -> None:
    with pytest.raises(SystemExit, match="Use 1 to 1, or give more documents"):
        data.split_documents(["a", "b"], 2, seed=0)
