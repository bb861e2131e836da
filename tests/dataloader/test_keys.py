"""The table of known keys, and the schema of a configuration: each tensor comes back whole from its
shards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

import ulysses_accel
from tests.helpers.engine_jobs import batches_of
from tests.helpers.loader_samples import Samples, adapt, error_of, from_list, loader
from tests.helpers.ranks import run_ranks
from tests.helpers.support import Support
from ulysses_accel.dataloader.batch_layout import BatchLayout
from ulysses_accel.dataloader.completion.complete import complete
from ulysses_accel.dataloader.completion.padding import padding_value
from ulysses_accel.dataloader.keys import KNOWN_KEYS, MERGED_KEYS
from ulysses_accel.errors import BatchError, ConfigError
from ulysses_accel.sequence.batch_rules import BatchRules
from ulysses_accel.sequence.description import SequenceDescription
from ulysses_accel.sequence.layout import ring_order
from ulysses_accel.sequence.sharding import pad_sequence_dim, shard, unshard

SEQUENCES = sorted(
    name for name, key in KNOWN_KEYS.items() if key.dim is not None and name != "labels"
)
WHOLE = sorted(name for name, key in KNOWN_KEYS.items() if key.dim is None)
MERGING = BatchRules(merges=True)
sizes = st.integers(1, 3)


def tensor(name: str, batch_size: int, length: int, extra: list[int], planes: int) -> Tensor:
    """Returns distinct numbers in a shape that the key may have."""
    if name == "position_ids":
        # mRoPE's planes; none is [B, S].
        shape = [*([planes] if planes else []), batch_size, length]
        return (
            torch.arange(length).expand(shape)
            if planes < 3
            else torch.arange(length).expand(shape) + 7
        )
    if name == "attention_mask":
        return torch.ones(batch_size, length, dtype=torch.long)
    shape = [batch_size, length, *(extra[:1] if name == "inputs_embeds" else [])]
    if name not in ("input_ids", "inputs_embeds", "shift_labels", "seq_idx"):
        shape += extra
    count = int(torch.tensor(shape).prod())
    return torch.arange(count).reshape(shape) // (count if name == "seq_idx" else 1)


@st.composite
def batches(draw: st.DrawFn) -> tuple[dict[str, Tensor], BatchLayout]:
    batch_size, length = draw(sizes), draw(st.integers(1, 17))
    extra, planes = draw(st.lists(sizes, min_size=1, max_size=2)), draw(st.sampled_from([0, 3, 4]))
    names = draw(st.sets(st.sampled_from(SEQUENCES), max_size=6)) | {"input_ids"}
    batch = {name: tensor(name, batch_size, length, extra, planes) for name in names}
    whole = draw(st.sets(st.sampled_from(WHOLE), max_size=3))
    batch.update({name: torch.rand(draw(st.lists(sizes, max_size=3))) for name in whole})
    own = draw(st.integers(0, 2))
    batch["mine"] = torch.rand([*[1, 2, 3, 4][:own], length, *extra])
    ring, ulysses = draw(st.sampled_from([(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (4, 1)]))
    layout = draw(st.sampled_from(["contiguous", "zigzag", "striped"]))
    return batch, BatchLayout(
        ring * ulysses, batch_schema={"mine": own}, ring_size=ring, ring_layout=layout
    )


@settings(max_examples=60, deadline=None)
@given(batches())
def test_every_tensor_comes_back_from_its_shards(
    drawn: tuple[dict[str, Tensor], BatchLayout],
) -> None:
    batch, layout = drawn
    done = complete(batch, layout)
    parts = [done.local_batch(rank) for rank in range(layout.num_shards)]
    padded, length = done.description.sequence_length, batch["input_ids"].shape[1]
    order = ring_order(padded, layout.ring_size, layout.ring_layout)
    back = torch.arange(padded) if order is None else order.argsort()
    for name, given_tensor in batch.items():
        dim = done.dims[name]
        if dim is None:
            assert name in WHOLE
            assert all(part[name] is given_tensor for part in parts)
            continue
        assert {part[name].shape[dim] for part in parts} == {padded // layout.num_shards}
        whole = unshard([part[name] for part in parts], dim).index_select(dim, back)
        torch.testing.assert_close(whole.narrow(dim, 0, length), given_tensor, rtol=0, atol=0)
        if name != "position_ids":
            pad = padding_value(name, layout)
            assert whole.equal(pad_sequence_dim(given_tensor, padded, pad, dim))


def test_numbers_of_samples_or_tokens() -> None:
    batch = {"input_ids": torch.ones(2, 6, dtype=torch.long)}
    layout = BatchLayout(2)
    for name in ("advantages", "rewards", "loss_weights"):
        assert complete({**batch, name: torch.ones(2)}, layout).dims[name] is None
        assert complete({**batch, name: torch.ones(2, 6)}, layout).dims[name] == 1
    # Of the completion alone, its tokens can't be told from the sequence's.
    with pytest.raises(BatchError, match=r"'old_per_token_logps' has shape \[2, 4\].*6 tokens"):
        complete({**batch, "old_per_token_logps": torch.ones(2, 4)}, layout)
    with pytest.raises(BatchError, match=r"or set batch_schema=\{'advantages': 'replicate'\}"):
        complete({**batch, "advantages": torch.ones(3)}, layout)


@pytest.mark.parametrize("name", MERGED_KEYS)
def test_tokens_beside_images_or_sound_stay_whole(name: str) -> None:
    tokens = torch.arange(14).reshape(2, 7)
    batch = {
        "input_ids": tokens,
        "labels": tokens,
        "mm_token_type_ids": tokens % 2,
        name: torch.ones(3, 2),
    }
    layout = BatchLayout(2, ring_size=2, ring_layout="zigzag")
    done = complete(batch, layout, MERGING)
    part = done.local_batch(1)
    assert part["input_ids"].tolist() == [[*row, 0] for row in tokens.tolist()]
    assert part["mm_token_type_ids"].shape == (2, 8)
    # What only decoder and loss see is cut: the second rank of a zigzag ring has the tokens 2 to 5.
    assert part["shift_labels"].tolist() == [[3, 4, 5, 6], [10, 11, 12, 13]]
    assert part["position_ids"].tolist() == [[2, 3, 4, 5]] * 2
    own = complete(
        {**batch, "position_ids": torch.arange(7).expand(3, 2, 7)}, layout, MERGING
    ).local_batch(1)
    assert own["position_ids"].shape == (3, 2, 8)
    # Without images nothing is whole, and neither is it for a model that merges none.
    text = {key: value for key, value in batch.items() if key != name}
    assert complete(text, layout, MERGING).local_batch(1)["input_ids"].shape == (2, 4)
    assert complete(batch, layout).local_batch(1)["input_ids"].shape == (2, 4)
    # Whole tokens count, where ranks are asked whether they drew the same.
    assert (
        done.checksum() != complete({**batch, "input_ids": tokens + 1}, layout, MERGING).checksum()
    )


def own_rows(tensor: Tensor, description: SequenceDescription, rank: int) -> Tensor:
    """A mask of scores `[S, S]`, of which a rank needs its own tokens' rows."""
    return shard(tensor, description.num_shards, rank, dim=0)


def with_functions() -> list[Any]:
    batch = {"input_ids": torch.arange(8)[None], "scores": torch.arange(64.0).reshape(8, 8)}
    part = next(iter(adapt(from_list([batch]), same_batch=True, batch_schema={"scores": own_rows})))

    def fails(tensor: Tensor, _description: SequenceDescription, rank: int) -> Tensor:
        if rank == 1:
            raise ValueError("no such rows")
        return tensor

    options: dict[str, Any] = {"same_batch": True}
    failing = error_of(
        lambda: list(adapt(from_list([batch]), batch_schema={"scores": fails}, **options))
    )
    nothing: Any = lambda *_: None  # noqa: E731
    empty = error_of(
        lambda: list(adapt(from_list([batch]), batch_schema={"scores": nothing}, **options))
    )
    own = error_of(lambda: adapt(loader(Samples(1)), batch_schema={"scores": own_rows}))
    return [part["scores"], failing, empty, own]


def test_a_function_cuts_for_its_own_rank() -> None:
    for rank, (rows, failing, empty, own) in enumerate(run_ranks(with_functions, 2)):
        assert rows.tolist() == torch.arange(64.0).reshape(8, 8)[4 * rank : 4 * rank + 4].tolist()
        assert failing == "BatchError: rank 1 failed to produce a batch: ValueError: no such rows"
        assert "the function of batch_schema['scores'] returned a NoneType" in empty
        assert own.startswith("ConfigError: batch_schema has a function")
    with pytest.raises(
        ConfigError, match=r"batch_schema\['labels'\] is a function, but .* made of 'labels'"
    ):
        BatchLayout(2, batch_schema={"labels": own_rows})


def prepared(configs: list[Any]) -> list[dict[str, list[int]]]:
    samples = [
        {**one, "weights": torch.rand(16), "bias": torch.rand(3, 16)}
        for one in batches_of(2).dataset
    ]
    found = []
    for config in configs:
        AcceleratorState._reset_state(True)
        accelerator = Accelerator(cpu=True, parallelism_config=config())
        batch = next(iter(accelerator.prepare(DataLoader(samples, batch_size=2))))
        found.append({name: list(batch[name].shape) for name in ("weights", "bias")})
    return found


def test_schema_of_a_configuration(tmp_path: Path, support: Support) -> None:
    path = tmp_path / "schema.yaml"
    path.write_text(
        "parallelism_config:\n  sp_size: 2\n  batch_schema: bias=2, weights=replicate\n"
    )
    given: Any = {"bias": lambda tensor, description, rank: tensor[:, rank], "weights": 1}
    configs: list[Any] = [
        lambda: ulysses_accel.ParallelismConfig.from_yaml(path),
        lambda: ulysses_accel.ParallelismConfig(sp_size=2, batch_schema=given),
    ]
    for from_file, from_code in run_ranks(prepared, 2, configs, init=False):
        assert from_file == {"weights": [2, 16], "bias": [2, 3, 8]}
        assert from_code == {"weights": [2, 8], "bias": [2, 16]}
    code = 'ParallelismConfig(sp_size=2, batch_schema={"my_mask": 2, "my_table": "replicate"})'
    support("batch", "keys of your own, declared by `batch_schema`", "sp", code=code)


def test_schema_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLELISM_CONFIG_BATCH_SCHEMA", "bias=2, table=replicate")
    config = ulysses_accel.ParallelismConfig(sp_size=2)
    assert config.batch_schema == {"bias": 2, "table": "replicate"}
    line = "batch_schema = bias=2, table=replicate (env PARALLELISM_CONFIG_BATCH_SCHEMA)"
    assert line in config.explain().splitlines()
    assert ulysses_accel.ParallelismConfig.from_dict(config.to_dict()) == config
    mine = ulysses_accel.ParallelismConfig(batch_schema={"scores": own_rows})
    assert "batch_schema = scores=own_rows() (constructor)" in mine.explain()
    assert mine.batch_schema["scores"] is own_rows
    with pytest.raises(
        ConfigError,
        match=r"the rule 'own_rows\(\)' for the key 'scores'.* a function only in Python",
    ):
        ulysses_accel.ParallelismConfig.from_dict(mine.to_dict())


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"a": "split"}, "has the rule 'split' for the key 'a'. Use 'shard'"),
        ({"a": True}, "has the rule True"),
        ({"a": 1.5}, "has the rule 1.5"),
        ({1: "shard"}, "has the key 1"),
        ({"a b": "shard"}, "has the key 'a b'"),
        ("a", "has 'a', which is no key=rule"),
        ("a=1, a=2", "has the key 'a' twice"),
        ("a=f()", "a function only in Python"),
        (7, "must map a batch's keys to rules"),
    ],
)
def test_schemas_that_are_none(schema: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ulysses_accel.ParallelismConfig(batch_schema=schema)
    assert str(caught.value).startswith("batch_schema=")
    assert "(from constructor) " in str(caught.value)
    assert message in str(caught.value)
