"""TRL's DPOTrainer: policy and reference compute shards of each pair, and the loss is that of whole
sequences.

torchrun --nproc-per-node 2 examples/trl/dpo.py --sp-size 2
"""

from __future__ import annotations

import argparse
import copy

import torch
from accelerate.utils import set_seed
from texts import documents, make_model, make_tokenizer, pairs
from trl import DPOConfig, DPOTrainer

import ulysses_accel


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sp-size", type=int, default=1)
    parser.add_argument("--cp-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", default="runs/dpo")
    options = parser.parse_args()

    set_seed(0)
    tokenizer = make_tokenizer()
    policy = make_model(tokenizer)
    trainer = DPOTrainer(
        model=policy,
        ref_model=copy.deepcopy(policy),
        args=DPOConfig(
            output_dir=options.output,
            parallelism_config=ulysses_accel.ParallelismConfig(
                sp_size=options.sp_size, cp_size=options.cp_size
            ),
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
        train_dataset=pairs(documents(32, 500)),
        processing_class=tokenizer,
    )
    trainer.train()


if __name__ == "__main__":
    main()
