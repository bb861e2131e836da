"""What a batch looks like after completion and cutting; no processes."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ulysses_accel.dataloader.batch_layout import BatchLayout
from ulysses_accel.dataloader.completion.complete import ShardingCollate, complete
from ulysses_accel.dataloader.exchange import _check_plain, encode_side, entries_of
from ulysses_accel.errors import BatchError, ConfigError, UlyssesAccelError
from ulysses_accel.sequence.description import DESCRIPTION_KEY, SequenceDescription

IDS = torch.tensor([[5, 6, 7, 8, 9]])
TWO = BatchLayout(2)


def whole(layout: BatchLayout = TWO, **batch: Any) -> dict[str, Any]:
    done = complete(batch, layout)
    return {
        **{key: value.tolist() for key, value in done.tensors.items()},
        "rows": done.description.rows,
    }


def test_a_plain_batch_is_padded_shifted_and_described() -> None:
    done = whole(input_ids=IDS, labels=IDS)
    assert done == {
        "input_ids": [[5, 6, 7, 8, 9, 0]],
        "position_ids": [[0, 1, 2, 3, 4, 4]],
        "shift_labels": [[6, 7, 8, 9, -100, -100]],
        "rows": (((0, 5),),),
    }


def test_shards_put_together_are_the_whole_batch() -> None:
    done = complete(
        {"input_ids": IDS, "labels": IDS, "name": "a", "weight": torch.tensor(2.0)}, TWO
    )
    left, right = done.local_batch(0), done.local_batch(1)
    for key in ("input_ids", "position_ids", "shift_labels"):
        assert torch.equal(torch.cat([left[key], right[key]], 1), done.tensors[key])
    assert left["name"] == right["name"] == "a"
    assert left["weight"].item() == right["weight"].item() == 2.0
    assert left[DESCRIPTION_KEY] is done.description
    expected = SequenceDescription(6, 2, (((0, 5),),), longest_position=4)
    assert done.description == expected


def test_the_given_batch_is_not_changed() -> None:
    batch = {"input_ids": IDS, "labels": IDS.clone(), "cu_seq_lens_q": torch.tensor([0, 2, 5])}
    complete(batch, TWO)
    assert sorted(batch) == ["cu_seq_lens_q", "input_ids", "labels"]
    assert batch["labels"].tolist() == IDS.tolist()


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_any_mapping_will_do(kind: Any) -> None:
    assert complete(kind(input_ids=IDS), TWO).tensors["input_ids"].shape == (1, 6)


def test_a_batch_encoding_will_do() -> None:
    from transformers import BatchEncoding

    assert (
        complete(
            BatchEncoding({"input_ids": IDS, "attention_mask": IDS > 0}), TWO
        ).description.batch_size
        == 1
    )


def test_embeddings_instead_of_ids() -> None:
    done = complete(
        {"inputs_embeds": torch.ones(2, 3, 4), "labels": torch.ones(2, 3, dtype=torch.long)}, TWO
    )
    assert done.tensors["inputs_embeds"].shape == (2, 4, 4)
    assert done.tensors["inputs_embeds"][:, 3].abs().sum() == 0
    assert done.local_batch(1)["inputs_embeds"].shape == (2, 2, 4)


def test_batches_without_labels() -> None:
    assert sorted(whole(input_ids=IDS)) == ["input_ids", "position_ids", "rows"]


def test_given_shift_labels_are_kept_and_padded() -> None:
    done = whole(input_ids=IDS, labels=IDS, shift_labels=IDS + 10)
    assert done["shift_labels"] == [[15, 16, 17, 18, 19, -100]]
    assert "labels" not in done


def test_positions_that_start_over_are_documents() -> None:
    done = whole(input_ids=IDS, labels=IDS, position_ids=torch.tensor([[0, 1, 0, 1, 2]]))
    assert done["rows"] == (((0, 2), (2, 5)),)
    assert done["shift_labels"] == [[6, -100, 8, 9, -100, -100]]
    assert done["position_ids"] == [[0, 1, 0, 1, 2, 2]]


def test_positions_of_one_row_serve_all_rows() -> None:
    done = whole(input_ids=IDS.repeat(2, 1), position_ids=torch.arange(5))
    assert done["position_ids"] == [[0, 1, 2, 3, 4, 4]] * 2
    assert whole(input_ids=IDS.repeat(2, 1), position_ids=torch.arange(5)[None])["rows"] == (
        ((0, 5),),
        ((0, 5),),
    )


@pytest.mark.parametrize(
    ("mask", "rows", "labels"),
    [
        ([1, 1, 1, 0, 0], ((0, 3),), [6, 7, -100, -100, -100, -100]),
        ([0, 0, 1, 1, 1], ((2, 5),), [-100, -100, 8, 9, -100, -100]),
        ([0, 0, 0, 0, 0], (), [-100] * 6),
        ([1, 1, 2, 2, 2], ((0, 2), (2, 5)), [6, -100, 8, 9, -100, -100]),
    ],
)
def test_the_attention_mask_takes_padding_out(
    mask: list[int], rows: Any, labels: list[int]
) -> None:
    done = whole(input_ids=IDS, labels=IDS, attention_mask=torch.tensor([mask]))
    assert done["rows"] == (rows,)
    assert done["shift_labels"] == [labels]
    assert done["attention_mask"] == [[*mask, 0]]


def test_float_and_bool_masks() -> None:
    assert whole(input_ids=IDS, attention_mask=torch.tensor([[1.0, 1, 1, 0, 0]]))["rows"] == (
        ((0, 3),),
    )
    assert whole(input_ids=IDS, attention_mask=torch.tensor([[True] * 3 + [False] * 2]))[
        "rows"
    ] == (((0, 3),),)
    with pytest.raises(BatchError, match="values other than 0 and 1"):
        whole(input_ids=IDS, attention_mask=torch.tensor([[0.0, 0, 0, -1e9, -1e9]]))


def test_cumulative_lengths_are_consumed() -> None:
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    done = whole(
        input_ids=IDS,
        labels=IDS,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=3,
        max_length_k=3,
    )
    assert sorted(done) == ["input_ids", "position_ids", "rows", "shift_labels"]
    assert done["rows"] == (((0, 2), (2, 5)),)
    assert done["position_ids"] == [[0, 1, 0, 1, 2, 2]]
    assert done["shift_labels"] == [[6, -100, 8, 9, -100, -100]]


def test_cumulative_lengths_with_a_mask() -> None:
    done = whole(
        input_ids=IDS, cu_seq_lens_q=[0, 2, 5], attention_mask=torch.tensor([[1, 1, 1, 1, 0]])
    )
    assert done["rows"] == (((0, 2), (2, 4)),)


def test_cumulative_lengths_need_one_row_and_must_fit() -> None:
    with pytest.raises(BatchError, match="the batch has 2 rows"):
        whole(input_ids=IDS.repeat(2, 1), cu_seq_lens_q=torch.tensor([0, 5]))
    with pytest.raises(BatchError, match="do not fit a row of 5 tokens"):
        whole(input_ids=IDS, cu_seq_lens_q=torch.tensor([0, 9]))


def test_sequence_numbers_are_documents() -> None:
    done = whole(input_ids=IDS, seq_idx=torch.tensor([[0, 0, 1, 1, 2]], dtype=torch.int32))
    assert done["rows"] == (((0, 2), (2, 4), (4, 5)),)
    assert done["position_ids"] == [[0, 1, 0, 1, 0, 1]]
    assert done["seq_idx"] == [[0, 0, 1, 1, 2, -1]]


def test_three_position_planes_with_an_image_are_one_document() -> None:
    time = torch.tensor([0, 1, 1, 1, 4])  # time stands still in the image, then jumps
    planes = torch.stack([time, torch.arange(5), torch.arange(5)])[:, None]
    done = complete({"input_ids": IDS, "position_ids": planes}, TWO)
    assert done.description.rows == (((0, 5),),)
    assert done.local_batch(1)["position_ids"].tolist() == [[[1, 4, 4]], [[3, 4, 4]], [[3, 4, 4]]]
    two = complete(
        {"input_ids": IDS, "position_ids": torch.tensor([0, 1, 1, 0, 1]).expand(3, 1, 5)}, TWO
    )
    assert two.description.rows == (((0, 3), (3, 5)),)


def test_four_position_planes_have_text_positions_first() -> None:
    planes = torch.stack([torch.tensor([0, 1, 2, 0, 1])] + [torch.zeros(5, dtype=torch.long)] * 3)[
        :, None
    ]
    assert complete({"input_ids": IDS, "position_ids": planes}, TWO).description.rows == (
        ((0, 3), (3, 5)),
    )


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("multiple", [None, 3, 4])
def test_padding_to_multiples(parts: int, multiple: int | None) -> None:
    length = complete(
        {"input_ids": IDS}, BatchLayout(parts, pad_multiple=multiple)
    ).description.sequence_length
    assert length % parts == 0
    assert length % (multiple or 1) == 0
    assert 5 <= length < 5 + parts * (multiple or 1)


def test_a_fixed_length() -> None:
    layout = BatchLayout(2, sequence_length=8, pad_token_id=3)
    assert whole(layout, input_ids=IDS)["input_ids"] == [[5, 6, 7, 8, 9, 3, 3, 3]]
    with pytest.raises(
        BatchError, match="the batch has 9 tokens in a row, but sequence_length=8 is fixed"
    ):
        whole(layout, input_ids=torch.ones(1, 9, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 7}, "sequence_length=7 is not a multiple of 2.*Use 8"),
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"pad_multiple": 0}, "pad_multiple=0"),
        ({"num_shards": 0}, "sp_world_size=0"),
        ({"batch_schema": {"a": "split"}}, "batch_schema has the rule 'split' for the key 'a'"),
        ({"batch_schema": {"a": True}}, "has the rule True for the key 'a'"),
    ],
)
def test_layouts_that_are_not_legal(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchLayout(**{"num_shards": 2, **options})


@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((), None),
        ((2,), None),  # one number for each sample
        ((2, 5), 1),
        ((2, 5, 3), 1),
        ((2, 3), None),
        ((7, 3), None),
        ((5, 5), "error"),
        ((2, 5, 5), "error"),
        ((2, 3, 5), "error"),
        ((5,), "error"),
        ((3, 5), "error"),
    ],
)
def test_unknown_tensors_follow_their_shape(shape: tuple[int, ...], dim: Any) -> None:
    batch = {"input_ids": IDS.repeat(2, 1), "mine": torch.ones(shape)}
    if dim == "error":
        with pytest.raises(
            BatchError, match=r"'mine' of shape .* batch_schema=\{'mine': 'shard'\}"
        ):
            complete(batch, TWO)
    else:
        assert complete(batch, TWO).dims["mine"] == dim


def test_a_batch_as_long_as_it_is_wide_is_no_riddle() -> None:
    batch = {
        "input_ids": torch.ones(5, 5, dtype=torch.long),
        "mine": torch.ones(5, 5),
        "each": torch.ones(5),
    }
    dims = complete(batch, TWO).dims
    assert (dims["mine"], dims["each"]) == (1, None)


@pytest.mark.parametrize(
    "name",
    [
        "pixel_values",
        "pixel_mask",
        "image_grid_thw",
        "input_features",
        "input_features_mask",
        "input_values",
    ],
)
def test_known_keys_of_whole_samples_are_replicated(name: str) -> None:
    for shape in ((1, 5), (5, 3, 5), (1, 3)):  # some of them look like a sequence
        assert complete({"input_ids": IDS, name: torch.ones(shape)}, TWO).dims[name] is None


def test_batch_schema_decide() -> None:
    rules = {"bias": 2, "table": "replicate", "extra": "shard"}
    batch = {
        "input_ids": IDS,
        "bias": torch.ones(1, 3, 5),
        "table": torch.ones(1, 5),
        "extra": torch.ones(1, 5),
    }
    done = complete(batch, BatchLayout(2, batch_schema=rules))
    assert {key: done.dims[key] for key in rules} == {"bias": 2, "table": None, "extra": 1}
    assert done.local_batch(1)["bias"].shape == (1, 3, 3)
    with pytest.raises(
        BatchError, match=r"'bias' has shape \[1, 3, 5\], where dim 1 should be the 5 tokens"
    ):
        complete(batch, BatchLayout(2, batch_schema={**rules, "bias": "shard"}))
    with pytest.raises(BatchError, match="where dim 7 should be"):
        complete(batch, BatchLayout(2, batch_schema={**rules, "bias": 7}))


def test_labels_of_whole_samples_need_a_rule() -> None:
    batch = {"input_ids": IDS, "labels": torch.tensor([1])}
    with pytest.raises(BatchError, match=r"'labels' has shape \[1\]"):
        complete(batch, TWO)
    done = complete(batch, BatchLayout(2, batch_schema={"labels": "replicate"}))
    assert done.tensors["labels"].tolist() == [1]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((IDS,), "the batch is a tuple"),
        ({}, "neither 'input_ids' nor 'inputs_embeds'"),
        ({"labels": IDS}, r"neither .* \(its tensors: \['labels'\]\)"),
        ({1: IDS, "input_ids": IDS}, "not all strings"),
        ({"input_ids": IDS[0]}, r"'input_ids' has shape \[5\]"),
        ({"inputs_embeds": IDS}, r"'inputs_embeds' has shape \[1, 5\]"),
        ({"input_ids": IDS, "inputs_embeds": torch.ones(1, 4, 2)}, "differ in batch or sequence"),
        ({"input_ids": IDS[:, :0]}, "the batch is empty: 1 rows of 0 tokens"),
        ({"input_ids": IDS[:0]}, "the batch is empty: 0 rows of 5 tokens"),
        (
            {"input_ids": IDS, "attention_mask": torch.ones(1, 1, 5, 5)},
            "4-D 'attention_mask' has values that change",
        ),
        ({"input_ids": IDS, "attention_mask": {"full": IDS}}, "attention_mask that is a dict"),
        (
            {"input_ids": IDS, "position_ids": torch.ones(1, 4)},
            r"'position_ids' has shape \[1, 4\]",
        ),
        (
            {"input_ids": IDS, "position_ids": torch.ones(3, 5)},
            r"'position_ids' has shape \[3, 5\]",
        ),
        ({"input_ids": IDS, "position_ids": torch.tensor(3)}, r"'position_ids' has shape \[\]"),
        ({"input_ids": IDS, "position_ids": IDS > 5}, "'position_ids' is torch.bool"),
        ({"input_ids": IDS, "labels": IDS > 5}, "'labels' is torch.bool"),
        ({"input_ids": IDS, "cu_seq_lens_q": "0, 5"}, "cu_seq_lens_q is '0, 5'"),
        ({"input_ids": IDS, "seq_idx": torch.ones(3, 5)}, r"'seq_idx' has shape \[3, 5\]"),
        ({"input_ids": IDS, "shift_labels": IDS[:, :3]}, r"'shift_labels' has shape \[1, 3\]"),
        ({"input_ids": IDS, "token_type_ids": IDS[:, :3]}, r"'token_type_ids' has shape \[1, 3\]"),
        ({"input_ids": IDS, DESCRIPTION_KEY: 0}, "one rank's shard, not a full batch"),
    ],
)
def test_batches_that_cannot_be_sharded(batch: Any, message: str) -> None:
    with pytest.raises(BatchError, match=message):
        complete(batch, TWO)


def test_a_checksum_tells_batches_apart() -> None:
    first = complete({"input_ids": IDS, "labels": IDS}, TWO).checksum()
    assert first == complete({"labels": IDS, "input_ids": IDS.clone()}, TWO).checksum()
    assert first != complete({"input_ids": IDS, "labels": IDS + 1}, TWO).checksum()
    assert first != complete({"input_ids": IDS + 1, "labels": IDS}, TWO).checksum()
    embeds = torch.rand(1, 5, 2)
    sums = [complete({"inputs_embeds": embeds + i}, TWO).checksum() for i in (0, 0, 1)]
    assert sums[0] == sums[1] != sums[2]


def test_plain_values_travel_and_others_are_named() -> None:
    done = complete(
        {"input_ids": IDS, "name": ["a", "ö"], "meta": {"x": [1, 2.5, None, True]}}, TWO
    )
    assert b'"meta":{"x":[1,2.5,null,true]}' in encode_side(done)
    assert len(entries_of(done)) == 2
    for value, kind in (
        ({1: 2}, "dict"),
        (object(), "object"),
        ([{"a": IDS}], "Tensor"),
        (1j, "complex"),
    ):
        with pytest.raises(BatchError, match=f"'extra' holds a {kind}"):
            encode_side(complete({"input_ids": IDS, "extra": value}, TWO))


def test_the_sharding_collate_function_owns_its_tensors() -> None:
    collate = ShardingCollate(lambda samples: {"input_ids": torch.stack(samples)}, TWO, 1)
    batch = collate([IDS[0]])
    assert batch["input_ids"].tolist() == [[8, 9, 0]]
    assert batch["input_ids"].untyped_storage().nbytes() == 3 * 8


nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.just(torch.ones(1, 5)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)
tensors = st.builds(
    torch.zeros,
    st.sampled_from(
        [(1, 5), (5,), (), (1, 1, 5), (3, 1, 5), (1, 5, 2), (2, 5), (0,), (1, 0), (4,)]
    ),
    dtype=st.sampled_from([torch.int64, torch.float32, torch.bool, torch.bfloat16]),
)
keys = st.sampled_from(
    [
        "input_ids",
        "inputs_embeds",
        "labels",
        "shift_labels",
        "attention_mask",
        "position_ids",
        "seq_idx",
        "mine",
        "cu_seq_lens_q",
        "max_length_q",
        "pixel_values",
    ]
)


@settings(max_examples=400, deadline=None)
@given(
    st.dictionaries(keys, tensors | nested, max_size=4) | nested, st.integers(1, 4), st.booleans()
)
def test_anything_becomes_a_batch_or_a_typed_error(batch: Any, parts: int, with_ids: bool) -> None:
    if isinstance(batch, dict) and with_ids:
        batch["input_ids"] = IDS
    try:
        done = complete(batch, BatchLayout(parts))
        encode_side(done)
    except UlyssesAccelError:
        return
    assert done.description.sequence_length % parts == 0
    for key, tensor in done.tensors.items():
        dim = done.dims[key]
        if dim is not None:
            pieces = [done.shard(rank)[key] for rank in range(parts)]
            assert torch.equal(torch.cat(pieces, dim), tensor)


def test_nested_plain_values() -> None:
    _check_plain("x", {"a": [1, "b", None, {"c": (1.0,)}]})
    with pytest.raises(BatchError, match="x"):
        _check_plain("x", {"a": [1, object()]})
