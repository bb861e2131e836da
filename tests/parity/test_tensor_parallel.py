"""Tensor parallelism with the sequence sharded between the linear layers: loss, gradients and a
step of AdamW.
"""

from __future__ import annotations

from tests.helpers.parity_jobs import EXACT, assert_parity
from tests.helpers.ranks import run_ranks
from tests.helpers.support import Support
from tests.helpers.tensor_parallel_jobs import FAMILIES, Setup, expected, tensor_parallel_steps
from ulysses_accel import MemoryConfig

_CODE = "Accelerator(parallelism_config=ParallelismConfig({}))"


def run(setups: list[Setup], world_size: int) -> None:
    """Compares all setups with one process, on one set of ranks."""
    wanted = [expected(setup) for setup in setups]
    reports = run_ranks(tensor_parallel_steps, world_size, setups, wanted, init=False)
    assert_parity(reports, EXACT, sum(len(setup.kinds) + 1 for setup in setups))


def _claim(support: Support, setup: Setup, mode: str) -> None:
    sizes = ", ".join(f"{axis}_size={size}" for axis, size in setup.sizes.items())
    support(
        "model",
        setup.family,
        mode,
        code=_CODE.format(sizes),
        engine="FSDP2" if setup.fsdp2 else "DDP",
    )


def test_every_family_over_two_ranks(support: Support) -> None:
    setups = [Setup(family, {"tp": 2}) for family in FAMILIES]
    run(setups, 2)
    for setup in setups:
        _claim(support, setup, "tp")


def test_with_ulysses_ring_and_data_parallelism(support: Support) -> None:
    ulysses = Setup("Qwen3", {"tp": 2, "sp": 2}, kinds=("packed", "padded left", "odd length"))
    ring = Setup("Mistral", {"tp": 2, "cp": 2}, fsdp2=True)
    sharded = Setup("Gemma", {"tp": 2, "dp_shard": 2}, fsdp2=True)
    replicas = Setup("Phi-3", {"tp": 2, "dp_replicate": 2}, kinds=("padded left",))
    run([ulysses, ring, sharded, replicas], 4)
    _claim(support, ulysses, "tp × sp")
    _claim(support, ring, "tp × cp")
    _claim(support, sharded, "tp")
    _claim(support, replicas, "tp")


def test_on_eight_ranks(support: Support) -> None:
    sequence = Setup("Llama", {"dp_shard": 2, "sp": 2, "tp": 2}, fsdp2=True, kinds=("packed",))
    replicas = Setup(
        "Llama", {"dp_replicate": 2, "dp_shard": 2, "tp": 2}, fsdp2=True, kinds=("packed",)
    )
    run([sequence, replicas], 8)
    _claim(support, sequence, "tp × sp")
    _claim(support, replicas, "tp")


def test_recomputed_layers() -> None:
    def transformers_own(model: object) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[attr-defined]

    stock = Setup("Qwen3", {"tp": 2}, kinds=("packed",), change=transformers_own)
    ours = Setup(
        "Llama",
        {"tp": 2},
        kinds=("packed",),
        arguments={"memory_config": MemoryConfig(checkpoint=True)},
    )
    run([stock, ours], 2)
