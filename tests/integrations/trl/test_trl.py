"""TRL's trainers on sharded sequences: losses, metrics and weights are those of one process, step
by step.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import pytest

from tests.helpers.parity_jobs import EXACT
from tests.helpers.ranks import run_ranks
from tests.helpers.support import Support
from tests.helpers.trainer_jobs import ONE, Mode
from tests.helpers.trl_jobs import (
    Case,
    chats,
    completions,
    differences,
    judged,
    make_trainer,
    margins,
    pairs,
    plain_texts,
    run_all,
)
from ulysses_accel import MemoryConfig
from ulysses_accel.sequence.layout import multiple_of
from ulysses_accel.sequence.sharding import next_multiple

# DeepSpeed computes in float32, and Adam makes a step of full size of the smallest gradient.
FLOAT32 = 1e-4

SAVING = MemoryConfig(
    tiled_mlp=True, tiled_mlp_bytes=4096, tiled_norm=True, tiled_loss=True, checkpoint=True
)
COUNTED = {"include_num_input_tokens_seen": "non_padding"}
SFT = {
    "SFTTrainer": Case(
        "SFTTrainer", plain_texts, {"gradient_accumulation_steps": 2, **COUNTED}, evaluate=8
    ),
    "packed": Case(
        "SFTTrainer", plain_texts, {"packing": True, "max_length": 25}, steps=20, evaluate=6
    ),
    "wrapped": Case(
        "SFTTrainer",
        plain_texts,
        {"packing": True, "packing_strategy": "wrapped", "max_length": 25},
    ),
    "padding free": Case("SFTTrainer", plain_texts, {"padding_free": True, "max_length": None}),
    "completions": Case("SFTTrainer", completions, {"completion_only_loss": True}),
    "assistant": Case("SFTTrainer", chats, {"assistant_only_loss": True}),
    "dft": Case("SFTTrainer", completions, {"loss_type": "dft"}),
    "smoothing": Case("SFTTrainer", plain_texts, {"label_smoothing_factor": 0.1}),
    "lora": Case("SFTTrainer", plain_texts, lora=True),
    "saving": Case("SFTTrainer", plain_texts, memory=SAVING),
}
PREFERENCES = {
    "DPOTrainer": Case("DPOTrainer", pairs, COUNTED, steps=5, evaluate=8),
    "several losses": Case(
        "DPOTrainer", pairs, {"loss_type": ["sigmoid", "ipo", "sft"], "loss_weights": [1, 0.5, 2]}
    ),
    "weighting": Case(
        "DPOTrainer",
        pairs,
        {"use_weighting": True, "ld_alpha": 0.5, "gradient_accumulation_steps": 2},
    ),
    "adapter": Case("DPOTrainer", pairs, {}, lora=True),
    "KTOTrainer": Case("KTOTrainer", judged, evaluate=6),
    "RewardTrainer": Case(
        "RewardTrainer", margins, {"center_rewards_coefficient": 0.01}, evaluate=6
    ),
}
CASES = {**SFT, **PREFERENCES}


_SFT = "SFTTrainer(model, SFTConfig(parallelism_config=config, {}))"
_DPO = "DPOTrainer(model, args=DPOConfig(parallelism_config=config, {}))"
ROWS = {
    "SFTTrainer": ("SFTTrainer", "SFTTrainer(model, SFTConfig(parallelism_config=config))"),
    "packed": ("SFTTrainer, packed", _SFT.format("packing=True")),
    "wrapped": ("SFTTrainer, wrapped", _SFT.format("packing=True, packing_strategy='wrapped'")),
    "padding free": ("SFTTrainer, padding-free", _SFT.format("padding_free=True")),
    "completions": ("SFTTrainer, completion-only", _SFT.format("completion_only_loss=True")),
    "assistant": ("SFTTrainer, assistant-only", _SFT.format("assistant_only_loss=True")),
    "dft": ("SFTTrainer, DFT loss", _SFT.format("loss_type='dft'")),
    "smoothing": ("SFTTrainer, label smoothing", _SFT.format("label_smoothing_factor=0.1")),
    "lora": (
        "SFTTrainer, LoRA",
        "SFTTrainer(model, SFTConfig(parallelism_config=config), peft_config=LoraConfig(...))",
    ),
    "saving": (
        "SFTTrainer, saving memory",
        "ParallelismConfig(sp_size=2, memory_config=MemoryConfig(...))",
    ),
    "DPOTrainer": (
        "DPOTrainer",
        "DPOTrainer(model, ref_model, DPOConfig(parallelism_config=config))",
    ),
    "several losses": (
        "DPOTrainer, several losses",
        _DPO.format("loss_type=['sigmoid', 'ipo', 'sft']"),
    ),
    "weighting": ("DPOTrainer, WPO and LD-DPO", _DPO.format("use_weighting=True, ld_alpha=0.5")),
    "adapter": (
        "DPOTrainer, LoRA as policy",
        "DPOTrainer(model, args=..., peft_config=LoraConfig(...))",
    ),
    "KTOTrainer": (
        "KTOTrainer",
        "KTOTrainer(model, ref_model, KTOConfig(parallelism_config=config))",
    ),
    "RewardTrainer": (
        "RewardTrainer",
        "RewardTrainer(model, RewardConfig(parallelism_config=config))",
    ),
}
ON_RING = ("packed", "lora", "DPOTrainer", "RewardTrainer")
ENGINES = {
    "dp and sp": (Mode(sp=2, dp=2), ("SFTTrainer", "DPOTrainer")),
    "cp and sp": (Mode(sp=2, cp=2), ("DPOTrainer",)),
    "FSDP2": (Mode(sp=2, engine="FSDP2"), ("SFTTrainer", "DPOTrainer")),
    "ZeRO-2": (Mode(sp=2, engine="ZeRO-2"), ("DPOTrainer",)),
    "ZeRO-3": (Mode(sp=2, engine="ZeRO-3"), ("SFTTrainer",)),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: Any) -> dict[str, dict[str, Any]]:
    """What TRL alone gives on one process."""
    (found,) = run_ranks(run_all, 1, CASES, ONE, str(tmp_path_factory.mktemp("one")), init=False)
    return found


def assert_same(found: list[dict[str, Any]], mode: Mode, expected: dict[str, Any]) -> None:
    """Checks every rank's runs, and that no layer saw more than its share of a sequence."""
    tolerance = FLOAT32 if mode.engine.startswith("ZeRO") else EXACT
    parts = mode.sp * mode.cp
    multiple = multiple_of(mode.cp, "zigzag", mode.sp)
    for ours in found:
        assert ours
        for name, own in ours.items():
            # Each data parallel rank has the loss of its own samples.
            losses = [
                sum(ranks) / len(found)
                for ranks in zip(*(run[name]["losses"] for run in found), strict=True)
            ]
            wrong = differences({**own, "losses": losses}, expected[name], tolerance)
            if mode.dp > 1:
                # TRL's own: the mean over batches of each one's mean, and there are twice as many.
                wrong = {
                    what: values
                    for what, values in wrong.items()
                    if not what.startswith("eval_loss")
                }
            assert wrong == {}, name
            whole = expected[name]["tokens"]
            shares = {next_multiple(tokens, multiple) // parts for tokens in whole}
            assert (
                set(own["tokens"]) == shares if mode.dp == 1 else max(own["tokens"]) <= max(shares)
            ), name


def claim(support: Support, names: Iterable[str], mode: str, engine: str = "DDP") -> None:
    """Records what a passed test proves."""
    for name in names:
        row, code = ROWS[name]
        support("trainer", f"TRL {row}", mode, code=code, engine=engine)


def test_losses_metrics_and_weights_are_those_of_one_process(expected, tmp_path, support) -> None:
    mode = Mode(sp=2)
    assert_same(run_ranks(run_all, 2, CASES, mode, str(tmp_path), init=False), mode, expected)
    claim(support, ROWS, "sp")


def test_ring(expected, tmp_path, support) -> None:
    mode, cases = Mode(cp=2), {name: CASES[name] for name in ON_RING}
    assert_same(run_ranks(run_all, 2, cases, mode, str(tmp_path), init=False), mode, expected)
    claim(support, ON_RING, "cp")


@pytest.mark.parametrize("name", ENGINES)
def test_engines(name, expected, tmp_path, support) -> None:
    mode, cases = ENGINES[name]
    chosen = {case: CASES[case] for case in cases}
    assert_same(
        run_ranks(run_all, mode.world_size, chosen, mode, str(tmp_path), init=False), mode, expected
    )
    claim(
        support,
        cases,
        "dp × sp" if mode.dp > 1 else "cp × sp" if mode.cp > 1 else "sp",
        mode.engine,
    )


def resumed(folder: str) -> dict[str, Any]:
    """Returns the losses of a job, those behind its checkpoint once more, and what is left after
    uninstalling.
    """
    gc.freeze()
    case = Case("SFTTrainer", plain_texts, {"save_strategy": "steps", "save_steps": 2}, steps=4)
    first = make_trainer(case, Mode(sp=2), folder)
    first.train()
    second = make_trainer(case, Mode(sp=2), folder)
    second.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    assert {"get_tp_size", "get_sp_size", "get_cp_size"} <= set(vars(type(second)))
    names = {"sequence_parallel", "ulysses_accel", "overrides_of_ulysses_accel"}
    assert names <= set(vars(second))
    second.sequence_parallel.close()
    left = sorted(names & set(vars(second)))
    hooks = [
        hook
        for hook in second.model._forward_pre_hooks.values()
        if "FullBatchForward" in hook.__qualname__
    ]
    return {"first": first.losses, "second": second.losses, "left": left, "hooks": len(hooks)}


def test_a_resumed_job_goes_on_with_the_same_losses(tmp_path: Any, support: Support) -> None:
    for found in run_ranks(resumed, 2, str(tmp_path), init=False):
        assert found["second"] == found["first"][2:]
        assert found["left"] == []
        assert found["hooks"] == 0
    support(
        "trainer",
        "TRL SFTTrainer, resumed",
        "sp",
        code="trainer.train(resume_from_checkpoint=folder)",
    )
