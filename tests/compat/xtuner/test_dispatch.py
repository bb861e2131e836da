"""`dispatch_modules` around the document's loop: which forwards are sharded, what is refused, on
which engines.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.models import build
from tests.helpers.parity_jobs import EXACT, full_gradients
from tests.helpers.ranks import run_ranks
from tests.helpers.support import Support
from ulysses_accel.compat.xtuner import (
    dispatch_modules,
    get_sequence_parallel_rank,
    get_sequence_parallel_world_size,
    init_sequence_parallel,
    pad_cumulative_len_for_sequence_parallel,
    pad_for_sequence_parallel,
    reduce_sequence_parallel_loss,
    split_for_sequence_parallel,
)
from ulysses_accel.errors import UlyssesAccelError

IGNORE, LENGTH = -100, 16
# DeepSpeed keeps gradients in float32: some hundred roundings of 6e-8 each.
FLOAT32 = 1e-5
Grads = dict[str, Tensor]


def tokens_and_labels(counted: slice | None = None) -> tuple[Tensor, Tensor]:
    """Two rows; all labels count, or those of some places alone."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 60, (2, LENGTH), generator=generator)
    labels = tokens.clone()
    if counted is not None:
        labels[:] = IGNORE
        labels[:, counted] = tokens[:, counted]
    return tokens, labels


# All; the first token of the second part alone, whose predecessor another rank has; only the first
# rank's; none.
COUNTED = [None, slice(8, 9), slice(1, 4), slice(0, 0)]


def reference(name: str, counted: slice | None, config: Any = None) -> tuple[float, Grads]:
    model = build(name, config=config)
    tokens, labels = tokens_and_labels(counted)
    loss = model(input_ids=tokens, labels=labels).loss
    # One process has no mean of nothing.
    loss = torch.nan_to_num(loss) if counted == slice(0, 0) else loss
    loss.backward()
    grads = {
        key: value.grad.nan_to_num()
        for key, value in model.named_parameters()
        if value.grad is not None
    }
    return float(loss.detach()), grads


def worst(grads: dict[str, Tensor | None], expected: Grads, averaged: bool = False) -> float:
    """The largest relative error of the mean over all ranks."""
    scale, errors = (
        torch.stack([value.norm() for value in expected.values()]).norm().clamp(min=1e-300),
        [],
    )
    for key, value in expected.items():
        grad = grads[key]
        mean = torch.zeros_like(value) if grad is None else grad.clone()
        if not averaged:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        errors.append(float((mean - value).norm() / torch.maximum(value.norm(), 1e-4 * scale)))
    return max(errors)


def own_grads(model: nn.Module) -> dict[str, Tensor | None]:
    return {key: value.grad for key, value in model.named_parameters()}


def steps(expected: list[tuple[float, Grads]]) -> list[list[float]]:
    init_sequence_parallel(2)
    model, found = build("llama"), []
    dispatch_modules(model)
    for counted, (loss, grads) in zip(COUNTED, expected, strict=True):
        model.zero_grad()
        input_ids, labels, _ = split_for_sequence_parallel(*tokens_and_labels(counted))
        assert labels is not None
        outputs = model(input_ids=input_ids, labels=labels)
        total = reduce_sequence_parallel_loss(outputs.loss, (labels != IGNORE).sum())
        total.backward()
        if counted == slice(0, 0):
            assert not any(
                bool(value.grad.any()) for value in model.parameters() if value.grad is not None
            )
        # The document says that reducing is not needed to train, so the model's own loss is the
        # whole one already.
        reduced = float(total.detach()) if int((labels != IGNORE).sum()) else loss
        errors = [
            abs(reduced - loss),
            abs(float(outputs.loss.detach()) - loss),
            worst(own_grads(model), grads),
        ]
        model.zero_grad()
        model(input_ids=input_ids, labels=labels).loss.backward()
        found.append([*errors, worst(own_grads(model), grads)])
    return found


def test_no_target_is_lost_where_the_sequence_is_cut(support: Support) -> None:
    expected = [reference("llama", counted) for counted in COUNTED]
    for rank in run_ranks(steps, 2, expected):
        assert max(error for errors in rank for error in errors) <= EXACT
    support(
        "system",
        "XTuner: documented loop, labels cut unshifted",
        "sp",
        code="loss = reduce_sequence_parallel_loss(outputs.loss, num_tokens_per_rank)",
    )


def own_loss(expected: tuple[float, Grads]) -> list[float]:
    """A loop that computes its loss by itself: labels shifted before the cut, ranks with different
    numbers of them.
    """
    init_sequence_parallel(2)
    model = build("llama")
    dispatch_modules(model)
    tokens, labels = tokens_and_labels(slice(3, 10))
    shifted = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]
    ids, targets = (split_for_sequence_parallel(tensor, 1) for tensor in (tokens, shifted))
    logits = model(input_ids=ids).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    total = reduce_sequence_parallel_loss(loss, (targets != IGNORE).sum())
    total.backward()
    return [abs(float(total.detach()) - expected[0]), worst(own_grads(model), expected[1])]


def test_a_loss_of_ones_own_is_weighted_by_its_tokens() -> None:
    for errors in run_ranks(own_loss, 2, reference("llama", slice(3, 10))):
        assert max(errors) <= EXACT


def of_samples(expected: float) -> float:
    """The loss of a model whose labels belong to the rows."""
    init_sequence_parallel(2)
    model = classifier()
    dispatch_modules(model)
    loss = model(
        input_ids=split_for_sequence_parallel(tokens_and_labels()[0], 1),
        labels=torch.tensor([1, 0]),
    ).loss
    return abs(float(loss.detach()) - expected)


def classifier() -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "pad_token_id": 0,
    }
    return hf.LlamaForSequenceClassification(
        hf.LlamaConfig(**sizes, num_attention_heads=4)
    ).double()


def test_labels_of_rows_are_not_split() -> None:
    loss = classifier()(input_ids=tokens_and_labels()[0], labels=torch.tensor([1, 0])).loss
    # transformers computes norms in float32.
    assert max(run_ranks(of_samples, 2, float(loss.detach()))) <= 1e-6


def forms(expected: tuple[float, Grads], heads: int) -> list[float]:
    """Ways to call a model."""
    init_sequence_parallel(dist.get_world_size())
    model = build("llama", config=llama(heads))
    dispatch_modules(model)
    tokens, labels = tokens_and_labels()
    positions = torch.arange(LENGTH).expand(2, LENGTH)
    ids, own_labels, own_positions = split_for_sequence_parallel(tokens, labels, positions)
    mask = torch.ones_like(tokens)
    calls: list[Callable[[], Any]] = [
        lambda: model(ids, mask, own_positions, labels=own_labels),
        lambda: model(input_ids=ids, labels=own_labels, position_ids=own_positions[:1]),  # type: ignore[index]
        lambda: model(inputs_embeds=model.get_input_embeddings()(ids), labels=own_labels),
        lambda: model(input_ids=ids.clone(), labels=own_labels.clone()),  # type: ignore[union-attr]
        lambda: checkpointed(model)(input_ids=ids, labels=own_labels),
    ]
    found = []
    for call in calls:
        model.zero_grad()
        loss = call().loss
        loss.backward()
        found += [abs(float(loss.detach()) - expected[0]), worst(own_grads(model), expected[1])]
    return found


def checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable()
    return model


def llama(heads: int) -> Any:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
    }
    return hf.LlamaConfig(**sizes, num_attention_heads=heads)


@pytest.mark.parametrize(("size", "heads"), [(2, 4), (4, 2)])
def test_any_way_of_calling_and_more_ranks_than_heads(
    size: int, heads: int, support: Support
) -> None:
    for errors in run_ranks(forms, size, reference("llama", None, llama(heads)), heads):
        assert max(errors) <= EXACT
    if size > heads:
        # Two places of a ring, of two ranks each.
        support(
            "system", "XTuner: more ranks than heads", "cp × sp", code="init_sequence_parallel(4)"
        )


def in_evaluation(expected: Tensor) -> list[float]:
    init_sequence_parallel(2)
    model = build("llama").eval()
    done = dispatch_modules(model)
    assert dispatch_modules(model) is done
    tokens, _ = tokens_and_labels()
    ids = split_for_sequence_parallel(tokens, 1)
    own = expected.chunk(2, 1)[get_sequence_parallel_rank()]
    with torch.no_grad():
        whole, part = model(input_ids=tokens).logits, model(input_ids=ids).logits
        # On another device the mark is gone.
        masked = model(input_ids=ids.clone(), attention_mask=torch.ones_like(tokens)).logits
        done.in_evaluation = True
        told = model(input_ids=ids.clone()).logits
        copied = refused(lambda: model(input_ids=tokens))
        done.in_evaluation = False
        # A mask of two tokens, one of them in the cache, is no part's.
        model.generate(
            tokens[:, :1], attention_mask=torch.ones_like(tokens[:, :1]), max_new_tokens=3
        )
        done.close()
        after = model(input_ids=tokens).logits
    # A model that was restored computes a part as if it were all.
    alone = model(input_ids=ids.clone()).logits
    assert not hasattr(model, "xtuner_dispatch")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert float((alone - own).abs().max()) > 1e-3 or get_sequence_parallel_rank() == 0
    assert "got the same 16 tokens on all 2 ranks" in copied
    pairs = [(whole, expected), (after, expected), *((one, own) for one in (part, masked, told))]
    return [float((one - other).abs().max()) for one, other in pairs]


def test_in_evaluation_only_what_was_split_is_sharded() -> None:
    with torch.no_grad():
        expected = build("llama").eval()(input_ids=tokens_and_labels()[0]).logits
    for errors in run_ranks(in_evaluation, 2, expected):
        assert max(errors) <= EXACT


def refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except UlyssesAccelError as error:
        return str(error)
    return ""


def by_lengths() -> list[float]:
    """The losses of a packed row whose documents positions tell, and cumulative lengths."""
    init_sequence_parallel(4)
    model = build("llama")
    dispatch_modules(model, use_varlen_attn=True)
    tokens, labels = (tensor[:1, :14] for tensor in tokens_and_labels())
    positions = torch.cat([torch.arange(5), torch.arange(9)])[None]
    (bounds,), mask = pad_cumulative_len_for_sequence_parallel([torch.tensor([0, 5, 14])])
    ids, targets, places, padding = pad_for_sequence_parallel(
        tokens, labels, positions, torch.ones_like(tokens)
    )
    assert mask is not None
    assert padding is not None
    assert torch.equal(mask, padding.bool())
    ids, targets, places = split_for_sequence_parallel(ids, targets, places)
    told = model(input_ids=ids, labels=targets, position_ids=places, attention_mask=mask).loss
    counted = model(input_ids=ids, labels=targets, cu_seq_lens_q=bounds).loss
    return [float(told.detach()), float(counted.detach())]


def test_documents_are_told_by_cumulative_lengths_too() -> None:
    tokens, labels = (tensor[:1, :14] for tensor in tokens_and_labels())
    losses = [
        build("llama")(input_ids=tokens[:, part], labels=labels[:, part]).loss
        for part in (slice(5), slice(5, 14))
    ]
    expected = float((losses[0] * 4 + losses[1] * 8).detach()) / 12
    for told, counted in run_ranks(by_lengths, 4):
        assert told == pytest.approx(expected, rel=EXACT)
        assert counted == pytest.approx(expected, rel=EXACT)


def wrong_batches() -> list[str]:
    tokens, labels = tokens_and_labels()
    model = build("llama")
    found = [refused(lambda: dispatch_modules(model))]
    init_sequence_parallel(2)
    dispatch_modules(model)
    rank, mask = get_sequence_parallel_rank(), torch.ones_like(tokens)
    ids, own, _ = split_for_sequence_parallel(tokens, labels)
    mask[0, :rank] = 0
    found += [
        refused(lambda: model(input_ids=tokens, labels=labels)),
        refused(lambda: model(input_ids=ids, labels=own, attention_mask=torch.ones_like(ids))),
        refused(lambda: model(input_ids=ids, labels=own, attention_mask=mask)),
        refused(lambda: model(input_ids=ids, labels=labels)),
        refused(lambda: model(labels=own)),
        refused(lambda: model(input_ids=ids[:, : 8 - rank], labels=own)),
        refused(lambda: split_for_sequence_parallel(tokens[:, :15], 1)),
    ]
    # Nothing of a refused forward is left behind.
    loss = model(input_ids=ids, labels=own).loss
    assert bool(loss.isfinite())
    return found


def test_what_can_not_be_joined_is_refused_on_every_rank() -> None:
    ranks = run_ranks(wrong_batches, 2)
    assert ranks[0] == ranks[1]
    facts = [
        "dispatch_modules was called before init_sequence_parallel, on 2 processes",
        "got the same 16 tokens on all 2 ranks that share a sequence. Split the batch",
        "attention_mask of shape [2, 8], but only a [batch, sequence] mask, here [2, 16]",
        "the mask's numbers is",
        "labels has shape [2, 16] and torch.int64, the shard of the sequence on this rank is [2, 8]",
        "got no input_ids",
        "rows and tokens is",
        "2 ranks do not divide a sequence of 15 tokens",
    ]
    for message, fact in zip(ranks[0], facts, strict=True):
        assert fact in message


def test_one_process_needs_no_groups() -> None:
    model = build("llama")
    done = dispatch_modules(model, use_varlen_attn=True)
    tokens, labels = tokens_and_labels()
    loss = model(input_ids=tokens, labels=labels).loss
    assert get_sequence_parallel_world_size() == 1
    assert done.group is None
    assert float(loss.detach()) == reference("llama", None)[0]


def alibi_models() -> dict[str, Any]:
    falcon = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "alibi": True,
    }
    return {
        "Bloom": hf.BloomForCausalLM(
            hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
        ),
        "MPT": hf.MptForCausalLM(
            hf.MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)
        ),
        "Falcon with ALiBi": hf.FalconForCausalLM(hf.FalconConfig(**falcon)),
    }


def unsupported() -> list[str]:
    init_sequence_parallel(2)
    return [refused(partial(dispatch_modules, model)) for model in alibi_models().values()]


def test_models_whose_biases_are_out_of_reach_are_refused_by_name(support: Support) -> None:
    ranks = run_ranks(unsupported, 2)
    assert ranks[0] == ranks[1]
    for name, message in zip(alibi_models(), ranks[0], strict=True):
        assert "can't be trained exactly with sequence_parallel_size above 1" in message
        assert "do not call attention through transformers' AttentionInterface" in message
        support.refused(
            "system", f"XTuner: {name}", "sp", "attends past transformers' AttentionInterface"
        )


def on_engines(expected: tuple[float, Grads]) -> list[float]:
    init_sequence_parallel(2)
    found = []
    for stage in (None, 2, 3):
        # DeepSpeed 0.19 keeps ZeRO-3's weights in float32 where the CPU has no float16
        # instructions; where it has them it takes the model's own dtype, and refuses float64.
        model = build("llama").to(torch.float32 if stage == 3 else torch.float64)
        dispatch_modules(model)
        input_ids, labels, _, _ = pad_for_sequence_parallel(*tokens_and_labels())
        input_ids, labels, _ = split_for_sequence_parallel(input_ids, labels)
        assert labels is not None
        engine: Any = DistributedDataParallel(model) if stage is None else zero(model, stage)
        loss = reduce_sequence_parallel_loss(
            engine(input_ids=input_ids, labels=labels).loss, (labels != IGNORE).sum()
        )
        if stage is None:
            loss.backward()
        else:
            engine.backward(loss)
        found += [
            abs(float(loss.detach()) - expected[0]),
            worst(dict(full_gradients(engine)), expected[1], True),
        ]
    return found


def zero(model: nn.Module, stage: int) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def test_engines_average_to_the_whole_gradient(support: Support) -> None:
    for rank in run_ranks(on_engines, 2, reference("llama", None)):
        assert max(rank[:2]) <= EXACT
        assert max(rank[2:]) <= FLOAT32
    for engine in ("DDP", "ZeRO-2", "ZeRO-3"):
        code = (
            "engine = deepspeed.initialize(model=model, ...)[0]  # behind dispatch_modules(model)"
        )
        support("system", "XTuner: dispatched model in an engine", "sp", engine=engine, code=code)
