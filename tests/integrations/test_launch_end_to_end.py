"""From the command line to trained steps: both launchers start two CPU processes that share each
sequence.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import LlamaConfig, LlamaForCausalLM
from ulysses_accel import ParallelismConfig

accelerator = Accelerator(parallelism_config=ParallelismConfig())
set_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
samples = [{"input_ids": torch.randint(3, 64, (16,))} for _ in range(2)]
for sample in samples:
    sample["labels"] = sample["input_ids"]
loader = torch.utils.data.DataLoader(samples, batch_size=1)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
losses, shapes = [], []
for _ in range(2):
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        shapes.append(list(batch["input_ids"].shape))
report = {
    "losses": losses,
    "shapes": shapes,
    "processes": [accelerator.num_processes, accelerator.process_index],
    "group": accelerator.torch_device_mesh["sp"].get_group().size(),
    "engine": accelerator.distributed_type.value,
    "source": str(accelerator.parallelism_config.source_of("sp_size")),
}
with open(f"{sys.argv[1]}/rank{accelerator.process_index}.json", "w") as file:
    json.dump(report, file)
accelerator.end_training()
"""
OURS = "import sys; from ulysses_accel.cli import main; sys.exit(main(sys.argv[1:]))"
STOCK = "from accelerate.commands.accelerate_cli import main; main()"
# How it is started, the engine that the workers must see, and what says that sp_size is 2.
STARTS: dict[str, tuple[str, list[str], str, str]] = {
    "flags alone": (
        OURS,
        ["--cpu", "--parallelism-config-sp-size", "2"],
        "MULTI_CPU",
        "command line",
    ),
    "fsdp2": (OURS, ["--cpu", "--config_file", "configs/fsdp2_sp2.yaml"], "FSDP", "fsdp2_sp2.yaml"),
    "deepspeed": (
        OURS,
        ["--cpu", "--config_file", "configs/deepspeed_zero2_sp2.yaml"],
        "DEEPSPEED",
        "zero2_sp2.yaml",
    ),
    "stock launcher": (STOCK, ["--config_file", "configs/cpu_sp2.yaml"], "MULTI_CPU", "env"),
}


def start(name: str, folder: Path) -> list[dict[str, Any]]:
    code, flags, _, _ = STARTS[name]
    script = folder / "train.py"
    script.write_text(SCRIPT)
    prefixes = ("PARALLELISM_CONFIG_", "ACCELERATE_", "ULYSSES_", "FSDP_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(prefixes)}
    environment.update(PYTHONPATH=str(ROOT), HF_HOME=str(folder / "home"), OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-c", code, "launch", *flags, str(script), str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(file.read_text()) for file in sorted(folder.glob("rank*.json"))]


@pytest.mark.parametrize("name", sorted(STARTS))
def test_two_processes_train_on_shards(name: str, tmp_path: Path) -> None:
    _, _, engine, source = STARTS[name]
    ranks = start(name, tmp_path)
    assert [rank["processes"] for rank in ranks] == [[2, 0], [2, 1]]
    for rank in ranks:
        assert rank["engine"] == engine
        assert rank["group"] == 2
        assert rank["shapes"] == [[1, 8]] * 4
        assert source in rank["source"]
        assert rank["losses"] == ranks[0]["losses"]
        assert rank["losses"][2] < rank["losses"][0]
        assert rank["losses"][3] < rank["losses"][1]
