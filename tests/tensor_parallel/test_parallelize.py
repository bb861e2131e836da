"""What tensor parallelism refuses, and what it saves, loads and restores."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    MixtralConfig,
    Olmo2Config,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.helpers.batches import CASES, loader
from tests.helpers.engine_jobs import batches_of, documents, error_of
from tests.helpers.models import _GROUPED, CONFIGS, build
from tests.helpers.parity_jobs import EXACT, compare, full_gradients, full_parameters, plain_step
from tests.helpers.ranks import run_ranks
from tests.helpers.support import Support
from tests.helpers.tensor_parallel_jobs import ADAM, FAMILIES, Setup
from ulysses_accel import MemoryConfig, ParallelismConfig
from ulysses_accel.attention.huggingface.registry import describe_forward
from ulysses_accel.errors import BatchError, ConfigError, UnsupportedModelError
from ulysses_accel.sequence.description import SequenceDescription
from ulysses_accel.tensor_parallel.feature import TensorParallel
from ulysses_accel.tensor_parallel.parallelize import DecoderEntry, WeightSharding
from ulysses_accel.tensor_parallel.plan import make_plan

REFUSED: dict[str, tuple[Any, int, str]] = {
    "heads": (
        CONFIGS["qwen2"],
        4,
        "tp_size=4 (from test) does not divide num_attention_heads=4 and num_key_value_heads=2",
    ),
    "experts": (
        lambda: MixtralConfig(**_GROUPED, num_local_experts=2),
        2,
        "how to shard model.layers.0.mlp",
    ),
    "wide norms": (
        lambda: Olmo2Config(**_GROUPED),
        2,
        "how to shard model.layers.0.self_attn.q_norm.weight",
    ),
    "features": (
        lambda: CONFIGS["llama"]().__class__(**{**_GROUPED, "intermediate_size": 47}),
        2,
        "mlp.gate_proj",
    ),
    "other layers": (CONFIGS["gpt2"], 2, "no decoder with a list of layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_is_not_cut_is_refused_by_the_part(name: str, support: Support) -> None:
    config, tp_size, fact = REFUSED[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config())
    with pytest.raises(UnsupportedModelError) as refusal:
        make_plan(model, tp_size, "test")
    assert fact in str(refusal.value)
    assert "Use tp_size" in str(refusal.value)
    if name == "experts":
        support.refused(
            "model", "Mixture of experts", "tp", "experts are not cut by tensor parallelism"
        )


def test_the_legal_sizes_are_named() -> None:
    with pytest.raises(
        UnsupportedModelError, match="Use tp_size 1 or 2, and sp_size or cp_size for the rest"
    ):
        make_plan(build("qwen2"), 4, "test")


class Stub:
    """An accelerator, or its session, as far as an engine is looked at."""

    def __init__(self, distributed_type: DistributedType = DistributedType.NO) -> None:
        self.distributed_type = distributed_type

    def close(self) -> None:
        """Closes nothing."""


@pytest.mark.parametrize("setting", ["tiled_mlp", "tiled_norm", "tiled_loss"])
def test_tiles_are_refused_by_name(setting: str) -> None:
    config = ParallelismConfig(tp_size=2, memory_config=MemoryConfig(**{setting: True}))
    with pytest.raises(ConfigError, match=rf"tp_size=2 \(from constructor\) with {setting}=True"):
        TensorParallel(config, Stub(DistributedType.MULTI_CPU), Stub())


def test_deepspeed_is_refused(support: Support) -> None:
    with pytest.raises(ConfigError, match=r"tp_size=2 .* with DeepSpeed.*Use FSDP2, or no engine"):
        TensorParallel(ParallelismConfig(tp_size=2), Stub(DistributedType.DEEPSPEED), Stub())
    support.refused(
        "system", "Tensor parallelism under DeepSpeed", "tp", "its engines keep no cut parameters"
    )


class Rows(nn.Module):
    """Gives a model embeddings in place of tokens, as a vision tower's caller does."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model

    def forward(
        self, input_ids: torch.Tensor, table: torch.Tensor, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        return self.inner(inputs_embeds=nn.functional.embedding(input_ids, table), **kwargs)  # type: ignore[no-any-return]


def _without_engine(folder: str) -> dict[str, Any]:
    accelerator = Setup("Gemma", {"tp": 2}).accelerator()
    stock_state = Accelerator.get_state_dict
    plain = build("", config=FAMILIES["Gemma"]())
    expected = {name: value.clone() for name, value in plain.state_dict().items()}
    quantized = build("llama").requires_grad_(False)
    quantized.lm_head.weight = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
    found = {"quantized": error_of(accelerator.prepare, quantized)}
    model, optimizer = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters()))
    found["again"] = error_of(accelerator.prepare, Rows(plain))
    state = accelerator.get_state_dict(model)
    found["is_whole"] = (
        state.keys() == expected.keys() if accelerator.is_main_process else not state
    )
    found["is_same"] = all(torch.equal(state[name], expected[name]) for name in state)
    found["is_tied"] = model.lm_head.weight is model.model.embed_tokens.weight
    weights = [parameter.to_local() for parameter in model.parameters()]
    # Parts that were views would keep the whole weights alive.
    found["is_small"] = all(own.untyped_storage().nbytes() == own.nbytes for own in weights)
    found["rank"], found["enabled"] = (
        accelerator.tensor_parallel_rank,
        accelerator.parallelism_config.tp_enabled,
    )
    found["save"] = error_of(accelerator.save_state, folder)
    found["save model"] = error_of(model.save_pretrained, folder)
    if accelerator.is_main_process:
        model.save_pretrained(folder, state_dict=dict(state))
        loaded = type(model).from_pretrained(folder, dtype=torch.float64).state_dict()
        found["is_same"] &= all(torch.equal(state[name], loaded[name]) for name in loaded)
    ids = torch.arange(3, 19)[None]
    found["loose batch"] = error_of(model, input_ids=ids, labels=ids)
    parameters = {id(parameter) for parameter in model.parameters()}
    other = CASES["plain"](accelerator.process_index)
    for batch in accelerator.prepare(loader([other])):
        found["other batch"] = error_of(model, **batch)
    found["is_stepped"] = {
        id(each) for group in optimizer.param_groups for each in group["params"]
    } == parameters
    accelerator.sequence_parallel.close()
    found["is_restored"] = accelerator.get_state_dict.__func__ is stock_state
    found["is_restored"] &= not {"save_state", "save_pretrained"} & {
        *vars(accelerator),
        *vars(model),
    }
    return found


def _in_any_order() -> dict[str, Any]:
    """Prepares an optimizer before its model, part of which is frozen; then what can't be put right
    is refused.
    """
    sample, found = CASES["packed"](0), {}
    accelerator, model, reference = (
        Setup("Llama", {"tp": 2}).accelerator(),
        build("llama"),
        build("llama"),
    )
    for one in (model, reference):
        one.model.norm.requires_grad_(False)
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), **ADAM))
    model = accelerator.prepare(model)
    plain_optimizer = torch.optim.AdamW(reference.parameters(), **ADAM)
    plain_step(reference, [sample])
    plain_optimizer.step()
    for batch in accelerator.prepare(loader([sample])):
        accelerator.backward(model(**batch).loss)
    optimizer.step()
    after = full_parameters(model)
    found["difference"] = max(
        float((after[name] - value).abs().max()) for name, value in reference.state_dict().items()
    )
    found["stepped"] = error_of(accelerator.prepare, reference, plain_optimizer)
    torch.manual_seed(accelerator.process_index)
    dropping = LlamaForTokenClassification(LlamaConfig(**_GROUPED))
    dropping, batches = accelerator.prepare(dropping, loader([sample]))
    for batch in batches:
        found["seeds"] = error_of(dropping, **{**batch, "labels": batch["input_ids"] % 2})
    return found


def test_optimizers_and_models_are_prepared_in_any_order() -> None:
    for found in run_ranks(_in_any_order, 2, init=False):
        # Adam divides gradients by their size, so that their rounding is seen.
        assert found["difference"] <= 1e-11
        assert (
            "the optimizer (AdamW) has made steps with parameters that are sharded"
            in found["stepped"]
        )
        assert (
            "the random state of tp_size=2 ranks, which drop the same features after"
            in found["seeds"]
        )


def test_without_an_engine(tmp_path: Path) -> None:
    for rank, found in enumerate(run_ranks(_without_engine, 2, str(tmp_path), init=False)):
        assert all(
            found[name]
            for name in ("is_whole", "is_same", "is_tied", "is_small", "is_stepped", "is_restored")
        ), found
        assert (found["rank"], found["enabled"]) == (rank, True)
        assert found["save"].startswith(
            "ConfigError: save_state with tensor parallelism and no engine"
        )
        assert found["save model"].startswith("ConfigError: save_pretrained without state_dict")
        assert found["loose batch"].startswith(
            "BatchError: a model that is sharded over tp_size=2 ranks"
        )
        assert (
            "the first batch of tp_size=2 ranks is not the same on all ranks: checksum"
            in found["other batch"]
        )
        assert (
            "lm_head.weight of LlamaForCausalLM is a Parameter of torch.int8" in found["quantized"]
        )
        assert "embed_tokens.weight of GemmaForCausalLM is a " in found["again"]


def _resumed(folder: str) -> dict[str, Any]:
    setup = Setup("Phi-3", {"tp": 2, "sp": 2}, fsdp2=True)
    accelerator = setup.accelerator()
    model = build("", config=FAMILIES["Phi-3"]())
    names = set(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches_of(2))
    found = {"plugin": accelerator.state.fsdp_plugin.cpu_ram_efficient_loading}

    def step(batch: dict[str, Any]) -> None:
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()

    for number, batch in enumerate(batches):
        step(batch)
        if number == 0:
            accelerator.save_state(folder)
    after = full_parameters(model)
    accelerator.load_state(folder)
    found["is_another"] = not torch.equal(
        full_parameters(model)["lm_head.weight"], after["lm_head.weight"]
    )
    step(batch)
    found["difference"] = max(
        float((full_parameters(model)[name] - value).abs().max()) for name, value in after.items()
    )
    state = accelerator.get_state_dict(model)
    found["is_whole"] = set(state) == (names if accelerator.is_main_process else set())
    return found


def test_fsdp2_saves_and_loads_all_parts(tmp_path: Path) -> None:
    for found in run_ranks(_resumed, 4, str(tmp_path), init=False):
        assert all(found[name] for name in ("is_whole", "is_another", "plugin")), found
        assert found["difference"] == 0.0


def _embedded() -> tuple[float, float, float]:
    table = torch.randn(64, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sample = CASES["packed"](3)
    reference = build("llama")
    losses, grads = plain_step(
        reference, [sample], lambda model, each: Rows(model)(table=table, **each.plain).loss
    )
    accelerator = Setup("Llama", {"tp": 2}).accelerator()
    model, batches = accelerator.prepare(Rows(build("llama")), loader([sample]))
    for batch in batches:
        loss = model(table=table, **batch).loss
        accelerator.backward(loss)
    model.inner.model.embed_tokens.weight.grad = torch.zeros_like(
        model.inner.model.embed_tokens.weight
    )
    found = {name.removeprefix("inner."): grad for name, grad in full_gradients(model).items()}
    difference = compare(float(loss.detach()), found, losses[0], grads)
    return difference.loss, difference.grad, difference.ratio


def test_embeddings_that_are_given_are_cut() -> None:
    for difference in run_ranks(_embedded, 2, init=False):
        assert max(map(abs, difference)) <= EXACT


def _classified(classes: list[Any]) -> list[float]:
    found = []
    for cls in classes:
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            models.append(
                cls(LlamaConfig(**_GROUPED, num_labels=3, classifier_dropout=0.0)).double()
            )
        model, reference = models
        labels = torch.arange(32).view(2, 16) % 3
        batch = {
            "input_ids": labels + 3,
            "labels": labels[:, 0] if "Sequence" in cls.__name__ else labels,
        }
        reference(**batch).loss.backward()
        accelerator = Setup("Llama", {"tp": 2}).accelerator()
        model, batches = accelerator.prepare(
            model, DataLoader([batch], batch_size=1, collate_fn=lambda rows: rows[0])
        )
        for shard in batches:
            accelerator.backward(model(**shard).loss)
        whole = full_gradients(model)
        right = {name: parameter.grad for name, parameter in reference.named_parameters()}
        found.append(
            max(float((whole[name] - grad).norm() / grad.norm()) for name, grad in right.items())
        )
    return found


def test_small_heads_are_computed_on_every_rank(support: Support) -> None:
    classes = [LlamaForSequenceClassification, LlamaForTokenClassification]
    for errors in run_ranks(_classified, 2, classes, init=False):
        # transformers computes norms in float32.
        assert len(errors) == 2
        assert max(errors) <= 1e-5
    for name in ("Sequence classification", "Token classification"):
        support("loss", name, "tp", code="ParallelismConfig(tp_size=2)")


def test_the_heads_of_a_rank_are_enough_for_ulysses() -> None:
    config = ParallelismConfig(tp_size=2, sp_size=4)
    weights = WeightSharding(config, None, torch.device("cpu"))  # type: ignore[arg-type]
    with pytest.raises(
        UnsupportedModelError, match=r"sp_size=4 .* is more than num_attention_heads=4 / tp_size=2"
    ):
        weights.shard(build("llama"))


def _trainer_logs(folder: str, sizes: dict[str, int], fsdp2: bool) -> list[dict[str, float]]:
    AcceleratorState._reset_state(True)
    options: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 1,
        "max_steps": 3,
    }
    if sizes:
        options["parallelism_config"] = ParallelismConfig(**sizes)
    if fsdp2:
        options["fsdp"] = "full_shard auto_wrap"
        options["fsdp_config"] = {"fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    model = build("", config=FAMILIES["Qwen3"]())
    trainer = Trainer(model, arguments, train_dataset=documents(8), eval_dataset=documents(5))  # type: ignore[arg-type]
    trainer.train()
    trainer.save_model(f"{folder}/final")
    kept = ("loss", "grad_norm", "eval_loss")
    return [
        {name: line[name] for name in kept if name in line} for line in trainer.state.log_history
    ]


def test_a_stock_trainer_gives_one_process_s_curve(tmp_path: Path, support: Support) -> None:
    (alone,) = run_ranks(_trainer_logs, 1, str(tmp_path / "alone"), {}, False, init=False)
    cut = str(tmp_path / "cut")
    for logs in run_ranks(_trainer_logs, 2, cut, {"tp_size": 2}, True, init=False):
        assert [line.keys() for line in logs] == [line.keys() for line in alone]
        for line, expected in zip(logs, alone, strict=True):
            assert line == pytest.approx(expected, rel=1e-10)
    whole = load_file(f"{cut}/final/model.safetensors")
    expected = load_file(tmp_path / "alone" / "final" / "model.safetensors")
    assert whole.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(whole[name], value, rtol=1e-9, atol=1e-9)
    code = "Trainer(model, TrainingArguments(parallelism_config=ParallelismConfig(tp_size=2), fsdp=..., ...))"
    support("trainer", "Trainer", "tp", code=code, engine="FSDP2")


def test_tokens_that_do_not_divide_are_refused() -> None:
    description = SequenceDescription.from_document_ids(torch.zeros(1, 5, dtype=torch.long), 1)
    entry = DecoderEntry(SimpleNamespace(size=lambda: 2))  # type: ignore[arg-type]
    with (
        describe_forward(description),
        pytest.raises(BatchError, match=r"5 tokens on this rank .* tp_size=2 ranks"),
    ):
        entry(nn.Identity(), (), {"input_ids": torch.zeros(1, 5, dtype=torch.long)})
