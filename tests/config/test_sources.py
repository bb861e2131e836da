"""Precedence, provenance and the reading of YAML and environment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ulysses_accel.config.settings import FIELDS, Setting, Source
from ulysses_accel.config.sources import (
    SOURCES_VARIABLE,
    argument_layer,
    command_line_layer,
    environment_layer,
    export_environment,
    resolve,
    yaml_layer,
)
from ulysses_accel.config.yaml_file import MAX_BYTES, parse_yaml_layer
from ulysses_accel.errors import ConfigError


def test_resolving_needs_neither_torch_nor_accelerate() -> None:
    code = "import sys, ulysses_accel.config.sources; sys.exit(any(m in sys.modules for m in ('torch', 'accelerate')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_each_layer_beats_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        "distributed_type: FSDP\nparallelism_config:\n  sp_size: 2\n  parallelism_config_cp_size: "
        "2\n  tp_size: 2\n"
    )
    layers = [
        yaml_layer(file),
        environment_layer({"PARALLELISM_CONFIG_SP_SIZE": "4", "PARALLELISM_CONFIG_CP_SIZE": "4"}),
        command_line_layer({"sp_size": "8"}),
    ]
    settled = resolve(*layers)
    assert [settled[f"{axis}_size"].value for axis in ("dp_shard", "tp", "cp", "sp")] == [
        1,
        2,
        4,
        8,
    ]
    assert str(settled["dp_shard_size"].source) == "default"
    assert str(settled["tp_size"].source) == f"{file}:5 (tp_size)"
    assert str(settled["cp_size"].source) == "env PARALLELISM_CONFIG_CP_SIZE"
    assert str(settled["sp_size"].source) == "command line --parallelism-config-sp-size"
    assert (
        resolve(*layers, argument_layer({"sp_size": 16}, Source("constructor")))["sp_size"].value
        == 16
    )


@pytest.mark.parametrize("word", ["true", "Yes", "ON", "1", " TRUE "])
def test_words_for_true(word: str) -> None:
    layer = environment_layer({"PARALLELISM_CONFIG_SP_SEQ_LENGTH_IS_VARIABLE": word})
    assert layer["sp_seq_length_is_variable"].value is True


@pytest.mark.parametrize("word", ["false", "No", "OFF", "0", "False"])
def test_words_for_false(word: str) -> None:
    for text in (
        f"parallelism_config: {{sp_seq_length_is_variable: {word}}}",
        f"parallelism_config:\n  sp_seq_length_is_variable: '{word}'",
    ):
        assert parse_yaml_layer(text, "x.yaml")["sp_seq_length_is_variable"].value is False


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        (
            "PARALLELISM_CONFIG_SP_SIZE",
            "0",
            r"sp_size=0 \(from env PARALLELISM_CONFIG_SP_SIZE\) must be at least 1",
        ),
        ("PARALLELISM_CONFIG_SP_SIZE", "two", r"sp_size='two' .* whole number"),
        ("PARALLELISM_CONFIG_SP_SIZE", "2.0", "whole number"),
        ("PARALLELISM_CONFIG_SP_SIZE", "010", "whole number"),
        ("PARALLELISM_CONFIG_SP_SIZE", "9" * 5000, "whole number"),
        ("PARALLELISM_CONFIG_SP_SIZE", "99999999999", "at most"),
        ("PARALLELISM_CONFIG_SP_SEQ_LENGTH", "-5", "whole number of tokens"),
        ("PARALLELISM_CONFIG_SP_SEQ_LENGTH_IS_VARIABLE", "maybe", "must be true or false"),
        ("PARALLELISM_CONFIG_SP_BACKEND", "nccl", "ulysses, deepspeed"),
        ("PARALLELISM_CONFIG_CP_BACKEND", "deepspeed", "ring, torch"),
        ("PARALLELISM_CONFIG_CP_LAYOUT", "spiral", "zigzag, contiguous, striped"),
        ("PARALLELISM_CONFIG_CP_EXCHANGE", "allgather", "p2p, all_gather"),
        ("PARALLELISM_CONFIG_CP_COMM_STRATEGY", "all_gather", "alltoall, allgather"),
        ("PARALLELISM_CONFIG_CP_HEAD_STRIDE", "0", "at least 1"),
        ("PARALLELISM_CONFIG_SP_HEAD_CHUNKS", "many", "at least 1"),
        ("PARALLELISM_CONFIG_SP_AUTO_HEADS", "32:8", "Write them as '32/8'"),
        ("PARALLELISM_CONFIG_SP_AUTO_HEADS", "32/5", "do not divide 32 query heads"),
        ("PARALLELISM_CONFIG_DP_SHARD_SIZE", "auto", "whole number"),
        ("PARALLELISM_CONFIG_SP_ATTN_IMPLEMENTATION", "flex_attention", "sdpa"),
        (
            "PARALLELISM_CONFIG_SP_ATTN_IMPLEMENTATION",
            "someone/flash-attn2",
            "not a trusted hub kernel",
        ),
        (
            "PARALLELISM_CONFIG_SP_ATTN_IMPLEMENTATION",
            "kernels-community/../x/flash-attn",
            "not a trusted hub kernel",
        ),
        ("PARALLELISM_CONFIG_SP_SIZEE", "2", "Did you mean 'PARALLELISM_CONFIG_SP_SIZE'"),
    ],
)
def test_illegal_variables(variable: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        environment_layer({variable: text})


def test_empty_variables_count_as_unset() -> None:
    assert (
        environment_layer({"PARALLELISM_CONFIG_SP_SIZE": "", "PARALLELISM_CONFIG_TYPO": " "}) == {}
    )


def test_none_is_a_length() -> None:
    layer = environment_layer({"PARALLELISM_CONFIG_SP_SEQ_LENGTH": "None"})
    assert layer["sp_seq_length"].value is None


def test_heads_are_written_in_one_way() -> None:
    for text, value in (("32/8", "32/8"), (" 32 / 8 ", "32/8"), ("32", "32/32"), ("None", None)):
        assert (
            environment_layer({"PARALLELISM_CONFIG_SP_AUTO_HEADS": text})["sp_auto_heads"].value
            == value
        )


def test_what_accelerate_launch_exports_for_nobody_is_told_apart() -> None:
    variables = {"PARALLELISM_CONFIG_DP_SHARD_SIZE": "1", "PARALLELISM_CONFIG_SP_SIZE": "2"}
    assert environment_layer(variables)["dp_shard_size"].source.kind == "env"
    launched = environment_layer({**variables, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"})
    assert launched["dp_shard_size"].source.kind == "launcher"
    assert launched["sp_size"].source.kind == "env"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "file is empty"),
        ("# nothing\n", "file is empty"),
        ("- a\n", "top level"),
        ("just words", "top level"),
        ("a: [", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
        (
            "parallelism_config:\n  sp_sizee: 2\n",
            r"x.yaml:2: unknown key 'sp_sizee' .* Did you mean 'sp_size'",
        ),
        ("parallelism_config:\n  sp_size: [2]\n", "one value"),
        ("parallelism_config:\n  sp_size: 2\n  parallelism_config_sp_size: 4\n", "set twice"),
        ("parallelism_config: 3\n", "must hold"),
        ("parallelism_config: {}\nparallelism_config: {}\n", "second section"),
        ("parallelism_confg:\n  sp_size: 2\n", "Did you mean 'parallelism_config:'"),
        ("sp_size: 2\n", "outside of the section"),
        ("parallelism_config:\n  ? [a]\n  : 1\n", "plain word"),
        ("x: &a [1]\ny: *a\n", "anchors"),
        ("x: !!python/object/apply:os.system [ls]\n", "tags"),
        ("parallelism_config:\n  sp_size: !!int 2\n", "tags"),
        ("x: " + "[" * 40 + "]" * 40, "nested deeper"),
        ("parallelism_config:\n  sp_size: 0\n", r"x.yaml:2 \(sp_size\)\) must be at least 1"),
    ],
)
def test_illegal_yaml(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_yaml_layer(text, "x.yaml")
    assert "x.yaml" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "huge.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    for name in ("missing.yaml", "binary.yaml", "huge.yaml", "."):
        with pytest.raises(ConfigError):
            yaml_layer(tmp_path / name)


def test_null_and_missing_sections_set_nothing() -> None:
    for text in (
        "a: 1",
        "parallelism_config:",
        "parallelism_config:\n  sp_size: null\n",
        "parallelism_config:\n  sp_size:\n",
    ):
        assert parse_yaml_layer(text, "x.yaml") == {}


def test_sources_survive_the_way_to_a_worker() -> None:
    settings = {
        "sp_size": Setting(4, Source("command line", "command line --parallelism-config-sp-size")),
        "dp_replicate_size": Setting(2, Source("derived", "derived: 8 processes / 4")),
        "sp_seq_length": Setting(None, Source("yaml", "x.yaml:3 (sp_seq_length)")),
    }
    exported = export_environment(resolve(settings))
    assert set(exported) == {SOURCES_VARIABLE, *(FIELDS[name].variable for name in settings)}
    assert environment_layer(exported) == settings


def test_a_recorded_source_is_believed_only_for_its_value() -> None:
    exported = export_environment({"sp_size": Setting(4, Source("command line", "command line x"))})
    exported["PARALLELISM_CONFIG_SP_SIZE"] = "2"
    assert str(environment_layer(exported)["sp_size"].source) == "env PARALLELISM_CONFIG_SP_SIZE"


@pytest.mark.parametrize(
    "record",
    [
        "{",
        "[]",
        "3",
        '{"sp_size": 3}',
        '{"sp_size": {"value": "2"}}',
        "[" * 30000,
        json.dumps({"x": {}}),
    ],
)
def test_damaged_records_are_ignored(record: str) -> None:
    layer = environment_layer({"PARALLELISM_CONFIG_SP_SIZE": "2", SOURCES_VARIABLE: record})
    assert layer["sp_size"] == Setting(2, Source("env", "env PARALLELISM_CONFIG_SP_SIZE"))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'sp_size'"):
        argument_layer({"sp_sizes": 2}, Source("constructor"))
    with pytest.raises(ConfigError, match="unknown setting"):
        resolve({"nothing": Setting(1, Source("constructor"))})
