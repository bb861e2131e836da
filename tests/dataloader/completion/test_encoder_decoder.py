"""Encoder-decoder batches: two sequences, each padded, described and cut by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.loader_samples import adapt, error_of, from_list, plain
from tests.helpers.ranks import run_ranks
from ulysses_accel.dataloader.batch_layout import BatchLayout
from ulysses_accel.dataloader.completion.complete import complete
from ulysses_accel.errors import BatchError
from ulysses_accel.sequence.batch_rules import BatchRules
from ulysses_accel.sequence.description import DESCRIPTION_KEY
from ulysses_accel.sequence.layout import LAYOUTS, ring_order
from ulysses_accel.sequence.sharding import next_multiple, unshard

START, PAD = 2, 1


def shift_right(labels: Tensor) -> Tensor:
    """As BART-like models make their decoder's tokens."""
    shifted = labels.roll(1, dims=1)
    shifted[:, 0] = START
    return shifted.masked_fill(shifted == -100, PAD)


PAIR = BatchRules(labels="same_token", decoder_inputs=shift_right)
TWO = BatchLayout(2)


def pair(encoder: int = 5, decoder: int = 3, rows: int = 1) -> dict[str, Tensor]:
    return {
        "input_ids": torch.arange(rows * encoder).view(rows, encoder) + 100,
        "labels": torch.arange(rows * decoder).view(rows, decoder) + 200,
    }


def whole(**batch: Any) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in complete(batch, TWO, PAIR).tensors.items()}


def test_each_sequence_has_its_own_length() -> None:
    assert whole(**pair(), attention_mask=torch.tensor([[1, 1, 1, 1, 0]])) == {
        "input_ids": [[100, 101, 102, 103, 104, 0]],
        "attention_mask": [[1, 1, 1, 1, 0, 0]],
        "position_ids": [[0, 1, 2, 3, 4, 4]],
        "decoder_input_ids": [[2, 200, 201, 0]],
        "decoder_position_ids": [[0, 1, 2, 2]],
        "labels": [[200, 201, 202, -100]],
    }


def test_both_are_described() -> None:
    batch = {**pair(), "attention_mask": torch.tensor([[0, 1, 0, 1, 1]])}
    description = complete(batch, TWO, PAIR).description
    assert (description.sequence_length, description.rows, description.holes) == (
        4,
        (((0, 3),),),
        (),
    )
    assert (description.longest_position, description.num_shards) == (2, 2)
    encoder = description.encoder
    assert encoder is not None
    assert (encoder.sequence_length, encoder.rows, encoder.holes) == (6, (((1, 5),),), (((2, 3),),))
    assert (encoder.longest_position, encoder.num_shards, encoder.encoder) == (4, 2, None)


def test_given_decoder_tokens_are_kept() -> None:
    tokens, mask = torch.tensor([[7, 8, 9]]), torch.tensor([[1, 1, 0]])
    labels = torch.tensor([[8, 9, -100]])
    batch = {
        **pair(),
        "labels": labels,
        "decoder_input_ids": tokens,
        "decoder_attention_mask": mask,
    }
    done = complete({**batch, "decoder_position_ids": torch.tensor([[4, 5, 6]])}, TWO, PAIR)
    assert done.tensors["decoder_input_ids"].tolist() == [[7, 8, 9, 0]]
    assert done.tensors["decoder_attention_mask"].tolist() == [[1, 1, 0, 0]]
    assert done.tensors["decoder_position_ids"].tolist() == [[4, 5, 6, 6]]
    assert done.description.rows == (((0, 2),),)
    without_labels = complete(
        {"input_ids": batch["input_ids"], "decoder_input_ids": tokens}, TWO, PAIR
    )
    assert without_labels.tensors["decoder_input_ids"].tolist() == [[7, 8, 9, 0]]


def test_embeddings_of_either_sequence() -> None:
    batch = {"inputs_embeds": torch.ones(1, 5, 4), "decoder_inputs_embeds": torch.ones(1, 3, 4)}
    done = complete({**batch, "labels": torch.ones(1, 3, dtype=torch.long)}, TWO, PAIR)
    assert "decoder_input_ids" not in done.tensors
    assert [list(done.shard(1)[name].shape) for name in batch] == [[1, 3, 4], [1, 2, 4]]
    sums = [
        complete({**batch, "decoder_inputs_embeds": torch.rand(1, 3, 4)}, TWO, PAIR).checksum()
        for _ in range(2)
    ]
    assert sums[0] != sums[1]


def test_positions_of_both_follow_the_models_rule() -> None:
    rules = BatchRules(labels="same_token", padding_idx=PAD, decoder_inputs=shift_right)
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, PAD]]),
        "labels": torch.tensor([[8, 9, -100, -100]]),
    }
    done = complete(batch, BatchLayout(3), rules)
    assert done.tensors["position_ids"].tolist() == [[2, 3, 4, 1, 1, 1]]
    assert done.tensors["decoder_input_ids"][:, :4].tolist() == [[START, 8, 9, PAD]]
    assert done.tensors["decoder_position_ids"].tolist() == [[2, 3, 4, 1, 1, 1]]


def test_an_encoder_that_reads_no_tokens_is_whole() -> None:
    batch = {
        "input_features": torch.rand(1, 80, 6),
        "labels": torch.tensor([[7, 8, 9]]),
        "extra": torch.ones(1, 3),
    }
    done = complete({**batch, "attention_mask": torch.ones(1, 6)}, TWO, PAIR)
    assert done.description.encoder is None
    assert {name: done.dims[name] for name in batch} == {
        "input_features": None,
        "labels": 1,
        "extra": 1,
    }
    assert done.dims["attention_mask"] is None
    assert done.local_batch(1)["input_features"] is batch["input_features"]
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    padded = complete({**batch, "attention_mask": mask}, TWO, PAIR)
    assert padded.description.encoder is None
    assert torch.equal(padded.local_batch(1)["attention_mask"], mask)


@pytest.mark.parametrize(
    ("name", "length", "padded"), [("mine", 5, 6), ("mine", 3, 4), ("loss_weights", 3, 4)]
)
def test_further_tensors_follow_the_sequence_of_their_length(
    name: str, length: int, padded: int
) -> None:
    done = complete({**pair(), name: torch.ones(1, length)}, TWO, PAIR)
    assert (done.dims[name], done.tensors[name].shape[1]) == (1, padded)


def test_batch_schema_hold_in_both_sequences() -> None:
    rules: dict[str, str | int] = {"bias": 2, "table": "replicate", "late": 2}
    batch = {
        **pair(),
        "bias": torch.ones(1, 9, 5),
        "late": torch.ones(1, 9, 3),
        "table": torch.ones(1, 3),
    }
    done = complete(batch, BatchLayout(2, batch_schema=rules), PAIR)
    assert {name: list(done.shard(0)[name].shape) for name in rules} == {
        "bias": [1, 9, 3],
        "late": [1, 9, 2],
        "table": [1, 3],
    }


def test_prefixes_are_the_decoders() -> None:
    description = complete({**pair(), "prefix_lengths": [2]}, TWO, PAIR).description
    assert description.prefixes == ((2,),)
    assert description.encoder is not None
    assert description.encoder.prefixes == ()


def test_a_fixed_length_holds_for_both() -> None:
    done = complete(pair(), BatchLayout(2, sequence_length=8), PAIR)
    assert {tensor.shape[1] for tensor in done.tensors.values()} == {8}
    with pytest.raises(BatchError, match="has 10 tokens in a row, but sequence_length=8"):
        complete(pair(decoder=10), BatchLayout(2, sequence_length=8), PAIR)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "has no 'decoder_input_ids', and no 'labels' to make them of"),
        ({"labels": torch.tensor([1])}, r"and 'labels' of shape \[1\] to make them of"),
        (
            {"decoder_input_ids": torch.ones(1, 4)},
            r"'labels' has shape \[1, 3\], but one for each of \[1, 4\]",
        ),
        (
            {"labels": torch.ones(2, 3, dtype=torch.long)},
            "the encoder has 1 rows and the decoder 2",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 5])}, "'cu_seq_lens_q' marks packed documents"),
        ({"seq_idx": torch.zeros(1, 5)}, "'seq_idx' marks packed documents"),
        (
            {"position_ids": torch.tensor([[0, 1, 0, 1, 2]])},
            "the encoder's positions or mask mark packed documents",
        ),
        (
            {"decoder_attention_mask": torch.tensor([[1, 1, 2]])},
            "the decoder's positions or mask mark packed",
        ),
        (
            {"decoder_attention_mask": torch.ones(1, 5)},
            r"a decoder_attention_mask of shape \[1, 5\]",
        ),
        ({"attention_mask": [1, 1]}, "an attention_mask that is a list"),
        (
            {"decoder_position_ids": torch.ones(1, 2, dtype=torch.long)},
            "'decoder_position_ids' has shape",
        ),
        ({"input_ids": torch.ones(1, 0)}, "the batch is empty"),
    ],
)
def test_pairs_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    batch = {name: value for name, value in {**pair(), **changes}.items() if value is not None}
    with pytest.raises(BatchError, match=message):
        complete(batch, TWO, PAIR)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 14),
    st.integers(1, 14),
    st.integers(1, 2),
    st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (4, 2)]),
    st.sampled_from(LAYOUTS),
)
def test_shards_put_together_are_both_sequences(
    encoder: int, decoder: int, rows: int, sizes: tuple[int, int], ring_layout: Any
) -> None:
    ring_size, parts = sizes[0], sizes[0] * sizes[1]
    layout = BatchLayout(parts, ring_size=ring_size, ring_layout=ring_layout)
    batch = {
        **pair(encoder, decoder, rows),
        "attention_mask": torch.ones(rows, encoder, dtype=torch.long),
    }
    done = complete(batch, layout, PAIR)
    expected = {**batch, "decoder_input_ids": shift_right(batch["labels"])}
    for name, tensor in expected.items():
        joined = unshard([done.shard(rank)[name] for rank in range(parts)])
        length = next_multiple(tensor.shape[1], layout.multiple)
        order = ring_order(length, ring_size, ring_layout)
        if order is not None:
            joined = joined[:, order.argsort()]
        assert joined.shape == (rows, length)
        assert torch.equal(joined[:, : tensor.shape[1]], tensor)
    description = done.description
    assert description.encoder is not None
    assert description.sequence_length == next_multiple(decoder, layout.multiple)
    assert description.encoder.sequence_length == next_multiple(encoder, layout.multiple)


def described(step: dict[str, Any]) -> dict[str, Any]:
    encoder = step[DESCRIPTION_KEY].encoder
    rows = [[list(segment) for segment in row] for row in encoder.rows]
    return {**plain(step), "encoder": [encoder.sequence_length, encoder.num_shards, rows]}


@pytest.mark.parametrize("same", [True, False])
def test_ranks_get_their_shards_of_both(same: bool) -> None:
    def body() -> Any:
        rank = 0 if same else dist.get_rank()
        batch = pair(encoder=5 + 4 * rank, decoder=3 + 2 * rank)
        return [described(step) for step in adapt(from_list([batch]), same_batch=same, rules=PAIR)]

    ranks = run_ranks(body, 2)
    for step in range(1 if same else 2):
        left, right = (rank[step] for rank in ranks)
        source = pair(encoder=5 + 4 * step, decoder=3 + 2 * step)
        for name, length in (("input_ids", 5 + 4 * step), ("labels", 3 + 2 * step)):
            assert (left[name][0] + right[name][0])[:length] == source[name][0].tolist()
        assert left["encoder"] == right["encoder"] == [6 + 4 * step, 2, [[[0, 5 + 4 * step]]]]
        assert left["whole"] == right["whole"] == [4 + 2 * step, 2]


@pytest.mark.parametrize("changed", ["encoder", "decoder"])
def test_ranks_must_agree_on_both_lengths(changed: str) -> None:
    def body() -> str:
        batch = pair(**{changed: 8 + 2 * dist.get_rank()})
        return error_of(lambda: list(adapt(from_list([batch]), same_batch=True, rules=PAIR)))

    messages = run_ranks(body, 2)
    assert messages[0] == messages[1]
    name = "input_ids" if changed == "encoder" else "decoder_input_ids"
    assert messages[0].startswith("RankDisagreementError: ranks disagree on the tensors of a batch")
    assert f"'{name}' int64 [1 x 8]" in messages[0]
    assert f"'{name}' int64 [1 x 10]" in messages[0]
