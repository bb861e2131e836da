"""What the tests of TRL's trainers share: data, a tokenizer, TRL's loss head in the model's own
dtype, and the runs.

A job is run twice by the same code: on one process by TRL alone, and on ranks with our config and
nothing else.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import trl.trainer.utils
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

import ulysses_accel
from tests.helpers.models import CONFIGS, VOCAB, build
from tests.helpers.parity_jobs import full_parameters
from tests.helpers.trainer_jobs import Mode
from tests.helpers.trainer_jobs import _engine as engine_options
from ulysses_accel.memory.tiled_loss.log_probs import token_log_probs

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_WORDS = tuple(f"w{index}" for index in range(VOCAB - len(_SPECIAL)))
_CHAT = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }} </s> {% endgeneration %}{% else %}{{ message['content'] }} <s> {% "
    "endif %}{% endfor %}"
)
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def tokenizer() -> Any:
    """Returns a tokenizer of one token for each word of `texts`."""
    inner = Tokenizer(
        models.WordLevel(
            {word: i for i, word in enumerate((*_SPECIAL, *_WORDS))}, unk_token="<unk>"
        )
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), _SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=_CHAT, **names)


def texts(count: int, seed: int = 0, low: int = 5, high: int = 20) -> list[str]:
    """Returns texts of random words and lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (count,), generator=generator).tolist()
    words = [
        torch.randint(0, len(_WORDS), (length,), generator=generator).tolist() for length in lengths
    ]
    return [" ".join(_WORDS[word] for word in part) for part in words]


def plain_texts(count: int) -> dict[str, list[Any]]:
    return {"text": texts(count)}


def completions(count: int) -> dict[str, list[Any]]:
    return {"prompt": texts(count), "completion": [f" {text}" for text in texts(count, 1)]}


def chats(count: int) -> dict[str, list[Any]]:
    turns = zip(texts(count), texts(count, 1), strict=True)
    return {
        "messages": [
            [{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in turns
        ],
    }


def pairs(count: int) -> dict[str, list[Any]]:
    chosen, rejected = ([f" {text}" for text in texts(count, seed)] for seed in (1, 2))
    return {"prompt": texts(count), "chosen": chosen, "rejected": rejected}


def margins(count: int) -> dict[str, list[Any]]:
    return {**pairs(count), "margin": [0.25 * (index % 3) for index in range(count)]}


def judged(count: int) -> dict[str, list[Any]]:
    return {**completions(count), "label": [index % 3 == 0 for index in range(count)]}


class ExactHead:
    """TRL's chunked log-probabilities without its casts to float32."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        _temperature: float,
        _chunk: int,
        _softcap: float | None,
        _scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            logits = hidden @ weight.T
            numbers = {
                "log_sum_sq_probs": logits.softmax(-1).square().sum(-1).log(),
                "mean_logits": logits.mean(-1),
                "is_top1": logits.argmax(-1) == labels,
            }
        log_probs, entropy = token_log_probs(hidden, weight, labels, bias=bias, entropy=True)
        found = {**numbers, "log_probs": log_probs, "entropy": entropy}
        names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        return tuple(found[name] if name in outputs else None for name in names)


def _policy() -> Any:
    return build("llama")


def _judge() -> Any:
    """Returns a reward model in float64."""
    config = LlamaConfig(**{**CONFIGS["llama"]().to_dict(), "num_labels": 1})
    base = build("llama")
    model = LlamaForSequenceClassification(config).double()
    model.model = base.model
    with torch.no_grad():
        model.score.weight.copy_(torch.linspace(-1, 1, config.hidden_size, dtype=torch.float64))
    return model.train()


_TRAINERS: dict[str, tuple[Any, Any, Callable[[], Any]]] = {
    "SFTTrainer": (SFTTrainer, SFTConfig, _policy),
    "DPOTrainer": (DPOTrainer, DPOConfig, _policy),
    "KTOTrainer": (KTOTrainer, KTOConfig, _policy),
    "RewardTrainer": (RewardTrainer, RewardConfig, _judge),
}


@dataclass(frozen=True)
class Case:
    """A job.

    Args:
        trainer: TRL's name of it.
        data: returns that many samples.
        options: of its config.
        steps: of the optimizer.
        lora: whether an adapter is trained, as `peft_config`.
        evaluate: samples to evaluate at the end, if any.
        memory: of our config, in the sharded run.
    """

    trainer: str
    data: Callable[[int], dict[str, list[Any]]]
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 3
    lora: bool = False
    evaluate: int = 0
    memory: Any = None


@cache
def _recording(base: Any) -> Any:
    class Recording(base):  # type: ignore[misc]
        """A TRL trainer that remembers each micro-step's loss as it was computed, which logs
        round.
        """

        def __init__(self, **kwargs: Any) -> None:
            self.losses: list[float] = []
            self.tokens: set[int] = set()
            super().__init__(**kwargs)
            for module in (self.model, getattr(self, "ref_model", None) or nn.Identity()):
                layers = [
                    layer for name, layer in module.named_modules() if name.endswith("q_proj")
                ]
                for layer in layers[:1]:
                    layer.register_forward_pre_hook(self._count)

        def _count(self, _module: Any, args: tuple[Tensor, ...]) -> None:
            self.tokens.add(args[0].shape[1])

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = super().training_step(*args, **kwargs)
            self.losses.append(float(loss))
            return loss

    return Recording


def make_trainer(case: Case, mode: Mode, folder: str) -> Any:
    """Returns the trainer of a job, which trains batches of four samples of all processes
    together.
    """
    AcceleratorState._reset_state(True)
    trl.trainer.utils._ChunkedLogProbFunction = ExactHead
    base, config, model = _TRAINERS[case.trainer]
    options: dict[str, Any] = {
        "gradient_checkpointing": False,
        "bf16": False,
        "save_strategy": "no",
        **case.options,
    }
    options.update(engine_options(mode.engine))
    if mode.world_size > 1:
        axis = "dp_shard_size" if mode.engine == "FSDP2" else "dp_replicate_size"
        options["parallelism_config"] = ulysses_accel.ParallelismConfig(
            sp_size=mode.sp, cp_size=mode.cp, memory_config=case.memory, **{axis: mode.dp}
        )
    arguments = config(
        output_dir=folder,
        max_steps=case.steps,
        per_device_train_batch_size=4 // mode.dp,
        per_device_eval_batch_size=4 // mode.dp,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    kwargs: dict[str, Any] = {"train_dataset": Dataset.from_dict(case.data(24))}
    if case.evaluate:
        kwargs["eval_dataset"] = Dataset.from_dict(case.data(case.evaluate))
    if case.lora:
        torch.manual_seed(5)
        # Random from the start: with an adapter of zeros nothing but rounding tells policy and
        # reference apart.
        kwargs["peft_config"] = LoraConfig(**LORA, init_lora_weights=False)
    elif case.trainer in ("DPOTrainer", "KTOTrainer"):
        kwargs["ref_model"] = build("llama", seed=3)
    policy = model()
    if mode.engine == "ZeRO-3":
        # DeepSpeed 0.19 keeps ZeRO-3's weights in float32 where the CPU has no float16
        # instructions; where it has them it takes the model's own dtype, and refuses float64.
        policy = policy.float()
    return _recording(base)(model=policy, args=arguments, processing_class=tokenizer(), **kwargs)


def run(case: Case, mode: Mode, folder: str) -> dict[str, Any]:
    """Trains a job to its end; returns losses, logs as JSON, parameters and the lengths of what
    layers saw.
    """
    trainer = make_trainer(case, mode, folder)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    if case.evaluate:
        logs.append(trainer.evaluate())
    return {
        "losses": trainer.losses,
        "logs": json.dumps(logs),
        "parameters": {
            name: value.clone() for name, value in full_parameters(trainer.model_wrapped).items()
        },
        "tokens": sorted(trainer.tokens),
    }


def run_all(cases: dict[str, Case], mode: Mode, folder: str) -> dict[str, dict[str, Any]]:
    """Returns what each job gave."""
    # The Trainer collects garbage at every start, among all that was imported before the fork.
    gc.freeze()
    return {name: run(case, mode, folder) for name, case in cases.items()}


# Times, and rates made of them.
_MEASURED = ("runtime", "per_second", "flos")
# The Trainer adds up losses of several steps in float32.
_ROUNDED = ("loss", "eval_loss")


def differences(ours: dict[str, Any], expected: dict[str, Any], tolerance: float) -> dict[str, Any]:
    """Returns what differs between two runs of a job."""
    found: dict[str, Any] = {}
    if not _close(ours["losses"], expected["losses"], tolerance):
        found["losses"] = (ours["losses"], expected["losses"])
    logs = zip(json.loads(ours["logs"]), json.loads(expected["logs"]), strict=True)
    for step, (own, other) in enumerate(logs):
        assert own.keys() == other.keys(), (own, other)
        for name in own:
            near = _close(
                [own[name]], [other[name]], 1e-6 if name in _ROUNDED else max(tolerance, 1e-9)
            )
            if not near and not any(part in name for part in _MEASURED):
                found[f"{name} of step {step + 1}"] = (own[name], other[name])
    for name, value in expected["parameters"].items():
        error = float((ours["parameters"][name] - value).norm() / value.norm().clamp(min=1e-12))
        if error > max(tolerance, 1e-9):
            found[name] = error
    return found


def _close(ours: Sequence[float], expected: Sequence[float], tolerance: float) -> bool:
    near = [
        abs(a - b) <= tolerance * max(abs(b), 1e-3) for a, b in zip(ours, expected, strict=True)
    ]
    return bool(near) and all(near)
