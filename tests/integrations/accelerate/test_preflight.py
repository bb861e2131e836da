"""What `prepare` refuses about a model is what `supports` names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from tests.helpers.architectures import GROUPED
from tests.helpers.engine_jobs import error_of
from tests.helpers.ranks import run_ranks
from ulysses_accel import MemoryConfig, ParallelismConfig, supports


def llama(**changes: Any) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**GROUPED, **changes}))


def prompt_tuned() -> Any:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)  # type: ignore[arg-type]
    return get_peft_model(llama(), config)


def lora() -> Any:
    return get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))


def t5() -> Any:
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4}
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=64, **sizes))


def patched() -> Any:
    model = llama()
    stock = model.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = stock(*args, **kwargs)
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden + hidden.mean(1, keepdim=True)
        return output

    model.model.forward = forward
    return model


def in_bytes() -> Any:
    model = llama().requires_grad_(False)
    model.lm_head.weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)
    return model


def on_meta() -> Any:
    with torch.device("meta"):
        return llama()


def mixtral(num_experts: int = 4) -> Any:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, num_local_experts=num_experts))


def without_head() -> Any:
    return hf.LlamaModel(hf.LlamaConfig(**GROUPED))


@dataclass(frozen=True)
class Case:
    """A model and sizes.

    Args:
        model: builds it.
        sizes: of the config.
        memory: its memory features.
    """

    model: Callable[[], Any]
    sizes: dict[str, int]
    memory: dict[str, Any] = field(default_factory=dict)

    def config(self) -> ParallelismConfig:
        memory = MemoryConfig(**self.memory) if self.memory else None
        return ParallelismConfig(memory_config=memory, **self.sizes)


SP, CP, TP, EP = {"sp_size": 2}, {"cp_size": 2}, {"tp_size": 2}, {"ep_size": 2}
REFUSED = {
    "virtual tokens": Case(prompt_tuned, SP),
    "virtual tokens, ring": Case(prompt_tuned, CP),
    "own attention and positions": Case(t5, SP),
    "mixes tokens": Case(patched, SP),
    "heads": Case(lambda: llama(num_attention_heads=1, num_key_value_heads=1), SP),
    "tensor parallel heads": Case(
        lambda: llama(num_attention_heads=3, num_key_value_heads=3, hidden_size=24), TP
    ),
    "parameters in bytes": Case(in_bytes, TP),
    "parameters without values": Case(on_meta, TP),
    "experts and tensor parallel": Case(mixtral, TP),
    "no experts": Case(llama, EP),
    "odd experts": Case(lambda: mixtral(3), EP),
    "no head": Case(without_head, SP, {"tiled_loss": True}),
}
ACCEPTED = {
    "plain": Case(llama, SP),
    "adapters": Case(lora, SP),
    "tensor parallel": Case(llama, TP),
    "experts": Case(mixtral, EP),
    "memory": Case(llama, SP, {"tiled_loss": True, "tiled_mlp": True, "checkpoint": True}),
}


def prepare(case: Case) -> str:
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, parallelism_config=case.config())
    return error_of(accelerator.prepare, case.model())


@pytest.mark.parametrize("name", REFUSED)
def test_supports_names_what_prepare_refuses(name: str) -> None:
    findings = supports(REFUSED[name].model(), REFUSED[name].config())
    first, second = run_ranks(prepare, 2, REFUSED[name], init=False)
    assert first == second
    assert findings
    for finding in findings:
        assert str(finding).strip() in first


@pytest.mark.parametrize("name", ACCEPTED)
def test_supports_names_nothing_that_prepare_takes(name: str) -> None:
    assert supports(ACCEPTED[name].model(), ACCEPTED[name].config()) == []
    assert run_ranks(prepare, 2, ACCEPTED[name], init=False) == ["", ""]
