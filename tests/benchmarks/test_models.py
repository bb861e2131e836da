"""The walk over all architectures: what it takes, what it finds out about them, and how its
verdicts are counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # Its first import sets an environment variable, which no test may.

from benchmarks.models.__main__ import merge, prepare_case, run_chunk
from benchmarks.models.batches import DOCUMENTS, IGNORED, documents_alone, make_batch, num_counted
from benchmarks.models.heads import HEADS, architectures, choose
from benchmarks.models.reference import Reference, State, compare, share_of_work
from benchmarks.models.report import (
    NOT_RUN,
    counts_of,
    document,
    is_eligible,
    lines_of,
    overall,
    verdict_of,
)
from benchmarks.models.structure import structure_of
from benchmarks.models.zoo import build, tiny_config


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """The walk builds its models in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tiny(name: str) -> Any:
    """The tiny model of a row."""
    one = choose([name], None)[0]
    return build(one, tiny_config(one))


def ran(error: float = 1e-15, share: float = 0.5) -> dict[str, Any]:
    """What a rank reports of a batch that ran."""
    return {"status": "ran", "against": "batch", "error": error, "share": share, "worst": "weight"}


def refused(text: str = "not computed") -> dict[str, Any]:
    """What a rank reports of a refusal."""
    return {"status": "refused", "error": f"UnsupportedModelError: {text}", "where": "checks.py:1"}


def row(
    verdict: str, *, routes: bool = True, mixes: tuple[str, ...] = (), head: str = "causal"
) -> dict[str, Any]:
    """A row whose only mode has a verdict."""
    mode = {"verdict": verdict, "why": "", "only": [], "worst_error": 1e-15, "kinds": {}}
    kept = {
        "head": head,
        "type": "some",
        "variant": "",
        "note": "",
        "modes": {} if verdict == NOT_RUN else {"2x1": mode},
    }
    return {**kept, "routes": routes, "mixes_in": list(mixes)}


def test_every_head_has_rows_and_no_class_comes_twice() -> None:
    rows = architectures()
    assert {one.head for one in rows} == {*HEADS, "rope"}
    assert len({one.name for one in rows}) == len(rows)
    listed = [(one.model_type, one.class_name) for one in rows if one.head != "rope"]
    assert len(set(listed)) == len(listed)


def test_choice_by_type_takes_every_head_and_unknown_names_are_told() -> None:
    assert [one.head for one in choose(["bert"], None)] == ["causal", "masked"]
    assert [one.name for one in choose(["bert"], ["masked"])] == ["masked.bert"]
    with pytest.raises(ValueError, match="no architecture is called berta"):
        choose(["bert", "berta"], None)


@pytest.mark.parametrize(
    ("name", "routes", "mixes"),
    [
        ("causal.llama", True, ()),
        ("masked.bert", True, ()),
        ("seq2seq.bart", True, ()),
        ("causal.lfm2", True, ("Lfm2ShortConv",)),
        ("causal.doge", True, ("mask of DogeAttention",)),
        ("causal.bloom", False, ("BloomAttention",)),
    ],
)
def test_structure_tells_where_tokens_mix(name: str, routes: bool, mixes: tuple[str, ...]) -> None:
    model = tiny(name)
    form: Any = "seq2seq" if name.startswith("seq2seq") else "causal"
    found = structure_of(model, form, {})
    assert (found.routes, found.mixes_in) == (routes, mixes)


def test_probing_the_structure_leaves_the_model_as_it_was() -> None:
    model = tiny("rope.llama.dynamic")
    batch = make_batch("causal", "plain", model, {})
    state = State(model)
    before = model(**batch).loss
    state.restore()
    structure_of(model, "causal", {})
    assert model.training
    assert torch.equal(model(**batch).loss, before)


def test_padded_batches_have_padding_on_both_sides_and_within() -> None:
    model = tiny("masked.bert")
    for form in ("causal", "masked"):
        batch = make_batch(form, "padded", model, {})
        mask, labels = batch["attention_mask"], batch["labels"]
        assert mask[0].tolist() == [0] * 3 + [1] * 12 + [0] * 3 + [1] * 14
        assert mask[1].tolist() == [1] * 20 + [0] * 12
        assert (labels[mask == 0] == IGNORED).all()
        assert (labels != IGNORED).any(dim=1).all()
    assert make_batch("causal", "padded", model, {})["labels"][0, [3, 18]].tolist() == [
        IGNORED,
        IGNORED,
    ]


def test_documents_alone_hold_every_counted_label_of_the_packed_batch() -> None:
    model = tiny("masked.bert")
    for form in ("causal", "masked"):
        packed = make_batch(form, "packed", model, {})
        alone = documents_alone(form, packed)
        assert sum(num_counted(form, part) for part in alone) == num_counted(form, packed)
        assert len(alone) <= sum(map(len, DOCUMENTS))


def test_gradients_that_are_missing_or_not_finite_are_errors() -> None:
    right = Reference(2.0, {"a": torch.ones(2), "b": torch.ones(2)}, {})
    assert compare(2.0, {"a": torch.ones(2), "b": torch.ones(2)}, right)["error"] == 0.0
    assert compare(2.0, {"a": torch.ones(2)}, right)["worst"] == "b"
    broken = compare(2.0, {"a": torch.tensor([1.0, math.nan]), "b": torch.ones(2)}, right)
    assert (broken["error"], broken["worst"]) == (math.inf, "a")
    assert compare(math.nan, {"a": torch.ones(2), "b": torch.ones(2)}, right)["error"] == math.inf


def test_share_of_work_leaves_a_whole_encoder_out() -> None:
    right = Reference(1.0, {}, {"encoder.fc": 40, "decoder.fc": 48})
    rows = {"encoder.fc": 40, "decoder.fc": 24}
    assert share_of_work(rows, right, "features") == 0.5
    assert share_of_work(rows, right, "seq2seq") == pytest.approx(64 / 88)


@pytest.mark.parametrize(
    ("ranks", "verdict"),
    [
        ([ran(), ran()], "exact"),
        ([ran(1e-11), ran()], "exact to 1e-9"),
        ([ran(), ran(1e-3)], "wrong"),
        ([ran(math.nan), ran()], "wrong"),
        ([ran(share=1.0), ran(share=1.0)], "replicated"),
        ([refused(), refused()], "refused"),
        ([refused(), refused("something else")], "hang"),
        ([refused(), ran()], "hang"),
        ([{"status": "crash", "error": "KeyError", "where": ""}] * 2, "crash"),
    ],
)
def test_verdict_of_ranks(ranks: list[dict[str, Any]], verdict: str) -> None:
    assert verdict_of([{"plain": report} for report in ranks])["verdict"] == verdict


def test_the_worst_kind_of_batch_decides_and_is_named() -> None:
    reports = [{"plain": ran(), "padded": refused()} for _ in range(2)]
    found = verdict_of(reports)
    assert (found["verdict"], found["only"]) == ("refused", ["padded"])
    assert overall({"modes": {"2x1": found}, "note": ""})[1].startswith("(padded batches) ")


def test_only_rows_whose_attention_can_be_replaced_count_for_the_share() -> None:
    rows = {
        "a": row("exact"),
        "b": row("refused"),
        "c": row("refused", mixes=("Mixer",)),
        "d": row("refused", routes=False),
        "e": row(NOT_RUN),
        "f": row("exact", head="masked"),
    }
    assert [name for name in rows if is_eligible(rows[name])] == ["a", "b", "f"]
    counts = {line[0]: line[2] for line in counts_of(rows)}
    assert counts["**attention routed, tokens mixed nowhere else**"] == "2 of 3 (67%)"
    assert counts["the same, masked"] == "1 of 1 (100%)"


def test_the_page_has_a_line_for_each_row() -> None:
    rows = {"a": row("exact"), "b": row("refused", mixes=("Mixer",))}
    lines = lines_of(rows)
    assert [line[2:5] for line in lines] == [["exact", "1.0e-15", ""], ["refused", "", "Mixer"]]
    assert "do not edit" in document("", "", "torch 2")


def test_parts_are_merged_in_the_walk_s_order_and_missing_ones_are_told(tmp_path: Path) -> None:
    for part, name in ((1, "masked.bert"), (2, "causal.llama")):
        kept = {"part": part, "parts": 2, "rows": {name: row("exact")}}
        (tmp_path / f"models-cpu.part-{part}.json").write_text(json.dumps(kept))
    assert list(merge(tmp_path)) == ["causal.llama", "masked.bert"]
    (tmp_path / "models-cpu.part-1.json").unlink()
    with pytest.raises(ValueError, match=r"run --part for \[1\] first"):
        merge(tmp_path)


def test_a_chunk_runs_on_ranks() -> None:
    rows = run_chunk([*choose(["causal.llama"], None), *choose(["causal.mamba2"], None)])
    assert overall(rows["causal.llama"])[0] == "exact"
    assert set(rows["causal.llama"]["modes"]) == {"2x1", "1x2", "2x2"}
    assert overall(rows["causal.mamba2"])[0] == "refused"
    assert not is_eligible(rows["causal.mamba2"])


def test_an_architecture_that_can_not_be_run_says_why() -> None:
    (one,) = choose(["causal.gemma4_assistant"], None)
    case = prepare_case(one)
    assert not case.references
    assert "ValueError" in case.note
