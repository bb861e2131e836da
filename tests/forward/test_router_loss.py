"""The load balancing loss of routers over a sharded sequence equals one process's, and so do all
gradients.

The reference computes it in float64 of the router logits of the whole batch; transformers' own
function, which sums in float32, is compared with it to 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo  # imported before the fork, once for all ranks
import transformers as hf
from torch import Tensor, nn
from transformers.models.mixtral import modeling_mixtral as mixtral

from tests.helpers.batches import CASES, Sample, loader
from tests.helpers.models import HIDDEN, VOCAB, build
from tests.helpers.parity_jobs import (
    EXACT,
    Engine,
    Report,
    assert_parity,
    compare,
    data_rank,
    full_gradients,
    plain_step,
    report,
    zero_gradients,
)
from tests.helpers.ranks import run_ranks
from tests.parity.test_engines import FLOAT32, keep_gradients
from ulysses_accel import MemoryConfig, supports
from ulysses_accel.config.parallelism import ParallelismConfig
from ulysses_accel.errors import UnsupportedModelError
from ulysses_accel.forward.router_loss import RouterLosses
from ulysses_accel.installation import Installation
from ulysses_accel.introspection.profile import profile_of
from ulysses_accel.introspection.routers import computes_load_balance
from ulysses_accel.memory.apply import apply_memory

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
    # Large, so that a wrong router loss is seen in every gradient.
    "router_aux_loss_coef": 0.7,
    "output_router_logits": True,
}
_FINE = {**_SIZES, "moe_intermediate_size": 16, "num_experts": 4}
MODELS: dict[str, Callable[[], Any]] = {
    "Mixtral": lambda: hf.MixtralConfig(**_SIZES, num_local_experts=4),
    "Qwen2-MoE": lambda: hf.Qwen2MoeConfig(**_FINE, shared_expert_intermediate_size=16),
    "Qwen3-MoE": lambda: hf.Qwen3MoeConfig(**_FINE, head_dim=8),
    "OLMoE": lambda: hf.OlmoeConfig(**_SIZES, num_experts=4),
    "GraniteMoE": lambda: hf.GraniteMoeConfig(**_SIZES, num_local_experts=4),
}
COEFFICIENT = 0.7


@pytest.fixture(autouse=True)
def _float64_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers cast to float32, whose rounding would hide a wrong term of the router loss below
    1e-7.
    """
    keep_float64(monkeypatch.setattr)


def keep_float64(put: Callable[..., None]) -> None:
    softmax, cast = nn.functional.softmax, torch.Tensor.type
    put(torch.Tensor, "float", torch.Tensor.double)
    put(
        torch.Tensor,
        "type",
        lambda tensor, kind: cast(tensor, torch.float64 if kind is torch.float32 else kind),
    )
    put(nn.functional, "softmax", lambda tensor, dim=None, dtype=None: softmax(tensor, dim=dim))


def build_experts(name: str) -> Any:
    config = MODELS[name]()
    config._experts_implementation = "eager"
    return build(name, config=config)


def balance(logits: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
    """Returns the loss as the paper writes it: experts times the sum of shares of choices times
    mean probabilities.
    """
    rows = torch.cat(logits)
    if mask is not None:
        rows = rows[mask.bool().reshape(-1).repeat(len(logits))]
    probabilities = rows.softmax(-1)
    chosen = (
        nn.functional.one_hot(probabilities.topk(2, -1).indices, rows.shape[-1])
        .double()
        .sum(1)
        .mean(0)
    )
    return rows.shape[-1] * (chosen * probabilities.mean(0)).sum()


def reference_loss(model: Any, sample: Sample, num_items: int | None = None) -> Tensor:
    output = model(**sample.plain, output_router_logits=True)
    found = balance(output.router_logits, sample.plain.get("attention_mask"))
    torch.testing.assert_close(output.aux_loss.double(), found, rtol=1e-6, atol=0)
    tokens = model(**sample.plain, output_router_logits=False, num_items_in_batch=num_items).loss
    loss: Tensor = tokens + COEFFICIENT * found
    return loss


def reference_steps(
    names: list[str], cases: list[str], dp_size: int
) -> dict[str, list[tuple[str, Any]]]:
    steps: dict[str, list[tuple[str, Any]]] = {}
    for name in names:
        model = build_experts(name)
        for number, case in enumerate(cases):
            samples = [CASES[case](2 * number + rank) for rank in range(dp_size)]
            steps.setdefault(name, []).append(
                (case, (samples, *plain_step(model, samples, reference_loss)))
            )
    return steps


def seen_rows(model: Any) -> list[int]:
    """Collects the tokens that enter each router."""
    rows: list[int] = []
    for module in model.modules():
        if "Router" in type(module).__name__:
            module.register_forward_hook(lambda _m, _a, output: rows.append(output[0].shape[0]))
    return rows


def parity_job(
    steps: dict[str, list[tuple[str, Any]]],
    sp_size: int,
    cp_size: int,
    dp_size: int,
    prepare: Callable[[Any], Any],
) -> Report:
    found: Report = {}
    for name, cases in steps.items():
        accelerator = Engine().accelerator(sp_size, dp_size, cp_size=cp_size)
        model = build_experts(name)
        prepare(model)
        rows = seen_rows(model)
        samples = [sample for _, (together, _, _) in cases for sample in together]
        model, batches = accelerator.prepare(model, loader(samples))
        for (case, (_, losses, grads)), batch in zip(cases, batches, strict=True):
            zero_gradients(model)
            output = model(**batch)
            description = batch["sequence_description"]
            assert rows[-1] == description.batch_size * description.sequence_length // (
                sp_size * cp_size
            )
            assert output.router_logits is None
            accelerator.backward(output.loss)
            own = losses[data_rank(accelerator)]
            found[f"{name}: {case}"] = report(
                compare(float(output.loss.detach()), full_gradients(model), own, grads)
            )
    return found


def plain(model: Any) -> None:
    """Leaves the model as it is."""


# Tokens are told by positions, by a mask, and by what was added to make the length even.
CASE_NAMES = {"sp": ["padded right", "odd length"], "cp": ["packed"]}
CODE = 'model = AutoModelForCausalLM.from_pretrained("...", output_router_logits=True)'


@pytest.mark.parametrize("mesh", ["sp", "cp"])
def test_two_ranks(mesh: str, support: Any) -> None:
    sizes = (2, 1, 1) if mesh == "sp" else (1, 2, 1)
    steps = reference_steps(list(MODELS), CASE_NAMES[mesh], 1)
    assert_parity(
        run_ranks(parity_job, 2, steps, *sizes, plain), count=len(CASE_NAMES[mesh]) * len(MODELS)
    )
    for name in MODELS:
        support("model", f"{name}, router loss", mesh, code=CODE)


@pytest.mark.parametrize("mesh", ["cp × sp", "dp × sp"])
def test_four_ranks(mesh: str, support: Any) -> None:
    sizes = (2, 2, 1) if mesh == "cp × sp" else (2, 1, 2)
    steps = reference_steps(["Mixtral", "Qwen3-MoE"], ["packed", "padded left"], sizes[2])
    assert_parity(run_ranks(parity_job, 4, steps, *sizes, plain), count=4)
    for name in steps:
        support("model", f"{name}, router loss", mesh, code=CODE)


def engine_job(engine: Engine, steps: dict[str, list[tuple[str, Any]]]) -> Report:
    (case, ((sample,), (loss,), grads)) = steps["Mixtral"][0]
    accelerator = engine.accelerator(2)
    model = build_experts("Mixtral").to(
        torch.float32 if engine.name == "deepspeed" else torch.float64
    )
    model, _, batches = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.0), loader([sample])
    )
    gradients = keep_gradients(model)
    (batch,) = batches
    output = model(**batch)
    accelerator.backward(output.loss)
    return {case: report(compare(float(output.loss.detach()), gradients(), loss, grads))}


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("FSDP2", Engine("fsdp2")),
        ("ZeRO-2", Engine("deepspeed", 2)),
        ("ZeRO-3", Engine("deepspeed", 3)),
    ],
)
def test_engines(name: str, engine: Engine, support: Any) -> None:
    steps = reference_steps(["Mixtral"], ["padded right"], 1)
    # DeepSpeed's gradients are float32, see tests/parity/test_engines.py.
    assert_parity(
        run_ranks(engine_job, 2, engine, steps),
        EXACT if engine.name == "fsdp2" else FLOAT32,
        count=1,
    )
    support("model", "Mixtral, router loss", "sp", code=CODE, engine=name)


def recompute_job(steps: dict[str, list[tuple[str, Any]]]) -> Report:
    """Each kind of checkpointing runs the routers again in the backward pass; tokens are counted
    once all the same.
    """
    ways: dict[str, Callable[[Any], Any]] = {
        "not reentrant": lambda model: model.gradient_checkpointing_enable(),
        "reentrant": lambda model: model.gradient_checkpointing_enable({"use_reentrant": True}),
        "ours": lambda model: apply_memory(
            model, MemoryConfig(checkpoint=True), shares_sequence=True
        ),
        "ours, every 2": lambda model: apply_memory(
            model,
            MemoryConfig(
                checkpoint=True, checkpoint_every_n_layers=2, tiled_mlp=True, tiled_loss=True
            ),
            shares_sequence=True,
        ),
    }
    found: Report = {}
    for way, prepare in ways.items():
        found |= {
            f"{way}: {case}": result for case, result in parity_job(steps, 2, 1, 1, prepare).items()
        }
    return found


def test_recompute(support: Any) -> None:
    steps = reference_steps(["Mixtral"], ["padded right"], 1)
    assert_parity(run_ranks(recompute_job, 2, steps), count=4)
    support(
        "model",
        "Mixtral, router loss, checkpointed",
        "sp",
        code=f"{CODE}; model.gradient_checkpointing_enable()",
    )


def compiled_job(sample: Sample, loss: float, grads: dict[str, Tensor]) -> Report:
    accelerator = Engine().accelerator(2)
    model, batches = accelerator.prepare(build_experts("Mixtral"), loader([sample]))
    raw = accelerator.unwrap_model(model)
    raw.model.layers[1].mlp.forward = torch.compile(
        raw.model.layers[1].mlp.forward, backend="aot_eager"
    )
    (batch,) = batches
    output = model(**batch)
    accelerator.backward(output.loss)
    return {
        "compiled": report(compare(float(output.loss.detach()), full_gradients(model), loss, grads))
    }


def test_a_compiled_block_still_adds_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    # The compiler can't trace what the fixture puts in the place of torch's functions.
    monkeypatch.undo()
    sample = CASES["padded right"](0)
    (loss,), grads = plain_step(build_experts("Mixtral"), [sample], reference_loss)
    # Routers round to float32 here.
    assert_parity(run_ranks(compiled_job, 2, sample, loss, grads), FLOAT32, count=1)


def accumulation_job(
    samples: list[Sample], losses: list[float], grads: dict[str, Tensor]
) -> Report:
    accelerator = Engine().accelerator(2, 2, steps=2)
    model, batches = accelerator.prepare(build_experts("Qwen3-MoE"), loader(samples))
    num_items = sum(sample.num_tokens for sample in samples)
    total = 0.0
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(**batch, num_items_in_batch=num_items).loss
            accelerator.backward(loss)
        # The engine divides by the number of micro-steps.
        total += float(loss.detach()) / 2
    return {"step": report(compare(total, full_gradients(model), sum(losses), grads))}


def test_items_of_a_step_do_not_divide_the_router_loss() -> None:
    """As in the stock Trainer: every process and micro-step adds its own router loss to the step's
    loss.
    """
    samples = [CASES["packed"](seed) for seed in range(4)]
    num_items = sum(sample.num_tokens for sample in samples)
    model = build_experts("Qwen3-MoE")
    losses, grads = plain_step(
        model, samples, lambda part, sample: 4 * reference_loss(part, sample, num_items)
    )
    expected = [loss / 4 for loss in losses]
    assert_parity(run_ranks(accumulation_job, 4, samples, expected, grads))


Expected = dict[str, tuple[float, dict[str, Tensor]]]


def alone_job(sample: Sample, expected: Expected) -> Report:
    accelerator = Engine().accelerator(2)
    model, batches = accelerator.prepare(build_experts("Mixtral"), loader([sample]))
    (batch,) = batches
    unlabelled = {
        key: value for key, value in batch.items() if key not in ("labels", "shift_labels")
    }
    output = model(**unlabelled, output_router_logits=True)
    assert [logits.shape[0] for logits in output.router_logits] == [batch["input_ids"].numel()] * 2
    accelerator.backward(output.aux_loss, retain_graph=True)
    found = {
        "alone": report(
            compare(float(output.aux_loss.detach()), full_gradients(model), *expected["alone"])
        )
    }
    zero_gradients(model)
    # A backward pass that the router loss has no part in must not find what the one before left.
    accelerator.backward(output.logits.sum() * 0.0)
    assert all(float(grad.abs().max()) == 0.0 for grad in full_gradients(model).values())
    zero_gradients(model)
    first, second = model(**batch), model(**unlabelled)
    total = first.loss + 3.0 * second.aux_loss
    accelerator.backward(total)
    found["two forwards"] = report(
        compare(float(total.detach()), full_gradients(model), *expected["two forwards"])
    )
    values = model(**batch, return_dict=False)
    assert max(abs(float(values[0] - first.loss)), abs(float(values[1] - output.aux_loss))) < 1e-12
    return found


def test_the_router_loss_alone_and_two_forwards_before_one_backward() -> None:
    sample, model = CASES["padded right"](0), build_experts("Mixtral")

    def alone(model: Any, sample: Sample) -> Tensor:
        return balance(
            model(**sample.plain, output_router_logits=True).router_logits,
            sample.plain["attention_mask"],
        )

    losses = {
        "alone": alone,
        "two forwards": lambda model, sample: (
            reference_loss(model, sample) + 3.0 * alone(model, sample)
        ),
    }
    steps = {name: plain_step(model, [sample], loss) for name, loss in losses.items()}
    expected = {name: (values[0], grads) for name, (values, grads) in steps.items()}
    # The head takes no part in the router loss, where DDP expects a gradient of every parameter.
    assert not expected["alone"][1]["lm_head.weight"].any()
    assert_parity(run_ranks(alone_job, 2, sample, expected), count=2)


def test_other_router_losses_are_refused() -> None:
    config = hf.DogeConfig(**{**_SIZES, "num_experts": 4, "is_moe": True})
    found = [
        finding
        for finding in supports(config, ParallelismConfig(sp_size=2))
        if finding.kind == "statistics"
    ]
    assert ["load_balancing_loss_func(" in finding.fact for finding in found] == [True]
    assert "output_router_logits=False" in found[0].remedy
    # Doge attends with a mask of its own, so it has no profile to be run with: a model with the
    # same finding stands for it.
    profile = replace(profile_of(build_experts("Mixtral")), router_loss=found[0])
    routers = RouterLosses(profile, None, Installation())  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="is not transformers' load balancing loss"):
        routers.begin({"output_router_logits": True})


def test_a_function_is_known_by_what_it_computes() -> None:
    stock = mixtral.load_balancing_loss_func
    assert computes_load_balance(stock)
    assert not computes_load_balance(
        lambda logits, experts, top_k, mask: 2 * stock(logits, experts, top_k, mask)
    )
    # One that forgets padding, and one of the last layer alone.
    assert not computes_load_balance(
        lambda logits, experts, top_k, mask: stock(logits, experts, top_k)
    )
    assert not computes_load_balance(
        lambda logits, experts, top_k, mask: stock(logits[-1:], experts, top_k, mask)
    )
    assert not computes_load_balance(lambda logits: 0.0)
