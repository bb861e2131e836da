"""TRL's SFTTrainer on packed rows, every row shared by the processes of a sequence group; with
`--lora` an adapter.

torchrun --nproc-per-node 2 examples/trl/sft.py --sp-size 2
"""

from __future__ import annotations

import argparse

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from peft import LoraConfig
from texts import documents, make_model, make_tokenizer
from trl import SFTConfig, SFTTrainer

import ulysses_accel


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sp-size", type=int, default=1)
    parser.add_argument("--cp-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--output", default="runs/sft")
    options = parser.parse_args()

    set_seed(0)
    tokenizer = make_tokenizer()
    trainer = SFTTrainer(
        model=make_model(tokenizer),
        args=SFTConfig(
            output_dir=options.output,
            parallelism_config=ulysses_accel.ParallelismConfig(
                sp_size=options.sp_size, cp_size=options.cp_size
            ),
            packing=True,
            max_length=512,
            per_device_train_batch_size=2,
            max_steps=options.steps,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_dict({"text": documents(32, 700)}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        if options.lora
        else None,
    )
    trainer.train()


if __name__ == "__main__":
    main()
