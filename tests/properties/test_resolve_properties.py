"""Any text gives a config or a ConfigError; what is written comes back."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ulysses_accel.config.mesh_sizes import legal_factorizations
from ulysses_accel.config.parallelism import ParallelismConfig
from ulysses_accel.config.settings import AXES, FIELDS
from ulysses_accel.config.sources import (
    SOURCES_VARIABLE,
    environment_layer,
    export_environment,
    resolve,
)
from ulysses_accel.config.yaml_file import parse_yaml_layer
from ulysses_accel.errors import ConfigError, MeshError

FAST = settings(max_examples=150, deadline=None)
_PLAIN = "parallelism_config sp_size parallelism_config_sp_size 2 : - [ ] { } &a *a !! | > ' \" # ? << null ~ yes 0x10 1e3 %"
_WORDS = st.sampled_from(
    [*_PLAIN.split(), "2020-99-99", "---", "...", ",", "@", "`", "\n", "  ", "\t", ": ", "\n  "]
)
VALUES = st.one_of(
    st.text(max_size=12),
    st.integers().map(str),
    st.sampled_from(["true", "None", "sdpa", "ulysses", "auto", "32/8"]),
)


def _outcome(make: Callable[[], ParallelismConfig]) -> str:
    """Returns the error's message, printable on any terminal, or the explanation of the config."""
    try:
        return make().explain()
    except ConfigError as error:
        return str(error).encode().decode()


@FAST
@given(st.one_of(st.text(max_size=60), st.lists(_WORDS, max_size=24).map("".join)))
def test_any_yaml_gives_settings_or_a_config_error(text: str) -> None:
    outcome = _outcome(lambda: ParallelismConfig.from_layers(parse_yaml_layer(text, "x.yaml")))
    assert "x.yaml" in outcome or "processes = " in outcome


@FAST
@given(st.sampled_from(sorted(FIELDS)), VALUES)
def test_any_value_under_a_key_gives_settings_or_a_config_error(name: str, value: str) -> None:
    text = f"{FIELDS[name].section}:\n  {name}: {json.dumps(value)}\n"
    outcome = _outcome(lambda: ParallelismConfig.from_layers(parse_yaml_layer(text, "x.yaml")))
    assert f"x.yaml:2 ({name})" in outcome


VARIABLES = st.one_of(
    st.sampled_from([f.variable for f in FIELDS.values()]),
    VALUES.map("PARALLELISM_CONFIG_{}".format),
)


@FAST
@given(st.dictionaries(VARIABLES, VALUES, max_size=4), VALUES)
def test_any_environment_gives_settings_or_a_config_error(
    environ: dict[str, str], record: str
) -> None:
    outcome = _outcome(
        lambda: ParallelismConfig.from_layers(
            environment_layer({**environ, SOURCES_VARIABLE: record})
        )
    )
    assert "_CONFIG_" in outcome or "processes = " in outcome


SIZES = st.integers(1, 64)
CONFIGS = st.fixed_dictionaries(
    {f"{axis}_size": SIZES for axis in AXES},
    optional={
        "sp_backend": st.sampled_from(["ulysses", "deepspeed"]),
        "cp_backend": st.sampled_from(["ring", "torch"]),
        "cp_handler": st.fixed_dictionaries(
            {"exchange": st.just("all_gather")},
            optional={
                "layout": st.sampled_from(["zigzag", "contiguous", "striped"]),
                "head_stride": st.none() | SIZES,
            },
        ),
        "sp_handler": st.fixed_dictionaries(
            {},
            optional={
                "sp_seq_length": st.none() | SIZES,
                "sp_attn_implementation": st.sampled_from(["sdpa", "eager"]),
                "sp_head_chunks": SIZES,
            },
        ),
    },
)


@FAST
@given(CONFIGS)
def test_dict_and_json_round_trip(values: dict[str, object]) -> None:
    config = ParallelismConfig.from_dict(values)
    assert ParallelismConfig.from_dict(config.to_dict()) == config
    assert ParallelismConfig.from_dict(json.loads(config.to_json())) == config
    assert {str(setting.source) for setting in config.settings.values()} <= {"from_dict", "default"}


@FAST
@given(CONFIGS)
def test_exported_settings_come_back_with_their_sources(values: dict[str, object]) -> None:
    config = ParallelismConfig.from_dict(values)
    again = resolve(environment_layer(export_environment(config.settings)))
    for name, setting in config.settings.items():
        assert (again[name].value, str(again[name].source)) == (setting.value, str(setting.source))


@FAST
@given(st.integers(1, 4096), st.tuples(*[st.integers(1, 12)] * 5), st.sets(st.sampled_from(AXES)))
def test_every_suggested_factorization_is_legal(
    world: int, wish: tuple[int, ...], free: set[str]
) -> None:
    found = legal_factorizations(world, dict(zip(AXES, wish, strict=True)), frozenset(free))
    assert found
    for sizes in found:
        config = ParallelismConfig.from_dict({f"{axis}_size": size for axis, size in sizes.items()})
        config.fit_world_size(world)
        assert config.total_size == world


@FAST
@given(st.integers(1, 4096), SIZES, SIZES)
def test_fitting_derives_data_parallelism_or_says_what_is_legal(
    world: int, cp: int, sp: int
) -> None:
    config = ParallelismConfig(cp_size=cp, sp_size=sp)
    if world % (cp * sp) == 0:
        config.fit_world_size(world)
        assert config.total_size == world
    else:
        with pytest.raises(MeshError, match=f"number of processes is {world}:"):
            config.fit_world_size(world)
