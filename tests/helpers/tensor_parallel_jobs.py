"""What ranks of a tensor parallel test run: gradients of some batches, and then one clipped
optimizer step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

# Imported before the fork, so that ranks start warm.
import torch.distributed._composable.replicate_with_fsdp
import torch.distributed.checkpoint.state_dict
import torch.distributed.tensor.parallel
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import (
    Gemma3TextConfig,
    GemmaConfig,
    GlmConfig,
    MistralConfig,
    Phi3Config,
    Qwen3Config,
)

from tests.helpers.batches import CASES, Sample, loader
from tests.helpers.models import _GROUPED, CONFIGS, build
from tests.helpers.parity_jobs import (
    Grads,
    Report,
    compare,
    data_rank,
    full_gradients,
    full_parameters,
    plain_step,
    report,
    zero_gradients,
)
from ulysses_accel import ParallelismConfig, use_fsdp_plugin
from ulysses_accel.integrations import attach as _attach_point  # noqa: F401
from ulysses_accel.introspection.profile import check_model

CLIP = 0.5
# A key's bias, which softmax cancels, has rounding errors for a gradient; Adam's usual epsilon
# would take them for one.
ADAM = {"lr": 1e-2, "eps": 1e-4}
KINDS = ("packed", "odd length")
_HEADS = {**_GROUPED, "head_dim": 8}
FAMILIES: dict[str, Callable[[], Any]] = {
    "Llama": CONFIGS["llama"],
    "Qwen2": CONFIGS["qwen2"],
    # Norms of each head.
    "Qwen3": lambda: Qwen3Config(**_HEADS),
    # A window over the edges of the ranks' tokens.
    "Mistral": lambda: MistralConfig(**_GROUPED, sliding_window=6),
    # Logits by the embedding's matrix, of which the last rank has a word less.
    "Gemma": lambda: GemmaConfig(**{**_HEADS, "vocab_size": 67}, tie_word_embeddings=True),
    # Norms behind attention and MLP, two kinds of positions, a scaled embedding.
    "Gemma 3": lambda: Gemma3TextConfig(
        **_HEADS,
        sliding_window=6,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    # Fused projections.
    "Phi-3": lambda: Phi3Config(**_GROUPED, resid_pdrop=0.0),
    "GLM": lambda: GlmConfig(**_HEADS),
    # Biases behind the reduce-scatter, attention and MLP side by side.
    "Phi": CONFIGS["phi"],
}


@dataclass(frozen=True)
class Setup:
    """One accelerator and its model.

    Args:
        family: a key of `FAMILIES`.
        sizes: of the mesh axes, without `_size`.
        fsdp2: whether FSDP2 is the engine; none otherwise.
        kinds: of batches.
        change: done to the model before it is prepared.
        arguments: further ones of `ParallelismConfig`.
    """

    family: str
    sizes: dict[str, int]
    fsdp2: bool = False
    kinds: tuple[str, ...] = KINDS
    change: Callable[[Any], None] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What identifies it in a report."""
        return f"{self.family} {self.sizes} {'FSDP2' if self.fsdp2 else ''}"

    @property
    def data_size(self) -> int:
        """Different batches at once."""
        return self.sizes.get("dp_replicate", 1) * self.sizes.get("dp_shard", 1)

    def accelerator(self) -> Accelerator:
        """Returns an accelerator that shares nothing with an earlier one of this process."""
        AcceleratorState._reset_state(True)
        for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
            os.environ.pop(name, None)
        sizes: dict[str, Any] = {f"{axis}_size": size for axis, size in self.sizes.items()}
        config = ParallelismConfig(**sizes, **self.arguments)
        # Efficient loading must not get in the way of weights that are cut already.
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=True,
        )
        if not self.fsdp2:
            return Accelerator(cpu=True, parallelism_config=config)
        return Accelerator(
            cpu=True, parallelism_config=config, fsdp_plugin=use_fsdp_plugin(config, plugin)
        )


@dataclass(frozen=True)
class Expected:
    """One process's run: for each kind of batch the samples, losses and gradients, then the step
    after the last.
    """

    steps: list[tuple[str, list[Sample], list[float], Grads]]
    norm: float
    parameters: Grads


def expected(setup: Setup) -> Expected:
    """Returns what one process computes."""
    model = build("", config=FAMILIES[setup.family]())
    check_model(model, 1)  # reads its classes' sources before the fork, once for all ranks
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    steps = []
    for number, kind in enumerate(setup.kinds):
        samples = [CASES[kind](10 * number + rank) for rank in range(setup.data_size)]
        steps.append((kind, samples, *plain_step(model, samples)))
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), CLIP))
    optimizer.step()
    return Expected(steps, norm, full_parameters(model))


@dataclass
class Sizes:
    """What each norm and linear layer saw: tokens of a row and features."""

    norms: set[tuple[int, ...]] = field(default_factory=set)
    linears: dict[str, set[tuple[int, ...]]] = field(default_factory=dict)


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-any-return]


@contextmanager
def observed(model: nn.Module) -> Iterator[Sizes]:
    """Collects the local shapes that enter the layers' norms and leave their linear layers."""
    sizes, handles = Sizes(), []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last.endswith("layernorm"):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args: sizes.norms.add(_local(args[0]).shape)
                )
            )
        elif isinstance(module, nn.Linear) and last != "lm_head":
            seen = sizes.linears.setdefault(last, set())
            handles.append(
                module.register_forward_hook(
                    lambda _, __, out, seen=seen: seen.add(_local(out).shape)
                )
            )
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()


def check_shares(sizes: Sizes, setup: Setup, batch: dict[str, Tensor], model: Any) -> None:
    """Asserts that norms saw 1/T of a rank's tokens, and that linear layers computed 1/T of the
    features.
    """
    rows, tokens = batch["input_ids"].shape
    tp_size, config = setup.sizes["tp"], model.config
    assert sizes.norms == {(rows, tokens // tp_size, config.hidden_size)}
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    widths = {
        "q_proj": heads,
        "k_proj": keys,
        "qkv_proj": heads + 2 * keys,
        "fc1": config.intermediate_size,
    }
    widths |= {"gate_proj": config.intermediate_size, "gate_up_proj": 2 * config.intermediate_size}
    known = {name: width for name, width in widths.items() if name in sizes.linears}
    assert len(known) >= 2
    for name, width in known.items():
        assert sizes.linears[name] == {(rows, tokens, width // tp_size)}, name


def tensor_parallel_steps(setups: Sequence[Setup], wanted: Sequence[Expected]) -> Report:
    """Returns how far each gradient, norm and parameter is from one process's."""
    results: Report = {}
    for setup, right in zip(setups, wanted, strict=True):
        results |= _steps_of(setup, right)
    return results


def _steps_of(setup: Setup, right: Expected) -> Report:
    accelerator = setup.accelerator()
    plain = build("", config=FAMILIES[setup.family]())
    if setup.change is not None:
        setup.change(plain)
    if accelerator.process_index:
        with torch.no_grad():
            for parameter in plain.parameters():
                # Only rank 0 has the weights; as after a load that is efficient.
                parameter.zero_()
    optimizer = torch.optim.AdamW(plain.parameters(), **ADAM)
    samples = [sample for _, together, _, _ in right.steps for sample in together]
    model, optimizer, batches = accelerator.prepare(plain, optimizer, loader(samples))
    results: Report = {}
    for (kind, _, losses, grads), batch in zip(right.steps, batches, strict=True):
        zero_gradients(model)
        with observed(plain) as sizes:
            loss = model(**batch).loss
        check_shares(sizes, setup, batch, plain)
        accelerator.backward(loss)
        found = compare(
            float(loss.detach()), full_gradients(model), losses[data_rank(accelerator)], grads
        )
        results[f"{setup.name}: {kind}"] = report(found)
    norm = float(accelerator.clip_grad_norm_(model.parameters(), CLIP))
    optimizer.step()
    results[f"{setup.name}: step"] = report(
        compare(norm, full_parameters(model), right.norm, right.parameters)
    )
    return results
