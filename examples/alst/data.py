"""Long documents for `train.py`: where they come from, and how they become rows of
`sequence_length` tokens.
"""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

Row = dict[str, torch.Tensor]

# Python's standard library is the default corpus: real text, long files, present on every machine.
STDLIB_MIN_BYTES = 16_384
STDLIB_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
STDLIB_SKIPPED_FOLDERS |= {"encodings", "pydoc_data"}  # tables, not text


def load_documents(sources: list[str]) -> list[str]:
    """Returns the distinct documents of all sources, in a fixed order.

    Args:
        sources: `stdlib`, text files, JSONL files with a `text` field, folders of such files, or
            names of data sets that the `datasets` package loads (their `train` split, column
            `text`).
    """
    documents = dict.fromkeys(text for source in sources for text in _read_source(source))
    return [text for text in documents if text.strip()]


def split_documents(
    documents: list[str], num_held_out: int, seed: int
) -> tuple[list[str], list[str]]:
    """Returns (training documents, held-out documents); no document is in both."""
    if not 0 < num_held_out < len(documents):
        raise SystemExit(
            f"--eval-documents {num_held_out} of {len(documents)} documents (from --data) leaves "
            "nothing to train on "
            f"or to evaluate. Use 1 to {len(documents) - 1}, or give more documents."
        )
    shuffled = random.Random(seed).sample(documents, len(documents))
    return shuffled[num_held_out:], shuffled[:num_held_out]


def make_rows(
    documents: list[str], tokenizer: Any, sequence_length: int, packed: bool, whole: bool = True
) -> list[Row]:
    """Tokenizes documents into rows.

    Args:
        documents: the texts.
        tokenizer: a transformers tokenizer.
        sequence_length: tokens of a row.
        packed: whether documents share rows; each then starts at position 0 and no label crosses
            from one to the next. Otherwise a row is the beginning of one document.
        whole: whether packing uses all of a document, or only as much of it as fits one row.
    """
    tokens = (tokenizer(text, verbose=False)["input_ids"] for text in documents)
    if not packed:
        return [_row([ids[:sequence_length]]) for ids in tokens]
    pieces = tokens if whole else (ids[:sequence_length] for ids in tokens)
    rows = [_row(row, with_positions=True) for row in _pack(pieces, sequence_length)]
    if not rows:
        raise SystemExit(
            f"the documents are shorter than one row of --sequence-length {sequence_length} tokens "
            "in all"
        )
    return rows


def collate(rows: list[Row], pad_token_id: int) -> Row:
    """Stacks rows of different lengths; padding is on the right and has no label."""
    fill = {"input_ids": pad_token_id, "labels": -100, "position_ids": 0}
    return {
        key: torch.nn.utils.rnn.pad_sequence(
            [row[key] for row in rows], batch_first=True, padding_value=fill[key]
        )
        for key in rows[0]
    }


def _read_source(source: str) -> Iterator[str]:
    path = Path(source)
    if source == "stdlib":
        yield from map(_read_text, _stdlib_files())
    elif path.is_dir():
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            yield from _read_file(file)
    elif path.is_file():
        yield from _read_file(path)
    else:
        yield from _read_hub_data(source)


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return [
        file
        for file in sorted(root.rglob("*.py"))
        if not STDLIB_SKIPPED_FOLDERS.intersection(file.relative_to(root).parts)
        and file.stat().st_size >= STDLIB_MIN_BYTES
    ]


def _read_file(file: Path) -> Iterator[str]:
    if file.suffix != ".jsonl":
        yield _read_text(file)
        return
    for number, line in enumerate(_read_text(file).splitlines(), start=1):
        record = json.loads(line) if line.strip() else {"text": ""}
        if not isinstance(record, dict) or "text" not in record:
            raise SystemExit(f"{file}, line {number}: expected a JSON object with a `text` field")
        yield record["text"]


def _read_text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _read_hub_data(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise SystemExit(
            f"--data {name} is neither `stdlib` nor an existing file or folder. "
            "Check the path, or `pip install datasets` to load it as a data set by name."
        ) from None
    yield from load_dataset(name, split="train")["text"]


def _pack(pieces: Iterator[list[int]], sequence_length: int) -> Iterator[list[list[int]]]:
    """Cuts documents into full rows, each a list of pieces; a document goes on in the next row as a
    new piece.
    """
    row: list[list[int]] = []
    room = sequence_length
    for ids in pieces:
        while ids:
            row.append(ids[:room])
            ids = ids[len(row[-1]) :]
            room -= len(row[-1])
            if room == 0:
                yield row
                row, room = [], sequence_length


def _row(pieces: list[list[int]], with_positions: bool = False) -> Row:
    input_ids = torch.tensor([token for piece in pieces for token in piece])
    labels = input_ids.clone()
    starts = torch.tensor([0, *(len(piece) for piece in pieces[:-1])]).cumsum(0)
    # The label at a document's first token would be predicted from the document before it.
    labels[starts] = -100
    row = {"input_ids": input_ids, "labels": labels}
    if with_positions:
        row["position_ids"] = torch.cat([torch.arange(len(piece)) for piece in pieces])
    return row
