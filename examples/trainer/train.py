"""A stock `transformers.Trainer` script on sequences that processes share; what makes it so is one
argument.

    torchrun --nproc-per-node 2 examples/trainer/train.py --sp-size 2
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    ByT5Tokenizer,
    LlamaConfig,
    Trainer,
    TrainingArguments,
)

from ulysses_accel import ParallelismConfig

sys.path.append(str(Path(__file__).parents[1] / "alst"))
from data import collate, load_documents, make_rows, split_documents


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sp-size", type=int, default=1, help="processes that share a sequence by heads"
    )
    parser.add_argument(
        "--cp-size", type=int, default=1, help="processes that share a sequence in a ring"
    )
    parser.add_argument(
        "--data", nargs="+", default=["stdlib"], help="text files, folders, or `stdlib`"
    )
    parser.add_argument(
        "--sequence-length", type=int, default=256, help="tokens of a row, one for each byte"
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--save-steps", type=int, default=5)
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in --output"
    )
    parser.add_argument("--output", default="runs/trainer")
    return parser.parse_args()


def tiny_model() -> Any:
    """Returns a byte-level Llama that is made here, the same on every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
    )
    return AutoModelForCausalLM.from_config(config)


def next_byte_accuracy(prediction: Any) -> dict[str, float]:
    """Returns the share of bytes that were guessed from what stands before them."""
    guesses, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    counted = labels != -100
    return {"accuracy": float((guesses == labels)[counted].mean())}


def main() -> None:
    options = parse_arguments()
    texts, held_out = split_documents(load_documents(options.data), num_held_out=2, seed=0)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    rows, held_out_rows = (
        make_rows(documents, tokenizer, options.sequence_length, packed=True, whole=False)
        for documents in (texts, held_out)
    )
    arguments = TrainingArguments(
        output_dir=options.output,
        # The added line: every row is shared by sp_size × cp_size processes.
        parallelism_config=ParallelismConfig(sp_size=options.sp_size, cp_size=options.cp_size),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=options.steps,
        learning_rate=3e-3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=options.steps,
        eval_on_start=True,
        save_steps=options.save_steps,
        disable_tqdm=True,
        report_to="none",
        ddp_find_unused_parameters=False,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        tiny_model(),
        arguments,
        data_collator=lambda samples: collate(samples, tokenizer.pad_token_id),
        train_dataset=rows,
        eval_dataset=held_out_rows,
        compute_metrics=next_byte_accuracy,
        # Called with this process's part of the tokens, so that no whole logits are gathered.
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()
    trainer.end()


if __name__ == "__main__":
    main()
