"""MemoryConfig: every way to set a value, which one wins, and what contradicts itself."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ulysses_accel
from ulysses_accel.config.memory import ALST, MemoryConfig
from ulysses_accel.config.parallelism import ParallelismConfig
from ulysses_accel.config.settings import FIELDS, MEMORY_FIELDS
from ulysses_accel.config.sources import (
    command_line_layer,
    environment_layer,
    export_environment,
    resolve,
    yaml_layer,
)
from ulysses_accel.config.yaml_file import parse_yaml_layer
from ulysses_accel.errors import ConfigError

EVERYTHING: dict[str, Any] = {
    "tiled_mlp": True,
    "tiled_mlp_bytes": 1 << 26,
    "tiled_norm": True,
    "tiled_loss": True,
    "tiled_loss_tokens": 512,
    "use_liger_loss": True,
    "checkpoint": True,
    "checkpoint_every_n_layers": 2,
    "checkpoint_offload": True,
    "checkpoint_keep_last": 0,
    "save_attention": "host",
    "save_exchange": True,
    "save_attention_bytes": 1 << 30,
    "expandable_segments": True,
    "bf16_gradient_reduction": True,
}
SECTION = "memory_config:\n" + "".join(f"  {name}: {value}\n" for name, value in EVERYTHING.items())


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.startswith(
            ("PARALLELISM_CONFIG_", "MEMORY_CONFIG_", "ACCELERATE_", "ULYSSES_")
        ):
            monkeypatch.delenv(variable)


def test_the_fields_and_the_settings_are_the_same() -> None:
    assert [field.name for field in fields(MemoryConfig)] == list(MEMORY_FIELDS) == list(EVERYTHING)
    assert ulysses_accel.MemoryConfig is MemoryConfig


def test_it_needs_neither_torch_nor_accelerate() -> None:
    code = "import sys, ulysses_accel.config.memory; sys.exit(any(m in sys.modules for m in ('torch', 'accelerate')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_by_default_nothing_is_on() -> None:
    config = MemoryConfig()
    assert config.to_dict() == {name: field.default for name, field in MEMORY_FIELDS.items()}
    assert not config.is_active
    assert (
        config.checkpoint_every_n_layers,
        config.checkpoint_keep_last,
        config.save_attention,
    ) == (1, 1, "no")
    assert "tiled_mlp = False (default)" in config.explain()


@pytest.mark.parametrize(
    "name", [name for name, value in EVERYTHING.items() if value is True and name in ALST]
)
def test_each_feature_makes_it_active(name: str) -> None:
    needed: dict[str, Any] = {"checkpoint": True} if name == "checkpoint_offload" else {}
    assert MemoryConfig(**{**needed, name: True}).is_active


def test_by_constructor() -> None:
    config = MemoryConfig(**EVERYTHING)
    assert config.to_dict() == EVERYTHING
    assert {str(setting.source) for setting in config.settings.values()} == {"constructor"}


def test_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in EVERYTHING.items():
        monkeypatch.setenv(f"MEMORY_CONFIG_{name.upper()}", str(value))
    assert MemoryConfig().to_dict() == EVERYTHING
    assert str(MemoryConfig().source_of("save_attention")) == "env MEMORY_CONFIG_SAVE_ATTENTION"
    assert MemoryConfig(tiled_norm=False).tiled_norm is False
    assert ParallelismConfig(sp_size=2).memory_config == MemoryConfig()


@pytest.mark.parametrize("prefix", ["", "memory_config_"])
def test_by_yaml(tmp_path: Path, prefix: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(SECTION.replace("\n  ", f"\n  {prefix}"))
    config = MemoryConfig.from_yaml(file, tiled_norm=False)
    assert config.to_dict() == {**EVERYTHING, "tiled_norm": False}
    assert str(config.source_of("tiled_mlp")) == f"{file}:2 ({prefix}tiled_mlp)"
    assert ParallelismConfig.from_yaml(file, tiled_norm=False).memory_config == config


def test_by_yaml_in_the_section_that_accelerate_knows(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("parallelism_config:\n  sp_size: 2\n  memory_config_tiled_mlp: true\n")
    config = ParallelismConfig.from_yaml(file)
    assert config.memory_config == MemoryConfig.from_yaml(file) == MemoryConfig(tiled_mlp=True)
    assert str(config.source_of("tiled_mlp")) == f"{file}:3 (memory_config_tiled_mlp)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "memory_config: {tiled_mpl: true}",
            r"x.yaml:1: unknown key 'tiled_mpl' .*Did you mean 'tiled_mlp'",
        ),
        (
            "memory_config: {sp_size: 2}",
            r"unknown key 'sp_size' .*belongs below 'parallelism_config:'",
        ),
        (
            "parallelism_config: {tiled_mlp: true}",
            r"unknown key 'tiled_mlp' .*belongs below 'memory_config:'",
        ),
        (
            "parallelism_config: {memory_config_tiled: 1}",
            r"unknown key 'memory_config_tiled'.*Did you mean 'tiled_",
        ),
        ("memory_config: {tiled_mlp: [1]}", "must be one value"),
        ("memory_config: {tiled_mlp: 1, memory_config_tiled_mlp: 1}", "tiled_mlp is set twice"),
        (
            "parallelism_config: {memory_config_tiled_mlp: 1}\nmemory_config: {tiled_mlp: 1}",
            "tiled_mlp is set twice",
        ),
        ("memory_config: {}\nmemory_config: {}", "second section 'memory_config:'"),
        ("memory_config: 3", "must hold `key: value` lines, such as tiled_mlp: true"),
        ("memory_confg: {tiled_mlp: true}", "Did you mean 'memory_config:'"),
        (
            "memory_config_tiled_mlp: true",
            "outside of the section. Indent it below 'memory_config:'",
        ),
        (
            "memory_config: {tiled_mlp: perhaps}",
            r"tiled_mlp='perhaps' \(from x.yaml:1 \(tiled_mlp\)\) must be true",
        ),
    ],
)
def test_illegal_yaml(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_yaml_layer(text, "x.yaml")


def test_other_programs_words_are_left_alone() -> None:
    assert (
        parse_yaml_layer("checkpoint: out/\nmemory: {tiled: true}\nsave_attention: 3\n", "x.yaml")
        == {}
    )


def test_precedence(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    names = ("expandable_segments", "tiled_loss", "tiled_norm", "tiled_mlp")
    file.write_text("memory_config:\n" + "".join(f"  {name}: true\n" for name in names[1:]))
    layers = [
        yaml_layer(file),
        environment_layer({"MEMORY_CONFIG_TILED_NORM": "false", "MEMORY_CONFIG_TILED_MLP": "no"}),
        command_line_layer({"tiled_mlp": "yes"}),
    ]
    config = ParallelismConfig.from_layers(*layers)
    sources = [str(config.source_of(name)) for name in names]
    expected = ["default", f"{file}:2 (tiled_loss)", "env MEMORY_CONFIG_TILED_NORM"]
    assert sources == [*expected, "command line --memory-config-tiled-mlp"]
    memory = config.memory_config
    assert memory is not None
    assert [getattr(memory, name) for name in names] == [False, True, False, True]
    again = ParallelismConfig.from_layers(*layers, memory_config=MemoryConfig(tiled_mlp=False))
    assert again.memory_config is not None
    assert (again.memory_config.tiled_mlp, again.memory_config.tiled_loss) == (False, True)
    assert str(again.source_of("tiled_mlp")) == "constructor"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"use_liger_loss": True},
            r"use_liger_loss=True \(from constructor\) .*tiled_loss=False \(default\)",
        ),
        ({"tiled_loss_tokens": 5}, "tiled_loss=False"),
        ({"tiled_mlp_bytes": 5}, "tiled_mlp=False"),
        (
            {"checkpoint_offload": True},
            r"checkpoint=False \(default\)\. Use checkpoint=True, or leave checkpoint_off",
        ),
        ({"checkpoint_every_n_layers": 2}, "checkpoint=False"),
        ({"checkpoint_keep_last": 0, "checkpoint": False}, r"checkpoint=False \(constructor\)"),
        ({"save_attention": "host"}, "checkpoint=False"),
        (
            {"save_exchange": True, "checkpoint": True},
            "save_attention=no .*Use save_attention='device' or 'host'",
        ),
        ({"save_attention_bytes": 9, "checkpoint": True}, "save_attention=no"),
        ({"save_exchange": True, "save_attention": "device"}, "checkpoint=False"),
    ],
)
def test_contradictions(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MemoryConfig(**values)


def test_a_contradiction_names_both_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("memory_config:\n  checkpoint: true\n  checkpoint_offload: true\n")
    monkeypatch.setenv("MEMORY_CONFIG_CHECKPOINT", "false")
    with pytest.raises(
        ConfigError, match=r"x.yaml:3 \(checkpoint_offload\)\) .*\(env MEMORY_CONFIG_CHECKPOINT\)"
    ):
        ParallelismConfig.from_yaml(file)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tiled_mlp", 2, "must be true or false"),
        ("tiled_mlp_bytes", 0, "whole number of bytes from 1"),
        ("tiled_mlp_bytes", 1.5, "whole number of bytes"),
        ("tiled_loss_tokens", True, "whole number of tokens"),
        ("checkpoint_every_n_layers", 0, "whole number of layers from 1"),
        ("checkpoint_keep_last", -1, "whole number of layers from 0"),
        ("save_attention", "disk", "must be one of no, device, host"),
        ("save_attention_bytes", 2**60 + 1, "whole number of bytes"),
    ],
)
def test_illegal_values(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}=.* \(from constructor\) .*{message}"):
        MemoryConfig(**{name: value})


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'MEMORY_CONFIG_TILED_MLP'"):
        environment_layer({"MEMORY_CONFIG_TILED_MPL": "1"})
    calls: list[Callable[[], object]] = [
        lambda: MemoryConfig.alst(tiled_mpl=True),
        lambda: MemoryConfig.from_dict({"tiled_mpl": True}),
        lambda: MemoryConfig().source_of("tiled_mpl"),
        lambda: ParallelismConfig.from_dict({"memory_config": {"tiled_mpl": True}}),
        lambda: ParallelismConfig().source_of("tiled_mpl"),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match="Did you mean 'tiled_mlp'"):
            call()
    with pytest.raises(ConfigError, match="unknown setting 'sp_size'"):
        MemoryConfig.alst(sp_size=2)
    with pytest.raises(ConfigError, match=r"memory_config .* is a dict, not a MemoryConfig"):
        ParallelismConfig(memory_config={})  # type: ignore[arg-type]


def test_alst() -> None:
    config = MemoryConfig.alst()
    assert {name for name, value in config.to_dict().items() if value is True} == set(ALST)
    assert str(config.source_of("tiled_mlp")) == "MemoryConfig.alst()"
    assert MemoryConfig.alst(tiled_mlp_bytes=7, tiled_norm=False).to_dict() == {
        **config.to_dict(),
        "tiled_mlp_bytes": 7,
        "tiled_norm": False,
    }
    # Offloading goes with the checkpoints whose inputs it puts away; what the user asks for does
    # not go silently.
    assert MemoryConfig.alst(checkpoint=False).checkpoint_offload is False
    with pytest.raises(ConfigError, match="checkpoint_offload=True"):
        MemoryConfig.alst(checkpoint=False, checkpoint_offload=True)


def test_alst_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMORY_CONFIG_TILED_MLP", "false")
    monkeypatch.setenv("MEMORY_CONFIG_TILED_LOSS_TOKENS", "64")
    config = MemoryConfig.alst()
    assert (config.tiled_mlp, config.tiled_loss_tokens) == (True, 64)


def test_a_parallelism_config_carries_it() -> None:
    assert ParallelismConfig(sp_size=2).memory_config is None
    memory = MemoryConfig.alst(save_attention="host")
    config = ParallelismConfig(sp_size=2, memory_config=memory)
    assert config.memory_config == memory
    assert "save_attention = host (constructor)" in config.explain()
    assert "tiled_mlp = True (MemoryConfig.alst())" in config.explain()
    assert "memory_config=MemoryConfig(tiled_mlp=True" in repr(config)
    twin = copy.deepcopy(config)
    assert (twin, twin.memory_config is config.memory_config) == (config, False)
    assert copy.copy(config) == config
    assert (
        ParallelismConfig.for_model(None, sp_size=2, memory_config=memory).memory_config == memory
    )
    inactive = ParallelismConfig(memory_config=MemoryConfig())
    assert inactive.memory_config == MemoryConfig()
    assert ParallelismConfig.from_dict(inactive.to_dict()) == inactive


def test_what_is_assigned_later_is_said() -> None:
    config = ParallelismConfig(memory_config=MemoryConfig(tiled_mlp=True))
    assert config.memory_config is not None
    config.memory_config.tiled_mlp_bytes = 4096
    assert "tiled_mlp_bytes = 4096 (assigned after construction)" in config.explain()
    assert config.memory_config.source_of("tiled_mlp_bytes").kind == "assigned"
    assert config.source_of("tiled_mlp").kind == "constructor"
    config.memory_config = None
    assert "tiled_mlp = False (assigned after construction)" in config.explain()


def test_stock_accelerate_takes_a_config_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = ParallelismConfig(memory_config=MemoryConfig(tiled_loss=True))
    assert Accelerator(parallelism_config=config).parallelism_config is config
    assert json.loads(config.to_json())["memory_config"]["tiled_loss"] is True


FAST = settings(max_examples=100, deadline=None)
SWITCHES = {
    name: st.booleans() for name in ("tiled_norm", "expandable_segments", "bf16_gradient_reduction")
}
LIMITS = st.none() | st.integers(1, 2**60)
ON = st.just(True)
LEGAL = st.one_of(
    st.fixed_dictionaries({}, optional=SWITCHES),
    st.fixed_dictionaries({"tiled_mlp": ON, "tiled_mlp_bytes": LIMITS}, optional=SWITCHES),
    st.fixed_dictionaries(
        {"tiled_loss": ON, "tiled_loss_tokens": LIMITS, "use_liger_loss": st.booleans()}
    ),
    st.fixed_dictionaries(
        {"checkpoint": ON, "save_attention": st.sampled_from(["device", "host"])},
        optional={
            **SWITCHES,
            "checkpoint_every_n_layers": st.integers(1, 99),
            "checkpoint_keep_last": st.integers(0, 99),
            "checkpoint_offload": st.booleans(),
            "save_exchange": st.booleans(),
            "save_attention_bytes": LIMITS,
        },
    ),
)


@FAST
@given(LEGAL)
def test_dict_and_json_round_trip(values: dict[str, Any]) -> None:
    config = ParallelismConfig(sp_size=2, memory_config=MemoryConfig(**values))
    assert config.memory_config is not None
    assert MemoryConfig.from_dict(config.memory_config.to_dict()) == config.memory_config
    assert ParallelismConfig.from_dict(json.loads(config.to_json())) == config


@FAST
@given(LEGAL)
def test_exported_settings_come_back_with_their_sources(values: dict[str, Any]) -> None:
    config = ParallelismConfig(memory_config=MemoryConfig(**values))
    again = resolve(environment_layer(export_environment(config.settings)))
    for name in MEMORY_FIELDS:
        assert (again[name].value, str(again[name].source)) == (
            config.settings[name].value,
            str(config.settings[name].source),
        )


@FAST
@given(
    st.dictionaries(
        st.sampled_from(sorted(MEMORY_FIELDS)),
        st.sampled_from(["true", "0", "1", "no", "host", "-"]),
    )
)
def test_any_environment_gives_a_config_or_names_a_variable(values: dict[str, str]) -> None:
    variables = {FIELDS[name].variable: value for name, value in values.items()}
    try:
        outcome = ParallelismConfig.from_layers(environment_layer(variables)).explain()
    except ConfigError as error:
        outcome = str(error)
        variables = {
            variable: value for variable, value in variables.items() if f"env {variable}" in outcome
        }
        assert len(variables) in (1, 2)
    assert all(f"env {variable}" in outcome for variable in variables)
