"""Degrees that are `auto`: chosen from heads and ranks, with the reason, or refused with what is
missing.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from ulysses_accel.config.auto import Cluster, Heads, heads_of
from ulysses_accel.config.parallelism import DeepSpeedSequenceParallelConfig, ParallelismConfig
from ulysses_accel.errors import ConfigError, MeshError

HEADS = LlamaConfig(
    hidden_size=64, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=1, vocab_size=8
)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.startswith("PARALLELISM_CONFIG_") or variable in (
            "WORLD_SIZE",
            "LOCAL_WORLD_SIZE",
            "RANK",
        ):
            monkeypatch.delenv(variable)


def launched(monkeypatch: pytest.MonkeyPatch, ranks: int, per_node: int | None = None) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(per_node or ranks))


def degrees(config: ParallelismConfig) -> tuple[int, int]:
    return config.cp_size, config.sp_size


def test_heads_of_model_config_and_name(tmp_path: Path) -> None:
    expected = (32, 8, 2)
    HEADS.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=8,
            num_attention_heads=32,
            num_key_value_heads=8,
            num_hidden_layers=1,
            vocab_size=8,
        )
    )
    for given in (HEADS, model, str(tmp_path)):
        heads = heads_of(given)
        assert (heads.num_heads, heads.num_key_value_heads, heads.head_dim) == expected
    assert heads_of(SimpleNamespace(num_attention_heads=4, hidden_size=32)) == Heads(
        4, 4, 8, "model=SimpleNamespace"
    )
    with pytest.raises(
        ConfigError, match=r"model=SimpleNamespace has no num_attention_heads.*sp_auto_heads"
    ):
        heads_of(SimpleNamespace())


def test_one_node_of_many_heads_takes_ulysses(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    launched(monkeypatch, 8)
    full = LlamaConfig(hidden_size=64, num_attention_heads=32, num_key_value_heads=32)
    with caplog.at_level(logging.INFO):
        config = ParallelismConfig(sp_size="auto", model=full)
    assert degrees(config) == (1, 8)
    config.fit_world_size(8)
    for text in (config.explain(), caplog.text):
        assert "auto from constructor, 8 ranks and 32/32 heads: Ulysses alone: " in text
    assert len(caplog.records) == 1
    monkeypatch.setenv("RANK", "3")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        ParallelismConfig(sp_size="auto", model=full)
    assert not caplog.records


def test_few_key_heads_or_many_ranks_take_a_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, 4)
    assert (
        degrees(
            ParallelismConfig(
                sp_size="auto", model=LlamaConfig(num_attention_heads=32, num_key_value_heads=1)
            )
        )[0]
        > 1
    )
    launched(monkeypatch, 16)
    config = ParallelismConfig(
        sp_size="auto", model=LlamaConfig(num_attention_heads=4, num_key_value_heads=4)
    )
    assert config.cp_size * config.sp_size == 16
    assert config.sp_size <= 4


def test_more_nodes_put_the_ring_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, 16, 8)
    assert degrees(ParallelismConfig(sp_size="auto", model=HEADS)) == (2, 8)


def test_the_other_axes_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, 16)
    config = ParallelismConfig(
        dp_shard_size=4, sp_size="auto", model=LlamaConfig(num_attention_heads=8)
    )
    assert config.sequence_parallel_size == 4
    assert config.total_size == 16
    with pytest.raises(
        MeshError, match=r"dp_shard_size=3 \(from constructor\) does not divide the 16 processes"
    ):
        ParallelismConfig(dp_shard_size=3, sp_size="auto", model=HEADS)


def test_a_degree_with_a_number_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, 8)
    for cp in (1, 2, 4, 8):
        config = ParallelismConfig(cp_size=cp, sp_size="auto", model=HEADS)
        assert degrees(config) == (cp, 8 // cp)
        assert f"the ranks that cp_size={cp} leaves" in str(config.source_of("sp_size"))
        assert str(config.source_of("cp_size")) == "constructor"
    assert degrees(ParallelismConfig(cp_size="auto", sp_size=2, model=HEADS)) == (4, 2)
    with pytest.raises(
        MeshError, match=r"cp_size=3 \(from constructor\) does not divide the 8 ranks"
    ):
        ParallelismConfig(cp_size=3, sp_size="auto", model=HEADS)
    few = LlamaConfig(num_attention_heads=4, num_key_value_heads=4)
    with pytest.raises(
        ConfigError,
        match=r"cp_size=1 .* sp_size=8: sp_size=8 is more than num_heads=4. Let both be",
    ):
        ParallelismConfig(cp_size=1, sp_size="auto", model=few)


def test_a_fixed_length_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, 4)
    handler = DeepSpeedSequenceParallelConfig(sp_seq_length=12, sp_seq_length_is_variable=False)
    config = ParallelismConfig(
        sp_size="auto",
        model=LlamaConfig(num_attention_heads=32, num_key_value_heads=1),
        sp_handler=handler,
    )
    # A zigzag ring of four would need a multiple of 8.
    assert config.cp_size < 4
    with pytest.raises(ConfigError, match="no split of 4 ranks is legal"):
        ParallelismConfig.for_model(HEADS, sp_seq_length=13, sp_seq_length_is_variable=False)


def test_heads_in_a_file_and_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(monkeypatch, 8)
    file = tmp_path / "x.yaml"
    file.write_text(
        "parallelism_config:\n  parallelism_config_sp_size: auto\n  "
        "parallelism_config_sp_auto_heads: 64/64\n"
    )
    config = ParallelismConfig.from_yaml(file)
    assert degrees(config) == (1, 8)
    assert str(config.source_of("sp_size")).startswith(
        f"auto from {file}:2 (parallelism_config_sp_size), 8 ranks"
    )
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "auto")
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_AUTO_HEADS", "64/64")
    assert degrees(ParallelismConfig()) == (1, 8)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError,
        match=r"sp_size=auto \(from constructor\) needs the model's heads.*sp_auto_heads",
    ):
        ParallelismConfig(sp_size="auto")
    with pytest.raises(ConfigError, match=r"needs the number of processes.*--num_processes"):
        ParallelismConfig.for_model(HEADS, cluster=Cluster(None))
    # Without a launcher there is one process.
    assert degrees(ParallelismConfig(sp_size="auto", model=HEADS)) == (1, 1)
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE='many' \(from env WORLD_SIZE\)"):
        ParallelismConfig(sp_size="auto", model=HEADS)


def test_for_model_takes_cluster_and_settings() -> None:
    slow = ParallelismConfig.for_model(
        HEADS, cluster=Cluster(16, 8, bandwidth_between=1.0), cp_layout="contiguous"
    )
    assert (degrees(slow), slow.cp_handler.layout) == ((2, 8), "contiguous")
    level = ParallelismConfig.for_model(
        LlamaConfig(num_attention_heads=64, num_key_value_heads=64),
        cluster=Cluster(16, 8, 1.0, 1.0),
    )
    assert degrees(level) == (1, 16)


def test_tensor_parallel_ranks_must_divide_all_heads() -> None:
    with pytest.raises(
        ConfigError,
        match=r"tp_size=16 \(from constructor\) does not divide 32 query and 8 key/value",
    ):
        ParallelismConfig.for_model(HEADS, cluster=Cluster(32), tp_size=16)
