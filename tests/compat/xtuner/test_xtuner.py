"""XTuner's functions one by one: groups, sampler, padding and split in both forms, exchanges, the
loss.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.dense_attention import dense_attention
from tests.helpers.ranks import run_ranks
from ulysses_accel.compat import xtuner
from ulysses_accel.compat.xtuner import (
    SequenceParallelSampler,
    init_sequence_parallel,
    pad_cumulative_len_for_sequence_parallel,
    pad_for_sequence_parallel,
    reduce_sequence_parallel_loss,
    split_for_sequence_parallel,
)
from ulysses_accel.compat.xtuner.groups import first_host, slurm_environment
from ulysses_accel.errors import BatchError, ConfigError, MeshError, ShapeError

# Sums of at most 64 products of unit normals in another order: a few hundred ulps of float64.
TOLERANCE = 1e-12


def messages(*calls: Callable[[], Any]) -> list[str]:
    found = []
    for call in calls:
        try:
            call()
            found.append("")
        except (ConfigError, MeshError, ShapeError, BatchError) as error:
            found.append(str(error))
    return found


def places() -> list[int]:
    """Sizes and ranks as the getters tell them: of the sequence, of the data, of the inner
    groups.
    """
    kinds = ("sequence_parallel", "data_parallel", "inner_sequence_parallel")
    return [
        getattr(xtuner, f"get_{kind}_{what}")() for kind in kinds for what in ("world_size", "rank")
    ]


def test_groups_are_contiguous_and_getters_never_stale() -> None:
    def body() -> tuple[list[Any], ...]:
        before = [places(), xtuner.get_sequence_parallel_group() is None]
        refused = messages(
            xtuner.get_data_parallel_group,
            xtuner.init_inner_sequence_parallel,
            lambda: init_sequence_parallel(3),
            lambda: init_sequence_parallel(0),
        )
        init_sequence_parallel(2)
        xtuner.init_inner_sequence_parallel(2)
        again = messages(
            lambda: init_sequence_parallel(2), lambda: xtuner.init_inner_sequence_parallel(3)
        )
        groups = [xtuner.get_sequence_parallel_group(), xtuner.get_data_parallel_group()]
        groups.append(xtuner.get_inner_sequence_parallel_group())
        ranks = [dist.get_process_group_ranks(group) for group in groups if group is not None]
        return (
            before,
            refused,
            again,
            [places(), ranks, xtuner.is_inner_sequence_parallel_initialized()],
        )

    for rank, (before, refused, again, after) in enumerate(run_ranks(body, 4)):
        assert before == [[1, 0, 4, rank, 1, 0], True]
        assert "Call init_sequence_parallel on every rank first" in refused[0]
        assert "Call init_sequence_parallel on every rank first" in refused[1]
        assert (
            refused[2]
            == "sequence_parallel_size=3 does not divide 4 processes. Use one of: 1, 2, 4."
        )
        assert "sequence_parallel_size=0 does not divide" in refused[3]
        assert (
            "init_sequence_parallel(2) was called again: groups of 2 ranks exist already"
            in again[0]
        )
        assert (
            again[1]
            == "inner_sequence_parallel_size=3 does not divide 2 processes. Use one of: 1, 2."
        )
        sequence = [rank // 2 * 2, rank // 2 * 2 + 1]
        assert after == [
            [2, rank % 2, 2, rank // 2, 2, rank % 2],
            [sequence, [rank % 2, rank % 2 + 2], sequence],
            True,
        ]


def test_init_dist_starts_each_world_and_groups_end_with_it() -> None:
    def body() -> list[Any]:
        refused = messages(
            lambda: xtuner.init_dist("mpi", "gloo"),
            lambda: xtuner.init_dist("pytorch", "gloo", init_backend="horovod"),
        )
        xtuner.init_dist("pytorch", "gloo")
        init_sequence_parallel(2)
        size = xtuner.get_sequence_parallel_world_size()
        dist.destroy_process_group()
        between = xtuner.get_sequence_parallel_world_size()
        refused += messages(lambda: init_sequence_parallel(2))
        os.environ.update(
            SLURM_PROCID=os.environ.pop("RANK"), SLURM_NTASKS="2", SLURM_NODELIST="127.0.0.1,other"
        )
        os.environ["SLURM_LOCALID"] = os.environ["SLURM_PROCID"]
        port = int(os.environ.pop("MASTER_PORT")) + 1
        for name in ("MASTER_ADDR", "WORLD_SIZE", "LOCAL_RANK"):
            del os.environ[name]
        refused += messages(lambda: xtuner.init_dist("pytorch", "gloo"))
        xtuner.init_dist("slurm", "gloo", port=port)
        init_sequence_parallel(1)
        again = [
            xtuner.get_sequence_parallel_world_size(),
            xtuner.get_data_parallel_rank(),
            dist.get_rank(),
        ]
        return [refused, size, between, *again]

    for rank, (refused, *sizes) in enumerate(run_ranks(body, 2, init=False)):
        assert refused[0] == "launcher='mpi' is not known. Legal names: pytorch, slurm."
        assert "init_backend='horovod' is not known" in refused[1]
        assert (
            "needs torch.distributed, which is not initialized. Call init_dist first" in refused[2]
        )
        assert "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not set" in refused[3]
        assert sizes == [2, 1, 1, rank, rank]


def test_slurm_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        "SLURM_PROCID",
        "SLURM_NTASKS",
        "SLURM_LOCALID",
        "SLURM_NODELIST",
        "MASTER_ADDR",
        "MASTER_PORT",
    ]
    for name in names:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ConfigError, match=r"SLURM_PROCID, .* are not set: this is not a Slurm task"
    ):
        slurm_environment()
    for name, value in zip(names, ("9", "16", "1", "gpu-[007-010,12]")):
        monkeypatch.setenv(name, value)
    expected = {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu-007",
        "MASTER_PORT": "29500",
    }
    assert slurm_environment() == expected
    assert slurm_environment("4000") == {**expected, "MASTER_PORT": "4000"}
    monkeypatch.setenv("MASTER_ADDR", "head")
    monkeypatch.setenv("MASTER_PORT", "5000")
    assert slurm_environment("4000") == {**expected, "MASTER_ADDR": "head", "MASTER_PORT": "5000"}
    hosts = ["a", "a,b", "n[1-4]", "n[3,5-7]x,m", "r[1-2]n[08-9],z"]
    assert [first_host(host) for host in hosts] == ["a", "a", "n1", "n3x", "r1n08"]


def test_the_sampler_gives_the_ranks_of_a_sequence_the_same_samples() -> None:
    def body() -> list[Any]:
        init_sequence_parallel(2)
        data = TensorDataset(torch.arange(7))
        sampler = SequenceParallelSampler(data, seed=3)
        epochs = [list(sampler), list(sampler)]
        sampler.set_epoch(1)
        epochs.append(list(sampler))
        ordered = SequenceParallelSampler(data, shuffle=False, round_up=False)
        batches = [batch[0].tolist() for batch in DataLoader(data, batch_size=2, sampler=ordered)]
        torch.manual_seed(dist.get_rank())
        agreed = SequenceParallelSampler(data).seed
        return [epochs, len(sampler), batches, len(ordered), agreed]

    ranks = run_ranks(body, 4)
    assert ranks[0] == ranks[1]
    assert ranks[2] == ranks[3]
    for first, second in zip(ranks[0][0], ranks[2][0], strict=True):
        # Seven samples for two sequences: the first of the order is drawn again.
        assert sorted({*first, *second}) == list(range(7))
        assert (len(first), len(second), second[-1]) == (4, 4, first[0])
    assert ranks[0][0][0] == ranks[0][0][1] != ranks[0][0][2]
    assert [rank[2] for rank in (ranks[0], ranks[2])] == [[[0, 2], [4, 6]], [[1, 3], [5]]]
    assert [(rank[1], rank[3]) for rank in ranks] == [(4, 4), (4, 4), (4, 3), (4, 3)]
    assert len({rank[4] for rank in ranks}) == 1


def test_the_sampler_without_processes_is_an_ordinary_one() -> None:
    sampler = SequenceParallelSampler(range(5), seed=0)
    assert sorted(sampler) == list(range(5))
    with pytest.raises(BatchError, match="the dataset is empty"):
        SequenceParallelSampler([])


def both_forms() -> list[Any]:
    init_sequence_parallel(2)
    tokens = torch.arange(10).view(2, 5)
    mask = torch.ones(2, 5, dtype=torch.bool)
    padded = pad_for_sequence_parallel(tokens, tokens, tokens, mask)
    chosen = pad_for_sequence_parallel(tokens, tokens, tokens_pad_index=7, labels_pad_index=-1)
    single = [
        pad_for_sequence_parallel(tokens, 9),
        pad_for_sequence_parallel(tokens, padding_value=9, dim=1),
        pad_for_sequence_parallel(tensor=tokens, padding_value=9),
    ]
    other_dim = [
        pad_for_sequence_parallel(tokens.T, 9, 0),
        pad_for_sequence_parallel(tokens.T, 9, dim=0),
    ]
    ids, labels, positions, _ = padded
    parts = split_for_sequence_parallel(ids, labels, positions)
    alone = split_for_sequence_parallel(ids)
    group = xtuner.get_sequence_parallel_group()
    cut = [
        split_for_sequence_parallel(ids, 1, group),
        split_for_sequence_parallel(ids, 1),
        split_for_sequence_parallel(ids, dim=-1, sp_group=group),
        split_for_sequence_parallel(input=ids, dim=1),
    ]
    return [list(padded), list(chosen), single, other_dim, list(parts), list(alone), cut]


def test_both_forms_of_padding_and_split() -> None:
    tokens = torch.arange(10).view(2, 5)

    def wider(value: int) -> Tensor:
        return torch.cat([tokens, torch.full((2, 1), value)], 1)

    for rank, (padded, chosen, single, other_dim, parts, alone, cut) in enumerate(
        run_ranks(both_forms, 2)
    ):
        mask = wider(0)[:, -1:].bool()
        expected = [
            wider(0),
            wider(-100),
            wider(0),
            torch.cat([torch.ones(2, 5, dtype=torch.bool), mask], 1),
        ]
        assert all(torch.equal(one, other) for one, other in zip(padded, expected, strict=True))
        assert torch.equal(chosen[0], wider(7))
        assert torch.equal(chosen[1], wider(-1))
        assert chosen[2:] == [None, None]
        assert all(torch.equal(one, wider(9)) for one in single)
        assert all(torch.equal(one, wider(9).T) for one in other_dim)
        own = slice(3 * rank, 3 * rank + 3)
        assert all(
            torch.equal(one, whole[:, own]) for one, whole in zip(parts, expected[:3], strict=True)
        )
        assert torch.equal(alone[0], wider(0)[:, own])
        assert alone[1:] == [None, None]
        assert all(torch.equal(one, wider(0)[:, own]) for one in cut)


def test_forms_are_not_mixed() -> None:
    tokens: Any = torch.zeros(2, 4)
    wrong: list[Callable[[], Any]] = [
        lambda: pad_for_sequence_parallel(tokens, tokens, padding_value=0),  # type: ignore[call-overload]
        lambda: pad_for_sequence_parallel(tokens, 0, tokens),  # type: ignore[call-overload]
        lambda: pad_for_sequence_parallel(tensor=tokens),  # type: ignore[call-overload]
        lambda: pad_for_sequence_parallel(),  # type: ignore[call-overload]
        lambda: split_for_sequence_parallel(tokens, tokens, dim=1),  # type: ignore[call-overload]
        lambda: split_for_sequence_parallel(input=tokens),  # type: ignore[call-overload]
    ]
    texts = [
        "got labels together with",
        "got position_ids",
        "Pass padding_value",
        "Pass tokens, or tensor",
    ]
    for message, text in zip(
        messages(*wrong), [*texts, "got labels together with", "Pass dim"], strict=True
    ):
        assert text in message


def test_cumulative_lengths_get_one_more_document() -> None:
    def body() -> list[Any]:
        init_sequence_parallel(4)
        given = [torch.tensor([0, 3, 6], dtype=torch.int32)]
        (bounds,), mask = pad_cumulative_len_for_sequence_parallel(given)
        (whole,), nothing = pad_cumulative_len_for_sequence_parallel([torch.tensor([0, 8])])
        return [
            given[0],
            bounds,
            mask,
            whole,
            nothing,
            messages(lambda: pad_cumulative_len_for_sequence_parallel([])),
        ]

    for given, bounds, mask, whole, nothing, refused in run_ranks(body, 4):
        # The caller's list keeps what it had.
        assert given.tolist() == [0, 3, 6]
        assert (bounds.tolist(), bounds.dtype) == ([0, 3, 6, 8], torch.int32)
        assert mask.tolist() == [[True] * 6 + [False] * 2]
        assert (whole.tolist(), nothing) == ([0, 8], None)
        assert "cumulative_len is of 0 rows" in refused[0]


def test_exchanges_and_their_gradients() -> None:
    def body() -> list[Tensor]:
        init_sequence_parallel(2)
        rank = xtuner.get_sequence_parallel_rank()
        whole = torch.arange(8.0, dtype=torch.float64).view(2, 4).requires_grad_()
        own = torch.full((2, 2), float(rank), dtype=torch.float64, requires_grad=True)
        found = [xtuner.gather_for_sequence_parallel(own, -1)]
        for scale in (None, "up", "down"):
            part = xtuner.split_forward_gather_backward(whole, 1, None, scale)  # type: ignore[arg-type]
            (grad,) = torch.autograd.grad((part * (rank + 1)).sum(), whole)
            joined = xtuner.gather_forward_split_backward(own, 1, None, scale)  # type: ignore[arg-type]
            (own_grad,) = torch.autograd.grad((joined * whole.detach()).sum(), own)
            found += [part.detach(), grad, joined.detach(), own_grad]
        heads = torch.arange(16.0).view(1, 2, 4, 2) + 100 * rank
        there = xtuner.all_to_all(heads)
        return [*found, there, xtuner.all_to_all(there, scatter_dim=1, gather_dim=2)]

    whole = torch.arange(8.0, dtype=torch.float64).view(2, 4)
    ones = torch.ones(2, 2, dtype=torch.float64)
    heads = [torch.arange(16.0).view(1, 2, 4, 2) + 100 * rank for rank in range(2)]
    for rank, (gathered, *found) in enumerate(run_ranks(body, 2)):
        joined = torch.cat([0 * ones, ones], 1)
        assert torch.equal(gathered, joined)
        for number, factor in enumerate((1.0, 2.0, 0.5)):
            expected = [whole.chunk(2, 1)[rank], torch.cat([ones, 2 * ones], 1) * factor, joined]
            expected.append(whole.chunk(2, 1)[rank] * factor)
            four = found[4 * number : 4 * number + 4]
            assert all(torch.equal(one, other) for one, other in zip(four, expected, strict=True))
        assert torch.equal(found[-2], torch.cat([tensor.chunk(2, 2)[rank] for tensor in heads], 1))
        assert torch.equal(found[-1], heads[rank])


def whole_attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
    """`[B, S, H, D]` of all heads."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    mask = torch.ones(1, q.shape[2], q.shape[2], dtype=torch.bool)
    return dense_attention(q, k, v, mask.tril() if is_causal else mask).transpose(1, 2)


def wrapped(heads: tuple[int, int]) -> list[Any]:
    init_sequence_parallel(2)
    torch.manual_seed(0)
    tensors = [
        torch.randn(2, 6, number, 4, dtype=torch.float64)
        for number in (heads[0], heads[1], heads[1])
    ]
    expected = whole_attention(*tensors, is_causal=True)
    own = [tensor.chunk(2, 1)[xtuner.get_sequence_parallel_rank()] for tensor in tensors]
    attention = xtuner.sequence_parallel_wrapper(whole_attention)
    part = expected.chunk(2, 1)[xtuner.get_sequence_parallel_rank()]
    # A batch in evaluation is whole on every rank.
    errors = [
        attention(*own, is_causal=True) - part,
        attention(*tensors, is_causal=True, training=False) - expected,
    ]
    refused = messages(
        lambda: xtuner.pre_process_for_sequence_parallel_attn(*own),
        lambda: xtuner.pre_process_for_sequence_parallel_attn(*own, scatter_dim=1),
        lambda: xtuner.all_to_all(own[0]),
    )
    if not refused[0]:
        out = whole_attention(*xtuner.pre_process_for_sequence_parallel_attn(*own), is_causal=True)
        errors.append(xtuner.post_process_for_sequence_parallel_attn(out) - part)
    return [[float(error.abs().max()) for error in errors], refused]


@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (3, 1)])
def test_attention_is_wrapped_with_heads_of_any_number(heads: tuple[int, int]) -> None:
    for errors, refused in run_ranks(wrapped, 2, heads):
        assert max(errors) <= TOLERANCE
        assert len(errors) == (3 if heads[0] == 4 else 2)
        assert (
            "3 query and 1 key/value heads are not partitioned evenly over 2 ranks" in refused[0]
        ) is (heads[0] == 3)
        assert "scatter_dim=1, gather_dim=1 are not computed" in refused[1]
        assert ("2 ranks do not divide dim 2" in refused[2]) is (heads[0] == 3)


# For each of four ranks, of which two share a sequence: its mean and its tokens.
MEANS = [(3.0, 1), (1.0, 3), (float("nan"), 0), (2.0, 5)]


def test_the_loss_is_weighted_and_so_is_its_gradient() -> None:
    def body() -> list[Any]:
        init_sequence_parallel(2)
        mean, count = MEANS[dist.get_rank()]
        loss, tokens = (
            torch.tensor(mean, dtype=torch.float64, requires_grad=True),
            torch.tensor(count),
        )
        total = reduce_sequence_parallel_loss(loss, tokens)
        total.backward()
        world = reduce_sequence_parallel_loss(loss.detach(), tokens, dist.group.WORLD)
        nothing = reduce_sequence_parallel_loss(loss.detach(), torch.tensor(0))
        fractions = reduce_sequence_parallel_loss(loss.detach(), count / 64)
        return [
            float(value) for value in (total.detach(), loss.grad, world, nothing, fractions)
        ] + [int(tokens)]

    found = run_ranks(body, 4)
    # No group is the sequence's, not the world; tokens of one sequence are all that counts.
    assert [rank[0] for rank in found] == [rank[4] for rank in found] == [1.5, 1.5, 2.0, 2.0]
    # Every rank backpropagates, so that the mean over a sequence's ranks is the share of each in
    # its tokens.
    assert [rank[1] for rank in found] == [2 * 1 / 4, 2 * 3 / 4, 0.0, 2.0]
    assert [rank[2] for rank in found] == [pytest.approx((3 + 3 + 10) / 9)] * 4
    assert [rank[3] for rank in found] == [0.0] * 4
    assert [rank[5] for rank in found] == [count for _, count in MEANS]


def test_without_groups_everything_is_whole() -> None:
    tokens = torch.arange(6).view(2, 3)
    assert torch.equal(pad_for_sequence_parallel(tokens, 1), tokens)
    assert split_for_sequence_parallel(tokens)[0] is tokens
    same = [
        function(tokens, 1)
        for function in (xtuner.gather_for_sequence_parallel, xtuner.split_forward_gather_backward)
    ]
    assert all(tensor is tokens for tensor in itertools.chain(same, [xtuner.all_to_all(tokens)]))
    loss = torch.tensor(2.0)
    assert reduce_sequence_parallel_loss(loss, 3) is loss
