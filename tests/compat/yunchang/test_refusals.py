"""YunChang's interface: its groups are made once, what is not computed is refused, and signatures
are its own.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.compat.yunchang.test_yunchang import RING_TYPES, TOLERANCE, worst_error
from tests.helpers.ranks import run_ranks
from ulysses_accel.compat import yunchang
from ulysses_accel.compat.yunchang import (
    EXTRACT_FUNC_DICT,
    PROCESS_GROUP,
    RING_IMPL_DICT,
    RING_IMPL_QKVPACKED_DICT,
    AttnType,
    LongContextAttention,
    LongContextAttentionQKVPacked,
    UlyssesAttention,
    set_seq_parallel_pg,
)
from ulysses_accel.errors import ConfigError, MeshError, ShapeError, UnsupportedModelError


def test_groups_are_made_once_for_equal_arguments(tmp_path: Path) -> None:
    def body() -> None:
        rank, pg_map = dist.get_rank(), dist.distributed_c10d._world.pg_map
        set_seq_parallel_pg(2, 2, rank, 4)
        first, made = (PROCESS_GROUP.ULYSSES_PG, PROCESS_GROUP.RING_PG), len(pg_map)
        assert [dist.get_process_group_ranks(group) for group in first] == [
            [rank // 2 * 2, rank // 2 * 2 + 1],
            [rank % 2, rank % 2 + 2],
        ]
        module = LongContextAttention()
        set_seq_parallel_pg(2, 2, rank, 4, use_ulysses_low=False)
        assert dist.get_process_group_ranks(PROCESS_GROUP.RING_PG) == [
            rank // 2 * 2,
            rank // 2 * 2 + 1,
        ]
        more = len(pg_map)
        assert more > made
        for low in (True, False) * 3:
            set_seq_parallel_pg(2, 2, rank, 4, low)
        set_seq_parallel_pg(2, 2, rank, 4)
        assert len(pg_map) == more
        assert (
            (PROCESS_GROUP.ULYSSES_PG, PROCESS_GROUP.RING_PG)
            == first
            == (module.ulysses_pg, module.ring_pg)
        )
        # Groups of an ended torch.distributed are not used again.
        dist.destroy_process_group()
        dist.init_process_group(
            "gloo", rank=rank, world_size=4, store=dist.FileStore(str(tmp_path / "store"), 4)
        )
        set_seq_parallel_pg(2, 2, rank, 4)
        assert PROCESS_GROUP.RING_PG is not first[1]
        assert worst_error(LongContextAttention(), "basic", (2, 2), (4, 4)) <= TOLERANCE

    run_ranks(body, 4)


def test_what_is_not_computed_is_refused_by_name() -> None:
    def body() -> None:
        rank = dist.get_rank()
        with pytest.raises(MeshError, match="Call set_seq_parallel_pg"):
            LongContextAttention()
        with pytest.raises(MeshError, match="rank=5, world_size=2 were passed"):
            set_seq_parallel_pg(1, 2, 5, 2)
        with pytest.raises(MeshError, match="a ring of 3 × 1 Ulysses ranks does not divide 2"):
            set_seq_parallel_pg(1, 3, rank, 2)
        set_seq_parallel_pg(1, 2, rank, 2)
        q = torch.randn(1, 8, 4, 4)
        with pytest.raises(ConfigError, match="rd=1, but set_seq_parallel_pg created groups of 2"):
            EXTRACT_FUNC_DICT["zigzag"](q, rank, 2, rd=1, ud=2)
        call = LongContextAttention(ring_impl_type="zigzag")
        for name, given in _REFUSED.items():
            with pytest.raises(UnsupportedModelError, match=name):
                call(q, q, q, **{name: given})
        for causal, window in (
            (False, (3, -1)),
            (False, (0, 1)),
            (False, (-1, 2)),
            (True, (-2, 0)),
            (False, (2, -2)),
        ):
            with pytest.raises(
                UnsupportedModelError,
                match=rf"window_size=\({window[0]}, {window[1]}\) with causal=",
            ):
                call(q, q, q, causal=causal, window_size=window)
        with pytest.raises(ShapeError, match=r"\[B, s, 3, H, D\]"):
            LongContextAttentionQKVPacked()(q)
        with pytest.raises(
            ConfigError, match=r"ring_impl_type='zigzg' is not known\. Did you mean 'zigzag'"
        ):
            LongContextAttention(ring_impl_type="zigzg")
        with pytest.raises(ConfigError, match="scatter_idx=1, gather_idx=2"):
            UlyssesAttention(scatter_idx=1, gather_idx=2)
        with pytest.raises(UnsupportedModelError, match=r"attn_type=AttnType\.SAGE_FP8"):
            LongContextAttention(attn_type=AttnType.SAGE_FP8)
        with pytest.raises(UnsupportedModelError, match="attn_processor=Identity"):
            LongContextAttention(attn_processor=torch.nn.Identity())
        for module in (UlyssesAttention(), call):
            assert not torch.equal(module(q, q, q, dropout_p=0.5), module(q, q, q))

    run_ranks(body, 2)
    with pytest.raises(ConfigError, match="attn_type='fa9' is not known"):
        AttnType.from_string("fa9")
    assert AttnType.from_string("torch_flash") is AttnType.TORCH_FLASH


_REFUSED = {
    "alibi_slopes": torch.ones(4),
    "return_attn_probs": True,
}


def test_signatures_are_yunchangs() -> None:
    call = [
        *("dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes"),
        *("deterministic", "return_attn_probs"),
    ]
    dims = ["scatter_idx", "gather_idx"]
    expected = {
        set_seq_parallel_pg: [
            "sp_ulysses_degree",
            "sp_ring_degree",
            "rank",
            "world_size",
            "use_ulysses_low",
        ],
        LongContextAttention: [
            *dims,
            "ring_impl_type",
            "use_pack_qkv",
            "use_sync",
            "attn_type",
            "attn_processor",
        ],
        LongContextAttention.forward: ["self", "query", "key", "value", *call],
        LongContextAttentionQKVPacked: [*dims, "ring_impl_type", "use_sync", "attn_type"],
        LongContextAttentionQKVPacked.forward: ["self", "qkv", *call],
        UlyssesAttention: ["sequence_process_group", *dims, "use_sync", "attn_type"],
        UlyssesAttention.forward: ["self", "query", "key", "value", *call],
        RING_IMPL_DICT["zigzag"]: [
            "q",
            "k",
            "v",
            *call,
            "group",
            "attn_type",
            "attn_processor",
            "layout",
        ],
    }
    assert {
        function: list(inspect.signature(function).parameters) for function in expected
    } == expected
    assert set(EXTRACT_FUNC_DICT) == set(RING_IMPL_DICT) == {*RING_TYPES, "basic_pytorch"}
    assert set(RING_IMPL_QKVPACKED_DICT) == set(RING_TYPES)
    assert all(hasattr(yunchang, name) for name in yunchang.__all__)
