"""A prepared model outside of sharded training: evaluation, ordinary batches, generation, and what
stays untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import ulysses_accel
from tests.helpers.batches import CASES, Sample, loader
from tests.helpers.models import CONFIGS, build
from tests.helpers.parity_jobs import (
    EXACT,
    Engine,
    compare,
    data_rank,
    full_gradients,
    plain_loss,
    plain_step,
    zero_gradients,
)
from tests.helpers.ranks import run_ranks

KINDS = ("plain", "packed", "padded left", "odd length", "last ranks masked", "padded right")
ORDINARY = ("plain", "packed", "padded left", "padded right")
ENGINES = (Engine("ddp"), Engine("fsdp2"))
# GPT-2 and Gemma have other positions, and other head sizes, than the rest.
MODELS = ("llama", "qwen2", "gpt2", "gemma", "gpt_bigcode")
Numbers = dict[str, float]


def prepare(engine: Engine, dp_size: int, sp_size: int, name: str = "llama") -> tuple[Any, Any]:
    accelerator = engine.accelerator(sp_size, dp_size)
    model = build(name)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    return accelerator, model


def largest(found: Tensor, expected: Tensor, sample: Sample) -> float:
    """Largest difference of logits on the tokens that are no padding."""
    valid = torch.zeros(found.shape[:2], dtype=torch.bool)
    for row, segments in enumerate(sample.documents):
        for start, stop in segments:
            valid[row, start:stop] = True
    return float((found - expected)[valid].abs().max())


def evaluation_errors(
    expected: list[tuple[list[Sample], list[float]]], dp_size: int, sp_size: int
) -> Numbers:
    errors = {}
    for engine in ENGINES:
        accelerator, model = prepare(engine, dp_size, sp_size)
        batches = accelerator.prepare(
            loader([sample for samples, _ in expected for sample in samples])
        )
        model.eval()
        for kind, (_, losses), batch in zip(KINDS, expected, batches, strict=True):
            with torch.no_grad():
                loss = model(**batch).loss
            errors[f"{engine.name} {kind}"] = abs(float(loss) / losses[data_rank(accelerator)] - 1)
    return errors


@pytest.mark.parametrize(("dp_size", "sp_size"), [(1, 2), (1, 4), (2, 2)])
def test_sharded_evaluation_loss(dp_size: int, sp_size: int) -> None:
    model = build("llama").eval()
    together = [
        [CASES[kind](2 * n + rank) for rank in range(dp_size)] for n, kind in enumerate(KINDS)
    ]
    with torch.no_grad():
        expected = [
            (samples, [float(plain_loss(model, sample)) for sample in samples])
            for samples in together
        ]
    results = run_ranks(
        evaluation_errors, dp_size * sp_size, expected, dp_size, sp_size, init=False
    )
    for errors in results:
        assert len(errors) == len(ENGINES) * len(KINDS)
        assert max(errors.values()) <= EXACT, errors


def ordinary_errors(name: str, sp_size: int) -> Numbers:
    """Passes whole batches, as a plain dict, to the prepared model; a sharded one in between must
    leave no trace.
    """
    plain = build(name)
    accelerator, model = prepare(Engine("ddp"), 1, sp_size, name)
    between = next(iter(accelerator.prepare(loader([CASES["packed"](1)]))))
    errors = {}
    for number, kind in enumerate(ORDINARY):
        sample = CASES[kind](number)
        for training in (False, True):
            plain.train(training)
            model.train(training)
            with torch.no_grad():
                expected, found = plain(**sample.plain), model(**sample.plain)
                model(**between)
            errors[f"{name} {kind} {training}"] = max(
                largest(found.logits, expected.logits, sample),
                abs(float(found.loss - expected.loss)),
            )
        zero_gradients(model)
        loss, grads = plain_step(plain, [sample])
        found_loss = model(**sample.plain).loss
        accelerator.backward(found_loss)
        difference = compare(float(found_loss.detach()), full_gradients(model), loss[0], grads)
        errors[f"{name} {kind} gradients"] = max(
            difference.loss, difference.grad, abs(difference.ratio)
        )
    return errors


def test_an_ordinary_batch_takes_the_ordinary_path() -> None:
    results = run_ranks(lambda: {name: ordinary_errors(name, 2) for name in MODELS}, 2, init=False)
    for models in results:
        for errors in models.values():
            assert len(errors) == 3 * len(ORDINARY)
            # The same kernels on the same numbers; only DDP's division of gradients rounds.
            exact = [error for case, error in errors.items() if not case.endswith("gradients")]
            assert max(exact) == 0.0, errors
            assert max(errors.values()) <= EXACT, errors


def generated_tokens(name: str, kind: str) -> list[Any]:
    sample = CASES[kind](3)
    prompt = {key: value for key, value in sample.batch.items() if key != "labels"}
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    expected = build(name).eval().generate(**prompt, **options)
    accelerator, model = prepare(Engine("ddp"), 1, 2, name)
    model.eval()
    unwrapped = accelerator.unwrap_model(model)
    return [expected, unwrapped.generate(**prompt, **options), accelerator.process_index]


def test_generation() -> None:
    kinds = ("plain", "padded left")
    results = run_ranks(
        lambda: [generated_tokens(name, kind) for name in MODELS for kind in kinds],
        2,
        init=False,
        timeout=60,
    )
    for rank, pairs in enumerate(results):
        assert len(pairs) == len(MODELS) * len(kinds)
        for expected, found, process_index in pairs:
            assert process_index == rank
            assert expected.shape[1] > 16
            assert torch.equal(expected, found)


def reference_model_changes() -> dict[str, bool]:
    """Two models of one config object, as a policy and its reference; only the first is
    prepared.
    """
    config = CONFIGS["llama"]()
    policy, reference = build("llama", config=config, seed=1), build("llama", config=config, seed=2)
    sample = CASES["padded left"](0)
    config_before, implementation = reference.config, reference.config._attn_implementation
    hooks_before = len(reference._forward_hooks)
    before = reference(**sample.plain).logits.detach()
    accelerator = Engine("ddp").accelerator(2)
    policy = accelerator.prepare(policy)
    batch = next(iter(accelerator.prepare(loader([CASES["packed"](1)]))))
    policy(**batch).loss.backward()
    return {
        "outputs": torch.equal(before, reference(**sample.plain).logits.detach()),
        "config object": reference.config is config_before
        and reference.model.config is config_before,
        "implementation": reference.config._attn_implementation
        == implementation
        == config._attn_implementation,
        "hooks": len(reference._forward_hooks) == hooks_before,
        "policy has its own": accelerator.unwrap_model(policy).config is not config_before,
    }


def test_a_reference_model_of_the_same_config_stays_untouched() -> None:
    for checks in run_ranks(reference_model_changes, 2, init=False):
        assert len(checks) == 5
        assert all(checks.values()), checks


def step_error(accelerator: Any, model: Any, sample: Sample, plain: Any) -> float:
    losses, grads = plain_step(plain, [sample])
    zero_gradients(model)
    loss = model(**next(iter(accelerator.prepare(loader([sample]))))).loss
    accelerator.backward(loss)
    difference = compare(float(loss.detach()), full_gradients(model), losses[0], grads)
    return max(difference.loss, difference.grad, abs(difference.ratio))


def several_accelerators() -> Numbers:
    """A second prepare, a policy and a critic at once, and a second accelerator beside and after
    the first.
    """
    samples = [CASES["packed"](1), CASES["padded left"](2)]
    first = Engine("ddp").accelerator(2)
    model, other = first.prepare(build("llama", seed=1)), first.prepare(build("gpt2", seed=2))
    again = first.prepare(model)
    errors = {
        "model": step_error(first, model, samples[0], build("llama", seed=1)),
        "other model": step_error(first, other, samples[1], build("gpt2", seed=2)),
        "prepared twice": 0.0 if again is model else 1.0,
    }
    config = ulysses_accel.ParallelismConfig(sp_size=2)
    second = type(first)(cpu=True, parallelism_config=config)
    third = second.prepare(build("qwen2", seed=3))
    errors["second accelerator"] = step_error(second, third, samples[1], build("qwen2", seed=3))
    errors["first, afterwards"] = step_error(first, model, samples[1], build("llama", seed=1))
    fresh = Engine("fsdp2").accelerator(2)
    sharded = build("llama", seed=4)
    sharded, _ = fresh.prepare(sharded, torch.optim.SGD(sharded.parameters()))
    errors["third accelerator, FSDP2"] = step_error(
        fresh, sharded, samples[0], build("llama", seed=4)
    )
    return errors


def test_several_models_and_accelerators_in_one_process() -> None:
    for errors in run_ranks(several_accelerators, 2, init=False):
        assert len(errors) == 6
        assert max(errors.values()) <= EXACT, errors


def uninstall_restores() -> dict[str, bool]:
    registries = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    before = [
        (dict(type(registry)._global_mapping), dict(registry._local_mapping))
        for registry in registries
    ]
    model = build("llama")
    configs = {
        name: module.config for name, module in model.named_modules() if hasattr(module, "config")
    }
    sample = CASES["padded left"](0)
    expected = model(**sample.plain).logits.detach()
    accelerator = Engine("ddp").accelerator(2)
    stock_prepare: Callable[..., Any] = Accelerator.prepare
    prepared = accelerator.prepare(model)
    batch = next(iter(accelerator.prepare(loader([CASES["packed"](1)]))))
    prepared(**batch).loss.backward()
    during = [dict(type(registry)._global_mapping) for registry in registries]
    accelerator.sequence_parallel.close()
    after = [
        (dict(type(registry)._global_mapping), dict(registry._local_mapping))
        for registry in registries
    ]
    return {
        "something was registered": all(len(new) > len(old[0]) for new, old in zip(during, before)),
        "nothing was overwritten": all(
            new[key] is old[0][key] for new, old in zip(during, before) for key in old[0]
        ),
        "registries": before == after,
        "configs": all(
            model.get_submodule(name).config is config for name, config in configs.items()
        ),
        "hooks": not any(
            module._forward_hooks or module._forward_pre_hooks for module in model.modules()
        ),
        "methods": accelerator.prepare.__func__ is stock_prepare,
        "outputs": torch.equal(expected, model(**sample.plain).logits.detach()),
    }


def test_uninstall_restores_everything() -> None:
    for checks in run_ranks(uninstall_restores, 2, init=False):
        assert len(checks) == 7
        assert all(checks.values()), checks
