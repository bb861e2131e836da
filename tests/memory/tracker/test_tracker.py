"""The allocation tracker against sums by hand: what is live, what was the peak, and whose it
was.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.utils.checkpoint import checkpoint

from tests.helpers.ranks import run_ranks
from ulysses_accel.memory import track_allocations
from ulysses_accel.memory.tracker.report import KINDS

KIB = 1024


def kib(size: int = 1) -> Tensor:
    return torch.zeros(size * KIB, dtype=torch.uint8)


class Square(torch.autograd.Function):
    """Saves one tensor, and needs another of four times its size in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        wide = torch.empty(4 * x.numel())
        return 2 * grad * x + wide[0] * 0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 64, bias=False)
        self.down = nn.Linear(64, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def test_live_and_peak_follow_what_is_kept() -> None:
    with track_allocations() as tracked:
        kept = kib(3)
        dropped = kib(5)
        assert tracked.live_bytes == 8 * KIB
        del dropped
        assert tracked.live_bytes == 3 * KIB
        more = kib(4)
    assert (tracked.live_bytes, tracked.peak_bytes, tracked.allocated_bytes) == (
        7 * KIB,
        8 * KIB,
        12 * KIB,
    )
    assert kept.numel() + more.numel() == 7 * KIB


def test_views_and_out_arguments_allocate_nothing() -> None:
    before = kib(2)
    with track_allocations() as tracked:
        view = before.view(2, KIB)[1]
        torch.add(view, 1, out=before[:KIB])
        before.add_(1)
        inside = kib(1)
        second = inside[: KIB // 2]
        del inside
        assert tracked.live_bytes == KIB
        del second
    assert (tracked.live_bytes, tracked.peak_bytes) == (0, KIB)


def test_release_of_what_was_there_before_is_not_negative() -> None:
    before = kib(2)
    with track_allocations() as tracked:
        before.add_(1)
        del before
        kept = kib(1)
    assert (tracked.live_bytes, tracked.peak_bytes, kept.numel()) == (KIB, KIB, KIB)


def test_resized_storages_are_seen() -> None:
    with track_allocations() as tracked:
        grown = kib(1)
        grown.untyped_storage().resize_(6 * KIB)
        grown.add_(1)
        assert tracked.live_bytes == 6 * KIB
        grown.untyped_storage().resize_(0)
        small = kib(2)
        large = kib(5)
    assert tracked.live_bytes == 7 * KIB == small.numel() + large.numel()
    assert tracked.peak_bytes == 7 * KIB


def test_copies_count_the_bytes_that_are_written() -> None:
    x = torch.zeros(KIB, dtype=torch.float32)
    with track_allocations() as tracked:
        half = x.to(torch.bfloat16)
        torch.cat([half, half])
        x.copy_(half)
        x + x
    assert tracked.copied_bytes == (2 + 4 + 4) * KIB


@pytest.mark.parametrize("create", [lambda x: x.exp(), lambda x: Square.apply(x)])
def test_saved_bytes_until_the_graph_is_gone(create: Any) -> None:
    x = torch.zeros(KIB // 4, requires_grad=True)
    with track_allocations() as tracked:
        y = create(x)
        assert tracked.saved_bytes == KIB
        y.sum().backward()
        assert tracked.saved_bytes == 0
    assert tracked.peak_saved_bytes == KIB
    assert x.grad is not None


def test_a_storage_that_is_saved_twice_counts_once() -> None:
    x = torch.zeros(KIB // 4, requires_grad=True)
    with track_allocations() as tracked:
        y = x.exp()
        z = y * y + y.view(2, -1).sum()
        assert tracked.by_kind["saved"].live == KIB
        del z
        assert tracked.by_kind["saved"].live == KIB
        del y
    assert tracked.by_kind["saved"].live == 0


def test_backward_is_seen_and_has_its_own_peak() -> None:
    x = torch.zeros(KIB // 4, requires_grad=True)
    with track_allocations() as tracked:
        loss = Square.apply(x).sum()
        loss.backward()
    assert tracked.peak_by_phase["forward"] <= 2 * KIB
    assert 4 * KIB < tracked.peak_by_phase["backward"] == tracked.peak_bytes <= 9 * KIB


def test_kinds_and_modules_sum_to_the_whole_at_the_peak() -> None:
    model = nn.Sequential(Block(), Block())
    x = torch.randn(32, 16, requires_grad=True)
    with track_allocations(model, unit_bytes=32 * 16 * 4) as tracked:
        model(x).sum().backward()
    assert sum(tally.at_peak for tally in tracked.by_kind.values()) == tracked.peak_bytes
    assert sum(tally.at_peak for tally in tracked.by_module.values()) == tracked.peak_bytes
    assert sum(tally.live for tally in tracked.by_kind.values()) == tracked.live_bytes
    assert tuple(tracked.by_kind) == KINDS
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert tracked.resident_bytes == weights
    assert tracked.by_kind["gradients"].live == weights
    assert tracked.by_kind["parameters"].live == 0
    assert tracked.units(tracked.peak_bytes) == pytest.approx(tracked.peak_bytes / 2048)


def test_backward_is_counted_for_the_module_whose_forward_it_belongs_to() -> None:
    model = nn.Sequential(Block(), Block())
    x = torch.randn(32, 16, requires_grad=True)
    with track_allocations(model) as tracked:
        model(x).sum().backward()
    one_product = 2 * 32 * 16 * 64
    flops = {
        name: tally.matmul_flops for name, tally in tracked.by_module.items() if tally.matmul_flops
    }
    assert flops == dict.fromkeys(("0.up", "0.down", "1.up", "1.down"), 3 * one_product)
    assert tracked.matmul_units(32, 16, 64) == 12
    assert tracked.matmul_calls == 12


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_counts_for_the_modules_that_recompute(reentrant: bool) -> None:
    model = nn.Sequential(Block(), Block())
    x = torch.randn(32, 16, requires_grad=True)
    with track_allocations(model) as tracked:
        for block in model:
            x = checkpoint(block, x, use_reentrant=reentrant)
        x.sum().backward()
    one_product = 2 * 32 * 16 * 64
    # torch's non-reentrant checkpoint stops recomputing once it has what it needs: the last
    # product's result is not.
    assert tracked.by_module["0.up"].matmul_flops == 4 * one_product
    assert tracked.by_module["1.down"].matmul_flops == (4 if reentrant else 3) * one_product


def test_attention_kernels_are_counted() -> None:
    q = torch.randn(1, 2, 8, 4, requires_grad=True)
    with track_allocations() as tracked:
        nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    assert (tracked.attention_forward_calls, tracked.attention_backward_calls) == (1, 1)


def test_products_of_every_form_have_the_same_count() -> None:
    a, b, c = torch.randn(8, 4), torch.randn(4, 6), torch.zeros(8, 6)
    with track_allocations() as tracked:
        a @ b
        torch.addmm(c, a, b)
        c.addmm_(a, b)
        torch.mm(a, b, out=c)
        torch.bmm(a[None], b[None])
        torch.mv(a, b[:, 0])
    assert tracked.matmul_flops == 2 * 8 * 4 * 6 * 5 + 2 * 8 * 4


def test_numbers_and_gradients_are_unchanged_and_hooks_come_off() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block()), torch.randn(32, 16)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with track_allocations(model):
        model(x).sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_hooks_come_off_when_the_body_raises() -> None:
    model = Block()
    with pytest.raises(RuntimeError), track_allocations(model):
        model(torch.randn(3, 5))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_tracker_keeps_nothing_alive() -> None:
    with track_allocations(Block()) as tracked:
        x = kib(1)
        y = torch.ones(KIB // 4, requires_grad=True).exp()
        del x, y
        gc.collect()
        assert tracked.live_bytes == 0


def test_reset_peak_and_exclude() -> None:
    with track_allocations() as tracked:
        kib(9)
        slab = kib(4)
        tracked.exclude(slab)
        assert tracked.live_bytes == 0
        tracked.reset_peak()
        kib(2)
    assert tracked.peak_bytes == 2 * KIB
    assert slab.numel() == 4 * KIB


def test_other_devices_are_apart() -> None:
    with track_allocations() as tracked:
        there = torch.zeros(KIB, dtype=torch.uint8, device="meta")
        here = kib(2)
    assert tracked.peak_bytes == here.numel()
    assert tracked.other_devices["meta"].live == there.numel()


def test_table_names_kinds_modules_and_the_peak() -> None:
    model = nn.Sequential(Block())
    with track_allocations(model, unit_bytes=2048) as tracked:
        model(torch.randn(32, 16)).sum().backward()
    table = tracked.table()
    assert all(
        word in table for word in (*KINDS, "0.up", "0.down", "peak in", "matrix products", "u")
    )
    with track_allocations() as plain:
        kib(1)
    assert "MiB" in plain.table()
    with pytest.raises(ValueError, match="unit_bytes"):
        plain.units(1)


def _fsdp_rank() -> list[int]:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    x = torch.randn(32, 16)
    with track_allocations(model) as tracked:
        model(x).sum().backward()
    return [
        tracked.by_kind["parameters"].peak,
        tracked.by_kind["gradients"].live,
        tracked.resident_bytes,
    ]


def test_gathered_parameters_and_sharded_gradients_under_fsdp2() -> None:
    whole = 2 * 16 * 64 * 4
    for gathered, gradients, resident in run_ranks(_fsdp_rank, 2):
        assert resident == 2 * whole // 2
        assert gradients == 2 * whole // 2
        assert whole <= gathered <= 2 * whole
