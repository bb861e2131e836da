"""Checkpoints of a Trainer whose weights lie on several ranks without an engine, and what a Trainer
is refused.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import TrainingArguments

from tests.forward.test_router_loss import build_experts
from tests.helpers.engine_jobs import error_of
from tests.helpers.models import build
from tests.helpers.ranks import run_ranks
from tests.helpers.trainer_jobs import ONE, Mode, Recorder, pad, run_of, samples
from ulysses_accel import MemoryConfig, ParallelismConfig

DATA = samples(8, (16, 12))
Saved = dict[str, Any]


def arguments(folder: str, config: ParallelismConfig | None, **options: Any) -> TrainingArguments:
    AcceleratorState._reset_state(True)
    return TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        parallelism_config=config,
        **{"save_strategy": "steps", "save_steps": 2, **options},
    )


def trained(model: Any, make: Any) -> Saved:
    """Returns a run, and what is in its checkpoint: weights, and the optimizer's first moments in
    order.
    """
    trainer = Recorder(model, make(), pad, DATA)
    trainer.train()
    trainer.accelerator.wait_for_everyone()
    folder = f"{trainer.args.output_dir}/checkpoint-2"
    state = Path(folder, "optimizer.pt")
    moments = torch.load(state, weights_only=True)["state"] if state.is_file() else {}
    return {
        "parameters": run_of(trainer)["parameters"],
        "weights": load_file(f"{folder}/model.safetensors"),
        "moments": [moments[number]["exp_avg"] for number in sorted(moments)],
    }


def experts_job(folder: str, config: ParallelismConfig | None) -> Saved:
    found = trained(build_experts("Qwen3-MoE"), lambda: arguments(folder, config))
    again = Recorder(build_experts("Qwen3-MoE"), arguments(folder, config), pad, DATA)
    again.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    return {**found, "resumed": run_of(again)["parameters"]}


def test_dealt_experts_are_saved_whole(tmp_path: Path, support: Any) -> None:
    (alone,) = run_ranks(experts_job, 1, str(tmp_path / "one"), None, init=False)
    config = ParallelismConfig(sp_size=2, ep_size=2)
    for rank in run_ranks(experts_job, 2, str(tmp_path / "two"), config, init=False):
        # Routers compute in float32.
        for name in ("parameters", "weights", "moments", "resumed"):
            torch.testing.assert_close(rank[name], alone[name], rtol=0, atol=1e-5, msg=name)
    code = "Trainer(model, TrainingArguments(parallelism_config=ParallelismConfig(sp_size=2, ep_size=2)), ...)"
    support("trainer", "Trainer, expert parallelism, checkpoint", "ep × sp", code=code)


def cut_job(folder: str, config: ParallelismConfig | None) -> Saved:
    make = partial(arguments, folder, config)
    found = trained(build("llama"), partial(make, save_only_model=True))
    found["optimizer"] = error_of(lambda: Recorder(build("llama"), make(), pad, DATA))
    found["noise"] = error_of(
        lambda: Recorder(
            build("llama"), make(neftune_noise_alpha=5.0, save_strategy="no"), pad, DATA
        )
    )
    return found


def test_cut_weights_are_saved_whole_and_their_optimizer_is_refused(
    tmp_path: Path, support: Any
) -> None:
    (alone,) = run_ranks(cut_job, 1, str(tmp_path / "one"), None, init=False)
    for rank in run_ranks(
        cut_job, 2, str(tmp_path / "two"), ParallelismConfig(tp_size=2), init=False
    ):
        for name in ("parameters", "weights"):
            torch.testing.assert_close(rank[name], alone[name], rtol=0, atol=1e-12, msg=name)
        assert "save_only_model=True" in rank["optimizer"]
        assert "neftune_noise_alpha=5.0" in rank["noise"]
    code = "Trainer(model, TrainingArguments(parallelism_config=ParallelismConfig(tp_size=2), save_only_model=True), ...)"
    support("trainer", "Trainer, tensor parallelism, saved model", "tp", code=code)
    support.refused(
        "trainer", "Trainer, NEFTune", "tp", "its noise follows from the sequence's length"
    )


def tiled_job(mode: Mode, folder: str) -> Saved:
    memory = MemoryConfig(tiled_loss=True) if mode.world_size > 1 else None
    trainer = Recorder(
        build("llama"), mode.arguments(folder, 4, memory_config=memory), pad, DATA, DATA
    )
    return {"predictions": torch.from_numpy(trainer.predict(DATA[:4:2]).predictions)}  # type: ignore[arg-type]


def test_predictions_of_a_tiled_loss_have_logits(tmp_path: Path, support: Any) -> None:
    (alone,) = run_ranks(tiled_job, 1, ONE, str(tmp_path), init=False)
    for rank in run_ranks(tiled_job, 2, Mode(sp=2), str(tmp_path), init=False):
        torch.testing.assert_close(rank["predictions"], alone["predictions"], rtol=0, atol=1e-12)
    code = "Trainer(model, args, compute_metrics=f)  # ParallelismConfig(memory_config=MemoryConfig(tiled_loss=True))"
    support("trainer", "Trainer, predictions with a tiled loss", "sp", code=code)
