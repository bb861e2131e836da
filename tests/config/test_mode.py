"""`sequence_parallelism_mode`: what each word makes of the sizes, where it is read from, and what
contradicts it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ulysses_accel.cli.launch import plan_launch
from ulysses_accel.config.auto import Cluster
from ulysses_accel.config.handlers import DeepSpeedSequenceParallelConfig
from ulysses_accel.config.parallelism import ParallelismConfig
from ulysses_accel.config.settings import Source
from ulysses_accel.config.sources import argument_layer
from ulysses_accel.errors import ConfigError

# The arguments of ColossalAI's document, and tp, cp and sp here.
SIZES: list[tuple[str, dict[str, Any], tuple[int, int, int]]] = [
    ("split_gather", {"tp_size": 4, "sp_size": 1}, (4, 1, 1)),
    ("split_gather", {"tp_size": 2, "sp_size": 2, "cp_size": 2}, (2, 2, 2)),
    ("all_to_all", {"tp_size": 2, "sp_size": 2}, (2, 1, 2)),
    ("ring_attn", {"tp_size": 2, "sp_size": 2}, (2, 2, 1)),
    ("ring_attn", {"cp_size": 4}, (1, 4, 1)),
    (" Ring_Attn ", {"sp_size": 4}, (1, 4, 1)),
]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "split_gather",
        {"sp_size": 2},
        "but tp_size=1 (default), cp_size=1 (default), sp_size=2 (constructor). Set tp_size.",
    ),
    (
        "all_to_all",
        {"tp_size": 2},
        "is Ulysses over sp_size ranks alone, but tp_size=2 (constructor)",
    ),
    (
        "all_to_all",
        {"cp_size": 2, "sp_size": 2},
        "Leave sequence_parallelism_mode out to use several kinds together",
    ),
    (
        "ring_attn",
        {"cp_size": 2, "sp_size": 2},
        "has one degree, but tp_size=1 (default), cp_size=2 (constructor)",
    ),
    ("ring_attn", {"tp_size": 2}, "needs the ring's degree"),
    ("ring", {"sp_size": 2}, "must be one of split_gather, all_to_all, ring_attn"),
]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for axis in ("TP", "CP", "SP"):
        monkeypatch.delenv(f"PARALLELISM_CONFIG_{axis}_SIZE", raising=False)


@pytest.mark.parametrize(("mode", "arguments", "sizes"), SIZES)
def test_a_mode_decides_the_sizes(
    mode: str, arguments: dict[str, Any], sizes: tuple[int, int, int]
) -> None:
    config = ParallelismConfig(sequence_parallelism_mode=mode, **arguments)
    assert (config.tp_size, config.cp_size, config.sp_size) == sizes
    assert config.sequence_parallelism_mode == mode.strip().lower()
    again = ParallelismConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(("mode", "arguments", "words"), REFUSED)
def test_a_contradiction_is_refused_with_the_values(
    mode: str, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        ParallelismConfig(sequence_parallelism_mode=mode, **arguments)
    assert words in str(refusal.value)
    assert f"sequence_parallelism_mode='{mode}' (from constructor)" in str(refusal.value)


def test_without_a_mode_the_sizes_say() -> None:
    config = ParallelismConfig(cp_size=2, sp_size=2)
    assert (config.cp_size, config.sp_size, config.sequence_parallelism_mode) == (2, 2, None)


def test_it_is_read_like_every_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ring.yaml"
    file.write_text("parallelism_config:\n  sp_size: 4\n  sequence_parallelism_mode: ring_attn\n")
    config = ParallelismConfig.from_yaml(file)
    assert (config.cp_size, config.sp_size) == (4, 1)
    assert (
        str(config.source_of("cp_size"))
        == f"sp_size=4 from {file}:2 (sp_size), as sequence_parallelism_mode='ring_attn'"
    )
    monkeypatch.setenv("PARALLELISM_CONFIG_SEQUENCE_PARALLELISM_MODE", "all_to_all")
    config = ParallelismConfig.from_yaml(file)
    assert (config.cp_size, config.sp_size) == (1, 4)
    assert (
        "sequence_parallelism_mode = all_to_all (env PARALLELISM_CONFIG_SEQUENCE_PARALLELISM_MODE)"
        in config.explain()
    )


@pytest.mark.parametrize(("mode", "sizes"), [("all_to_all", (1, 4)), ("ring_attn", (4, 1))])
def test_auto_keeps_to_it(mode: str, sizes: tuple[int, int]) -> None:
    arguments = {
        "sp_size": "auto",
        "tp_size": 2,
        "sp_auto_heads": "16/8",
        "sequence_parallelism_mode": mode,
    }
    layer = argument_layer(arguments, Source("constructor"))
    config = ParallelismConfig.from_layers(layer, cluster=Cluster(num_ranks=8))
    assert (config.cp_size, config.sp_size) == sizes


def test_the_launcher_takes_it() -> None:
    flags = [
        "--num_processes",
        "8",
        "--cpu",
        "--parallelism-config-tp-size",
        "2",
        "--parallelism-config-sp-size",
        "4",
    ]
    plan = plan_launch(
        [*flags, "--parallelism-config-sequence-parallelism-mode", "ring_attn", "train.py"]
    )
    assert (plan.config.tp_size, plan.config.cp_size, plan.config.sp_size) == (2, 4, 1)


def test_a_fixed_length_fits_the_tensor_parallel_ranks() -> None:
    handler = DeepSpeedSequenceParallelConfig(sp_seq_length=12, sp_seq_length_is_variable=False)
    with pytest.raises(ConfigError, match=r"times tp_size=4\. Use 8 or 16 tokens"):
        ParallelismConfig(sp_size=2, tp_size=4, sp_handler=handler)
    assert ParallelismConfig(sp_size=2, tp_size=2, sp_handler=handler).total_size == 4
