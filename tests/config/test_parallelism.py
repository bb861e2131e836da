"""ParallelismConfig and its handler: values, sources, names, and what stock accelerate sees of
them.
"""

from __future__ import annotations

import copy
import json
import sys
import types
from pathlib import Path
from typing import Any

import accelerate
import pytest
from accelerate.utils import DeepSpeedSequenceParallelConfig as StockHandler
from accelerate.utils import TorchContextParallelConfig, TorchTensorParallelConfig

from ulysses_accel.config.parallelism import (
    DeepSpeedSequenceParallelConfig,
    ParallelismConfig,
    RingAttentionConfig,
)
from ulysses_accel.errors import ConfigError, MeshError


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    file = tmp_path / "x.yaml"
    file.write_text(
        "distributed_type: FSDP\nnum_processes: 8\nparallelism_config:\n  sp_size: 4\n  "
        "dp_shard_size: 2\n"
        "  sp_attn_implementation: eager\nmemory: {tiled: true}\n"
    )
    return file


def test_defaults_work() -> None:
    config = ParallelismConfig(sp_size=2)
    assert isinstance(config, accelerate.ParallelismConfig)
    assert isinstance(config.sp_handler, StockHandler)
    assert config.sp_handler.sp_attn_implementation == "sdpa"
    assert config.sp_handler.sp_seq_length_is_variable is True
    assert config.sizes == {"dp_replicate": 1, "dp_shard": 1, "cp": 1, "sp": 2, "tp": 1}
    assert list(config.sizes) == ["dp_replicate", "dp_shard", "cp", "sp", "tp"]


@pytest.mark.parametrize("backend", [None, "deepspeed", "ulysses", "DeepSpeed"])
def test_no_stock_branch_for_deepspeed_is_ever_taken(backend: str | None) -> None:
    config = ParallelismConfig(sp_size=2, sp_backend=backend)
    assert config.sp_backend == "ulysses"
    assert config.sp_enabled


def test_no_stock_branch_for_context_parallelism_is_ever_taken() -> None:
    config = ParallelismConfig(cp_size=2, sp_size=2, cp_backend="torch")
    assert (config.cp_enabled, config.cp_backend, config.cp_size) == (False, "ring", 2)
    assert config.cp_handler == RingAttentionConfig(
        layout="zigzag", exchange="p2p", head_stride=None
    )
    assert config.sequence_parallel_size == 4


def test_from_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "2")
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SEQ_LENGTH", "64")
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_BACKEND", "deepspeed")
    config = ParallelismConfig(dp_shard_size=2)
    assert (
        config.sp_size,
        config.sp_handler.sp_seq_length,
        config.sp_handler.sp_seq_length_is_variable,
    ) == (
        2,
        64,
        True,
    )
    assert (
        'sp_backend = ulysses (from "deepspeed", env PARALLELISM_CONFIG_SP_BACKEND)'
        in config.explain()
    )
    assert "dp_shard_size = 2 (constructor)" in config.explain()
    assert "tp_size = 1 (default)" in config.explain()
    assert ParallelismConfig(sp_size=1).sp_size == 1
    monkeypatch.setenv("PARALLELISM_CONFIG_SPSIZE", "2")
    with pytest.raises(ConfigError, match="Did you mean 'PARALLELISM_CONFIG_SP_SIZE'"):
        ParallelismConfig()


def test_from_yaml(yaml_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ParallelismConfig.from_yaml(yaml_file)
    assert (config.sp_size, config.dp_shard_size, config.sp_handler.sp_attn_implementation) == (
        4,
        2,
        "eager",
    )
    assert str(config.source_of("sp_size")) == f"{yaml_file}:4 (sp_size)"
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "2")
    handler = DeepSpeedSequenceParallelConfig(sp_seq_length=64)
    config = ParallelismConfig.from_yaml(yaml_file, dp_shard_size=1, sp_handler=handler)
    assert (config.sp_size, config.dp_shard_size) == (2, 1)
    assert (config.sp_handler.sp_seq_length, config.sp_handler.sp_attn_implementation) == (
        64,
        "eager",
    )
    assert (
        ParallelismConfig.from_yaml(
            yaml_file, sp_attn_implementation="sdpa"
        ).sp_handler.sp_attn_implementation
        == "sdpa"
    )
    with pytest.raises(ConfigError, match="Did you mean 'sp_size'"):
        ParallelismConfig.from_yaml(yaml_file, spsize=2)


@pytest.mark.parametrize(
    "name", ["sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "eager"]
)
def test_attention_cores(name: str) -> None:
    assert (
        DeepSpeedSequenceParallelConfig(sp_attn_implementation=name).sp_attn_implementation == name
    )


def test_hub_kernels_only_from_the_trusted_organization() -> None:
    for name in ("kernels-community/flash-attn2", "kernels-community/vllm-flash-attn3@v1:entry"):
        assert (
            DeepSpeedSequenceParallelConfig(sp_attn_implementation=name).sp_attn_implementation
            == name
        )
    for name in ("evil/flash-attn2", "kernels-community/other", "a/kernels-community/flash-attn"):
        with pytest.raises(ConfigError, match="not a trusted hub kernel"):
            DeepSpeedSequenceParallelConfig(sp_attn_implementation=name)


def test_a_fixed_length_must_be_given_and_divide() -> None:
    with pytest.raises(ConfigError, match="needs sp_seq_length"):
        DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=False)
    handler = DeepSpeedSequenceParallelConfig(sp_seq_length=15, sp_seq_length_is_variable=False)
    with pytest.raises(ConfigError, match=r"sp_seq_length=15 .* 2 × 2 = 4 .* Use 12 or 16 tokens"):
        ParallelismConfig(cp_size=2, sp_size=2, sp_handler=handler)
    zigzag = DeepSpeedSequenceParallelConfig(sp_seq_length=6, sp_seq_length_is_variable=False)
    with pytest.raises(
        ConfigError, match=r"in zigzag layout, so must be a multiple of 4\. Use 4 or 8 tokens"
    ):
        ParallelismConfig(cp_size=2, sp_handler=zigzag)
    striped = ParallelismConfig(
        cp_size=2, sp_handler=zigzag, cp_handler=RingAttentionConfig(layout="striped")
    )
    assert striped.sp_handler.sp_seq_length == 6
    assert ParallelismConfig(sp_size=5, sp_handler=handler).sp_handler == handler
    variable = DeepSpeedSequenceParallelConfig(sp_seq_length=15)
    assert ParallelismConfig(sp_size=2, sp_handler=variable).sp_handler.sp_seq_length == 15


def test_stock_handlers_are_taken_and_wrong_ones_refused() -> None:
    stock = StockHandler(sp_seq_length=64, sp_seq_length_is_variable=False)
    config = ParallelismConfig(sp_size=2, sp_handler=stock)
    assert type(config.sp_handler) is DeepSpeedSequenceParallelConfig
    assert config.sp_handler.sp_attn_implementation == "sdpa"
    assert config.sp_handler.sp_seq_length == 64
    for name in ("sp_handler", "cp_handler", "tp_handler"):
        with pytest.raises(ConfigError, match=f"{name} .* is a dict, not a"):
            ParallelismConfig(**{name: {}})


@pytest.mark.parametrize(
    ("strategy", "exchange"), [("allgather", "all_gather"), ("alltoall", "p2p")]
)
def test_stock_ring_handlers_are_taken(strategy: str, exchange: str) -> None:
    handler = TorchContextParallelConfig(cp_comm_strategy=strategy)
    config = ParallelismConfig(cp_size=2, cp_handler=handler)
    assert (config.cp_handler.exchange, config.cp_handler.cp_comm_strategy) == (exchange, strategy)
    assert f"cp_comm_strategy = {strategy} (constructor)" in config.explain()
    assert f'cp_exchange = {exchange} (from "{strategy}", constructor)' in config.explain()


def test_the_ring_is_configured_in_every_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = RingAttentionConfig(layout="striped", exchange="all_gather", head_stride=2)
    config = ParallelismConfig(cp_size=2, cp_handler=handler)
    assert config.cp_handler == handler
    assert "cp_head_stride = 2 (constructor)" in config.explain()
    file = tmp_path / "x.yaml"
    file.write_text(
        "parallelism_config:\n  cp_layout: contiguous\n  cp_exchange: all_gather\n  "
        "cp_head_stride: 4\n"
    )
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_LAYOUT", "striped")
    config = ParallelismConfig.from_yaml(file, cp_size=2)
    assert config.cp_handler == RingAttentionConfig(
        layout="striped", exchange="all_gather", head_stride=4
    )
    assert str(config.source_of("cp_layout")) == "env PARALLELISM_CONFIG_CP_LAYOUT"
    assert str(config.source_of("cp_head_stride")) == f"{file}:4 (cp_head_stride)"
    assert ParallelismConfig.from_dict(json.loads(config.to_json())) == config
    config.cp_handler.layout = "zigzag"
    assert "cp_layout = zigzag (assigned after construction)" in config.explain()
    with pytest.raises(ConfigError, match=r"cp_head_stride=2 .*Use exchange='all_gather'"):
        RingAttentionConfig(head_stride=2)
    with pytest.raises(
        ConfigError, match=r"cp_layout='spiral' \(from constructor\) must be one of zigzag"
    ):
        RingAttentionConfig(layout="spiral")


def test_two_names_of_the_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_COMM_STRATEGY", "allgather")
    assert ParallelismConfig(cp_size=2).cp_handler.exchange == "all_gather"
    # The stronger layer's word holds, whichever name it uses.
    assert (
        ParallelismConfig(
            cp_size=2, cp_handler=RingAttentionConfig(exchange="p2p")
        ).cp_handler.exchange
        == "p2p"
    )
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_EXCHANGE", "p2p")
    with pytest.raises(
        ConfigError,
        match=r"cp_exchange=p2p \(from env .*contradict each other.*Keep cp_exchange alone",
    ):
        ParallelismConfig(cp_size=2)
    monkeypatch.delenv("PARALLELISM_CONFIG_CP_EXCHANGE")
    # accelerate launch exports its own default, which nobody chose.
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    file = tmp_path / "x.yaml"
    file.write_text("parallelism_config: {cp_exchange: p2p}\n")
    config = ParallelismConfig.from_yaml(file, cp_size=2)
    assert (config.cp_handler.exchange, config.source_of("cp_exchange").kind) == ("p2p", "yaml")


def test_head_chunks_are_a_setting() -> None:
    config = ParallelismConfig(
        sp_size=2, sp_handler=DeepSpeedSequenceParallelConfig(sp_head_chunks=4)
    )
    assert config.sp_handler.sp_head_chunks == 4
    assert ParallelismConfig.from_dict(config.to_dict()) == config
    with pytest.raises(
        ConfigError, match=r"sp_head_chunks=0 \(from constructor\) must be .*at least 1"
    ):
        DeepSpeedSequenceParallelConfig(sp_head_chunks=0)


@pytest.mark.parametrize("value", [0, -1, 2.0, "two", True, [2]])
def test_illegal_sizes_name_value_and_source(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"sp_size=.* \(from constructor\) must be .*Use"):
        ParallelismConfig(sp_size=value)


def test_mesh_names() -> None:
    config = ParallelismConfig(
        dp_replicate_size=2, dp_shard_size=2, cp_size=2, sp_size=2, tp_size=2
    )
    assert config.dp_dim_names == ["dp_replicate", "dp_shard"]
    assert config.non_dp_dim_names == ["cp", "sp", "tp"]
    assert config.dp_shard_cp_dim_names == ["dp_shard", "cp", "sp"]
    assert config.dp_cp_dim_names == ["dp_replicate", "dp_shard", "cp", "sp"]
    assert config.fsdp_dim_names == ["dp_replicate", "dp_shard_cp"]
    assert config.active_mesh_dims == ["dp_replicate", "dp_shard", "cp", "sp", "tp"]
    assert config._get_mesh() == (("dp_replicate", "dp_shard", "cp", "sp", "tp"), (2, 2, 2, 2, 2))
    assert (config.total_size, config.data_parallel_size, config.non_data_parallel_size) == (
        32,
        4,
        8,
    )
    assert isinstance(config.tp_handler, TorchTensorParallelConfig)
    assert ParallelismConfig(dp_replicate_size=2, sp_size=2).fsdp_dim_names == [
        "dp_replicate",
        "dp_shard_cp",
    ]
    assert ParallelismConfig(dp_replicate_size=2).fsdp_dim_names == ["dp_replicate"]
    assert ParallelismConfig().fsdp_dim_names == []


def test_fit_derives_data_parallelism_where_nobody_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ParallelismConfig(sp_size=2)
    config.fit_world_size(8)
    assert (config.dp_replicate_size, config.total_size) == (4, 8)
    assert "dp_replicate_size = 4 (derived: 8 processes / 2" in config.explain()
    config.fit_world_size(8)
    sharded = ParallelismConfig(sp_size=2)
    sharded.fit_world_size(8, axis="dp_shard")
    assert (sharded.dp_replicate_size, sharded.dp_shard_size) == (1, 4)
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "1")
    with pytest.raises(MeshError):
        ParallelismConfig(sp_size=2).fit_world_size(8)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    launched = ParallelismConfig(sp_size=2)
    launched.fit_world_size(8)
    assert launched.dp_replicate_size == 4


def test_a_wrong_product_names_sources_and_legal_sizes() -> None:
    with pytest.raises(MeshError) as caught:
        ParallelismConfig(dp_shard_size=2, sp_size=3).fit_world_size(8)
    message = str(caught.value)
    for part in (
        "= 1 × 2 × 1 × 3 × 1 = 6",
        "is 8",
        "sp_size=3 (constructor)",
        "tp_size=1 (default)",
        "dp_shard_size=2, sp_size=4",
    ):
        assert part in message


def test_stock_and_trainer_may_change_sizes_later() -> None:
    config = ParallelismConfig(sp_size=2)
    config._set_size("dp_replicate", 4)
    config.tp_size = 2
    assert config._sizes["dp_replicate"] == 4
    assert config.total_size == 16
    assert "tp_size = 2 (assigned after construction)" in config.explain()


def test_round_trip_and_repr() -> None:
    handler = DeepSpeedSequenceParallelConfig(
        sp_seq_length=64, sp_seq_length_is_variable=False, sp_attn_implementation="eager"
    )
    config = ParallelismConfig(sp_size=2, cp_size=2, tp_size=2, sp_handler=handler)
    again = ParallelismConfig.from_dict(json.loads(config.to_json()))
    assert again == config
    assert again.to_dict() == config.to_dict()
    assert str(again.source_of("sp_seq_length")) == "from_dict"
    for name in (*config.to_dict(), "sp_seq_length=64", "total_size=8"):
        assert name in repr(config)
    with pytest.raises(ConfigError, match="Did you mean 'sp_size'"):
        ParallelismConfig.from_dict({"spsize": 2})
    with pytest.raises(ConfigError, match="unknown key 'x' in sp_handler"):
        ParallelismConfig.from_dict({"sp_handler": {"x": 2}})
    with pytest.raises(ConfigError, match="not a mapping"):
        ParallelismConfig.from_dict({"sp_handler": 3})


def test_deepcopy_shares_the_mesh() -> None:
    config = ParallelismConfig(sp_size=2)
    config.device_mesh = object()
    other = copy.deepcopy(config)
    assert other == config
    assert other.device_mesh is config.device_mesh
    other.sp_handler.sp_seq_length = 8
    other.fit_world_size(4)
    assert (config.sp_handler.sp_seq_length, config.total_size) == (None, 2)
    assert config.source_of("dp_replicate_size").kind == "default"


def test_the_attach_point_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []
    mesh = types.SimpleNamespace(device_type="cpu")
    engine = types.ModuleType("ulysses_accel.integrations.attach")
    engine.build_mesh = lambda config, device: calls.append((config.sp_size, device)) or mesh  # type: ignore[attr-defined]
    engine.attach = lambda config, accelerator: calls.append((config.sp_size, accelerator))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ulysses_accel.integrations.attach", engine)
    config = ParallelismConfig(sp_size=2)
    with pytest.raises(ConfigError, match="not built yet"):
        config.get_device_mesh()
    assert config.get_device_mesh("cpu") is mesh
    assert config.get_device_mesh() is mesh
    with pytest.raises(ConfigError, match="built for device type 'cpu'"):
        config.get_device_mesh("cuda")
    config._validate_accelerator("accelerator")
    assert calls == [(2, "cpu"), (2, "accelerator")]
