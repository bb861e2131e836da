"""The table of what works with what."""

from __future__ import annotations

import pytest

from tests.helpers.support import Claim, Support, difference, render


def _claims() -> list[Claim]:
    support = Support()
    support("trainer", "Trainer", "sp", code="Trainer(args=args)")
    support("trainer", "Trainer", "sp", code="Trainer(args=args)", engine="FSDP2")
    support("trainer", "SFTTrainer", "cp", code="SFTTrainer(args=a | b)")
    support.refused("trainer", "KTOTrainer", "cp", "whole sequences")
    return support.claims


def test_rows_join_engines_and_keep_reasons() -> None:
    lines = render(_claims()).splitlines()
    assert "| | sp | cp | in code |" in lines
    assert "| Trainer | DDP, FSDP2 | – | `Trainer(args=args)` |" in lines
    assert "| SFTTrainer | – | DDP | `SFTTrainer(args=a \\| b)` |" in lines
    assert "| KTOTrainer | – | refused: whole sequences |  |" in lines


def test_order_of_the_tests_does_not_matter() -> None:
    assert render(_claims()) == render(reversed(_claims()))


def test_difference_names_the_lines() -> None:
    assert difference("a\nb\n", "b\nc\n") == ["- a", "+ c"]
    assert difference("a\n", "a\n") == []


@pytest.mark.parametrize(
    ("area", "mode", "engine", "code"),
    [
        ("nothing", "sp", "DDP", "x"),
        ("loss", "pp", "DDP", "x"),
        ("loss", "sp", "JAX", "x"),
        ("loss", "sp", "DDP", ""),
    ],
)
def test_unknown_words_fail_the_test_that_uses_them(
    area: str, mode: str, engine: str, code: str
) -> None:
    with pytest.raises(AssertionError):
        Support()(area, "x", mode, code=code, engine=engine)


def test_a_cell_is_either_refused_or_exact() -> None:
    support = Support()
    support("loss", "x", "sp", code="x")
    support.refused("loss", "x", "sp", "no")
    with pytest.raises(AssertionError, match="both refused and exact"):
        render(support.claims)
