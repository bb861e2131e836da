"""An adapter on a quantized base: the sharded step is that of one process with the same quantized
weights.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from tests.helpers.batches import CASES, Sample, loader
from tests.helpers.models import CONFIGS
from tests.helpers.parity_jobs import (
    Engine,
    Grads,
    Report,
    assert_parity,
    compare,
    counted_linear_tokens,
    report,
)
from tests.helpers.ranks import run_ranks
from tests.helpers.support import Support
from tests.helpers.trl_jobs import LORA

KINDS = ("packed", "padded right")
# 4 bits: weights are made float32 before each product, so only the order of sums differs. 8 bits:
# each token's inputs are rounded to int8, where a difference of one rounding becomes one of 1/127
# of the row's largest value.
PRECISIONS: dict[str, tuple[dict[str, Any], float]] = {
    "4 bits": (
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.float32,
        },
        1e-5,
    ),
    "8 bits": ({"load_in_8bit": True}, 2e-2),
}


def quantized(folder: str, options: dict[str, Any]) -> Any:
    """Returns a quantized Llama, loaded as a user loads it, with an adapter."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**CONFIGS["llama"]().to_dict(), **sizes})).save_pretrained(
        folder
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(**options),
        device_map={"": "cpu"},
        dtype=torch.float32,
    )
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    return get_peft_model(base, LoraConfig(**LORA, init_lora_weights=False)).train()


def trained_gradients(model: Any) -> Grads:
    found = {
        name.removeprefix("module."): p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    model.zero_grad()
    return found


def sharded(model: Any, sizes: dict[str, int], expected: dict[str, tuple[float, Grads]]) -> Report:
    """Returns how far each step is from one process's."""
    accelerator = Engine().accelerator(**sizes)
    samples: list[Sample] = [CASES[kind](0) for kind in KINDS]
    model, batches = accelerator.prepare(model, loader(samples))
    found = {}
    for kind, batch in zip(KINDS, batches, strict=True):
        with counted_linear_tokens(model) as tokens:
            loss = model(**batch).loss
        assert max(tokens) < CASES[kind](0).plain["input_ids"].numel(), (
            "every rank computed all tokens"
        )
        accelerator.backward(loss)
        own, (other, grads) = trained_gradients(model), expected[kind]
        found[kind] = report(compare(float(loss.detach()), own, other, grads))
    return found


@pytest.mark.parametrize(("name", "mode"), [("4 bits", "sp"), ("4 bits", "cp"), ("8 bits", "sp")])
def test_an_adapter_on_a_quantized_base(
    name: str, mode: str, tmp_path: Any, support: Support
) -> None:
    options, tolerance = PRECISIONS[name]
    model = quantized(str(tmp_path), options)
    expected = {}
    for kind in KINDS:
        loss = model(**CASES[kind](0).plain).loss
        loss.backward()
        expected[kind] = (float(loss.detach()), trained_gradients(model))
    sizes = {"sp_size": 2} if mode == "sp" else {"sp_size": 1, "cp_size": 2}
    assert_parity(
        run_ranks(sharded, 2, model, sizes, expected, init=False), tolerance, count=len(KINDS)
    )
    code = (
        f"from_pretrained(name, quantization_config=BitsAndBytesConfig(load_in_{name[0]}bit=True))"
    )
    support("system", f"LoRA on a base of {name}", mode, code=code)
