"""Defects of accelerate + DeepSpeed's sequence parallelism, each shown to be absent here:
attention, loader, registry.

The numbers are those of the list that was made from upstream's code; one test for each. What needs
several engines or four ranks is in `test_upstream_defects_engines.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import skip_first_batches
from transformers import MistralConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.helpers.batches import CASES, Sample, loader
from tests.helpers.engine_jobs import batches_of, distance, numbers, train, worst_distance
from tests.helpers.models import HIDDEN, VOCAB, build
from tests.helpers.parity_jobs import Engine, full_gradients, zero_gradients
from tests.helpers.ranks import run_ranks
from ulysses_accel.introspection.structure import transformers_model
from ulysses_accel.sequence.loss import count_items

EXACT = 1e-12
WINDOW = 5


def accelerator(steps: int = 1) -> Any:
    return Engine("ddp").accelerator(sp_size=2, steps=steps)


def default_attention() -> list[Any]:
    acc = accelerator()
    return [
        acc.parallelism_config.sp_handler.sp_attn_implementation,
        worst_distance(acc, [CASES["plain"](0)]),
    ]


def evaluation() -> dict[str, float]:
    acc, samples = accelerator(), [CASES["plain"](0), CASES["padded left"](1), CASES["packed"](2)]
    model, batches = acc.prepare(build("llama"), loader(samples))
    reference = build("llama").eval()
    model.eval()
    found = {}
    with torch.no_grad():
        for sample, batch in zip(samples, batches, strict=True):
            sharded, whole = model(**batch).loss, reference(**sample.plain).loss
            ordinary = model(**sample.plain).loss
            found[f"sharded {len(found)}"] = float((sharded - whole).abs() / whole)
            found[f"ordinary {len(found)}"] = float((ordinary - whole).abs() / whole)
    return found


def windows() -> float:
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=WINDOW,
    )
    samples = [CASES["plain"](0), CASES["packed"](1)]
    return worst_distance(accelerator(), samples, "mistral", config)


def masks() -> float:
    return worst_distance(
        accelerator(), [CASES[name](3) for name in ("packed", "padded left", "odd packed")]
    )


def epochs() -> list[list[list[int]]]:
    """Takes exactly `len` batches of each epoch, as the Trainer does, and never runs into the
    end.
    """
    batches = accelerator().prepare(batches_of(5, batch_size=2))
    found = []
    for _ in range(3):
        iterator = iter(batches)
        found.append([numbers(next(iterator)) for _ in range(len(batches))])
    return found


def skipping() -> list[Any]:
    acc = accelerator()
    batches = acc.prepare(batches_of(5, batch_size=2))
    own, stock = acc.skip_first_batches(batches, 1), skip_first_batches(batches, 1)
    found: list[Any] = [[numbers(batch) for batch in kind] for kind in (own, stock, batches)]
    shapes = [list(batch["input_ids"].shape) for batch in stock]
    return [*found, shapes, len(batches.dataset)]


def flattened() -> float:
    sample = CASES["odd packed"](5)
    bounds = torch.tensor([0, 7, 21], dtype=torch.int32)
    extra = {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": 14,
        "max_length_k": 14,
    }
    flat = Sample({**sample.batch, **extra}, sample.plain, sample.documents)
    return worst_distance(accelerator(), [flat])


def accumulation() -> list[list[bool]]:
    found = []
    for steps, count in ((4, 6), (3, 6), (2, 3)):
        acc = accelerator(steps)
        model = build("llama", torch.float32)
        model, optimizer, batches = acc.prepare(
            model, torch.optim.SGD(model.parameters()), batches_of(count)
        )
        made = []
        for batch in batches:
            with acc.accumulate(model):
                acc.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
                made.append(acc.sync_gradients)
        found.append(made)
    return found


def token_exact() -> float:
    acc = accelerator(steps=3)
    samples = [
        CASES[name](seed) for seed, name in enumerate(("prompt masked", "padded right", "plain"))
    ]
    model, batches = acc.prepare(build("llama"), loader(samples))
    held = list(batches)
    items = count_items(held, acc.sequence_parallel.groups.world_group)
    for batch in held:
        with acc.accumulate(model):
            acc.backward(model(**batch, num_items_in_batch=items).loss)
    reference = build("llama")
    zero_gradients(reference)
    total = sum(sample.num_tokens for sample in samples)
    for sample in samples:
        reference(**sample.plain, num_items_in_batch=total).loss.backward()
    expected = dict(reference.named_parameters())
    return max(
        float((grad - expected[n].grad).norm() / expected[n].grad.norm())
        for n, grad in _grads(model)
    )


def _grads(model: Any) -> list[tuple[str, torch.Tensor]]:
    return list(full_gradients(model).items())


def registry() -> dict[str, Any]:
    before = dict(ALL_ATTENTION_FUNCTIONS._global_mapping)
    acc, sample = accelerator(), CASES["padded left"](0)
    untouched, fresh = build("llama", seed=1), build("llama", seed=1)
    config = untouched.config
    first, second, batches = acc.prepare(build("llama"), build("qwen2"), loader([sample]))
    third = acc.prepare(build("llama"))
    batch = next(iter(batches))
    distances = []
    for model, reference in (
        (first, build("llama")),
        (second, build("qwen2")),
        (third, build("llama")),
    ):
        loss = model(**batch).loss
        # Another model trains on a batch of its own between a forward and its backward.
        other = untouched(**sample.plain).loss
        acc.backward(loss)
        other.backward()
        distances.append(distance(model, loss, reference, sample))
        distances.append(distance(untouched, other, fresh, sample))
        zero_gradients(untouched)
    kept = all(
        ALL_ATTENTION_FUNCTIONS._global_mapping[name] is function
        for name, function in before.items()
    )
    names = [transformers_model(model).config._attn_implementation for model in (first, untouched)]
    acc.sequence_parallel.close()
    restored = (
        dict(ALL_ATTENTION_FUNCTIONS._global_mapping) == before and untouched.config is config
    )
    return {"worst": max(distances), "kept": kept, "names": names, "restored": restored}


def generation() -> dict[str, Any]:
    acc, sample = accelerator(), CASES["padded left"](0)
    prompt = {name: sample.plain[name] for name in ("input_ids", "attention_mask")}
    reference = build("llama").eval()
    model = acc.unwrap_model(acc.prepare(build("llama"))).eval()
    options = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        exact = torch.equal(model(**prompt).logits, reference(**prompt).logits)
        same = torch.equal(
            model.generate(**prompt, **options), reference.generate(**prompt, **options)
        )
    return {"logits": exact, "tokens": same}


def separate_calls() -> list[Any]:
    acc = accelerator()
    model = build("llama", torch.float32)
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    batches = acc.prepare(batches_of(4))
    seen = [numbers(batch) for batch in batches]
    return [seen, len(train(acc, model, optimizer, batches)), acc.prepare(batches) is batches]


CHECKS = (
    default_attention,
    evaluation,
    windows,
    masks,
    epochs,
    skipping,
    flattened,
    accumulation,
    token_exact,
    registry,
    generation,
    separate_calls,
)


def all_checks() -> dict[str, Any]:
    return {check.__name__: check() for check in CHECKS}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What every check found on each of two ranks that share a sequence; one fork for all of
    them.
    """
    found: list[dict[str, Any]] = run_ranks(all_checks, 2, init=False)
    return found


def test_b04_the_default_configuration_works(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        core, worst = rank["default_attention"]
        assert core == "sdpa"
        assert worst <= EXACT


def test_b05_evaluation_is_exact(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert len(rank["evaluation"]) == 6
        assert max(rank["evaluation"].values()) <= EXACT


def test_b06_sliding_windows_are_exact_under_sdpa(ranks: list[dict[str, Any]]) -> None:
    assert max(rank["windows"] for rank in ranks) <= EXACT


def test_b07_packing_and_left_padding_are_exact_under_sdpa(ranks: list[dict[str, Any]]) -> None:
    assert max(rank["masks"] for rank in ranks) <= EXACT


def test_b08_no_epoch_loses_a_step(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["epochs"] == [[[0, 1], [2, 3], [4]]] * 3 for rank in ranks)


def test_b09_the_loader_can_be_resumed_in_the_middle(ranks: list[dict[str, Any]]) -> None:
    rest = [[2, 3], [4]]
    assert all(
        rank["skipping"] == [rest, rest, [[0, 1], *rest], [[2, 8], [1, 8]], 5] for rank in ranks
    )


def test_b10_flattened_batches_with_cumulative_lengths_work(ranks: list[dict[str, Any]]) -> None:
    assert max(rank["flattened"] for rank in ranks) <= EXACT


def test_b11_only_the_very_last_micro_batch_closes_a_partial_window(
    ranks: list[dict[str, Any]],
) -> None:
    no, yes = False, True
    expected = [[no, no, no, yes, no, yes], [no, no, yes, no, no, yes], [no, yes, yes]]
    assert all(rank["accumulation"] == expected for rank in ranks)


def test_b13_accumulation_can_be_exact_to_the_token(ranks: list[dict[str, Any]]) -> None:
    assert max(rank["token_exact"] for rank in ranks) <= EXACT


def test_b14_other_models_and_the_registry_are_not_touched(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["registry"]
        assert found["worst"] <= EXACT
        assert found["names"] == ["ulysses_accel_sdpa", "sdpa"]
        assert found["kept"]
        assert found["restored"]


def test_b15_left_padded_generation_keeps_its_mask(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["generation"] == {"logits": True, "tokens": True} for rank in ranks)


def test_b16_a_loader_prepared_by_itself_is_sharded(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["separate_calls"] == [[[0], [1], [2], [3]], 4, True] for rank in ranks)
