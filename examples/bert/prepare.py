"""Prepares real text for `train.py`: sentences, a WordPiece vocabulary trained on them, and pairs
of segments on disk.

    python prepare.py --output data     # the documentation in Python's standard library
    python prepare.py --output data --text books/ --sequence-length 4096 --vocab-size 30000

Writes `OUTPUT/dataset`, which the `datasets` package loads, and `OUTPUT/vocab`, a tokenizer of
transformers.
"""

from __future__ import annotations

import argparse
import ast
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from tokenizers import BertWordPieceTokenizer
from transformers import BertTokenizer

# The other example finds and reads texts already.
sys.path.append(str(Path(__file__).parents[1] / "alst"))
from data import load_documents, split_documents

MIN_WORDS = 5
NUM_SPECIAL_TOKENS = 3  # [CLS] A [SEP] B [SEP]
Pair = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    training, held_out = read_documents(args)
    tokenizer = train_tokenizer(
        [sentence for document in training for sentence in document], args.vocab_size
    )
    splits = {"train": training, "held_out": held_out}
    dataset = DatasetDict(
        {
            split: Dataset.from_list(
                [
                    pair
                    for number, document in enumerate(documents)
                    for pair in make_pairs(
                        tokenize(document, tokenizer), args.sequence_length, tokenizer, number
                    )
                ]
            )
            for split, documents in splits.items()
        }
    )
    output = Path(args.output)
    tokenizer.save_pretrained(output / "vocab")
    dataset.save_to_disk(output / "dataset")
    lengths = [len(ids) for ids in dataset["train"]["input_ids"]]
    print(
        f"{sum(map(len, training))} sentences of {len(training)} documents, {len(tokenizer)} word "
        "pieces: "
        f"{len(lengths)} pairs of segments, {sum(lengths)} tokens, the longest {max(lengths)}; "
        f"{len(dataset['held_out'])} pairs held out. Written to {output}"
    )


def read_documents(args: argparse.Namespace) -> tuple[list[list[str]], list[list[str]]]:
    """Returns the sentences of the training documents, and those of the held-out ones."""
    documents = [split_sentences(prose(text)) for text in load_documents(args.text)]
    documents = [document for document in documents if len(document) > 1]
    return split_documents(documents, args.held_out_documents, args.seed)


def prose(text: str) -> str:
    """Returns what people are to read in a text: the docstrings of Python source, all of anything
    else.
    """
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError):
        return text
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return "\n\n".join(
        ast.get_docstring(node) or "" for node in nodes if isinstance(node, documented)
    )


def split_sentences(text: str) -> list[str]:
    """Returns the whole sentences of a text, in order; code, tables and headings are left out."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    sentences = (
        sentence
        for paragraph in paragraphs
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph)
    )
    return [
        sentence
        for sentence in sentences
        if re.fullmatch(r"[A-Z].*[.!?:]", sentence)
        and ">>>" not in sentence
        and len(sentence.split()) >= MIN_WORDS
    ]


def train_tokenizer(sentences: Iterable[str], vocab_size: int) -> BertTokenizer:
    """Returns a lower-casing WordPiece tokenizer whose vocabulary is learnt from the sentences."""
    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator(
        sentences, vocab_size=vocab_size, min_frequency=2, show_progress=False
    )
    return BertTokenizer(vocab=trained.get_vocab())


def tokenize(document: list[str], tokenizer: Any) -> list[list[int]]:
    return tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[no-any-return]


def make_pairs(
    sentences: list[list[int]], length: int, tokenizer: Any, number: int
) -> Iterator[Pair]:
    """Yields a document's pairs of consecutive segments, half of them in the wrong order.

    Args:
        sentences: the token ids of each sentence.
        length: of a pair in tokens at most, its special tokens included.
        tokenizer: knows the special tokens.
        number: of the document; decides where its pairs are split and which are swapped.

    Yields:
        `input_ids`, `token_type_ids` (0 up to the first separator), and `next_sentence_label`: 1
        where B came before A.
    """
    draw = random.Random(number)
    for chunk in _chunks(sentences, length - NUM_SPECIAL_TOKENS):
        middle = draw.randrange(1, len(chunk))
        segments = [
            [token for sentence in part for token in sentence]
            for part in (chunk[:middle], chunk[middle:])
        ]
        is_swapped = draw.random() < 0.5
        first, second = reversed(segments) if is_swapped else segments
        separator = [tokenizer.sep_token_id]
        yield {
            "input_ids": [tokenizer.cls_token_id, *first, *separator, *second, *separator],
            "token_type_ids": [0] * (len(first) + 2) + [1] * (len(second) + 1),
            "next_sentence_label": int(is_swapped),
        }


def _chunks(sentences: list[list[int]], room: int) -> Iterator[list[list[int]]]:
    """Yields runs of at least two sentences that fit; a sentence that is longer than half of the
    room is truncated.
    """
    chunk: list[list[int]] = []
    for sentence in (sentence[: room // 2] for sentence in sentences):
        if sum(map(len, chunk)) + len(sentence) > room:
            yield chunk
            chunk = []
        chunk.append(sentence)
    if len(chunk) > 1:
        yield chunk


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--text",
        nargs="+",
        default=["stdlib"],
        help="text, JSONL or Python files, folders of them, or `stdlib`",
    )
    add("--output", default="data", help="folder for the data set and the vocabulary")
    add("--sequence-length", type=int, default=512, help="tokens of a pair of segments at most")
    add("--vocab-size", type=int, default=4000, help="word pieces of the vocabulary at most")
    add("--held-out-documents", type=int, default=8, help="documents that are only evaluated")
    add("--seed", type=int, default=42, help="decides which documents are held out")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
