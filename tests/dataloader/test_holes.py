"""Padding inside of a document is refused by name; between documents and at the ends it is not."""

from __future__ import annotations

import pytest
import torch

from ulysses_accel.dataloader.documents import find_rows
from ulysses_accel.errors import BatchError


def test_a_hole_is_refused() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])
    with pytest.raises(BatchError, match="row 1 has padding at tokens 1 to 1, between tokens whose positions go on"):
        find_rows({"attention_mask": mask}, 2, 4)
    # Positions that count tokens only, as made from the mask, go on over a hole too.
    with pytest.raises(BatchError, match="hole"):
        find_rows({"attention_mask": mask, "position_ids": torch.tensor([[0, 1, 2, 3], [0, 0, 1, 2]])}, 2, 4)


def test_padding_between_documents_is_not_a_hole() -> None:
    batch = {"attention_mask": torch.tensor([[0, 1, 1, 0, 1, 0]]), "position_ids": torch.tensor([[0, 0, 1, 2, 0, 1]])}
    assert find_rows(batch, 1, 6) == ((((1, 3), (4, 5)),), False)
