"""XTuner's sequence parallel functions on this package's attention: its document's five, and those
around them.

A script written for XTuner changes its imports and nothing else; both generations of signatures are
accepted. What the document's loop computes is exact: the loss of the full sequence, and gradients
whose mean over all ranks is that of this loss. Source: https://github.com/InternLM/xtuner, its
document on sequence parallelism.
"""

from __future__ import annotations

from ulysses_accel.compat.xtuner.data import (
    SequenceParallelSampler,
    pad_cumulative_len_for_sequence_parallel,
    pad_for_sequence_parallel,
    split_for_sequence_parallel,
)
from ulysses_accel.compat.xtuner.dispatch import dispatch_modules
from ulysses_accel.compat.xtuner.groups import (
    get_data_parallel_group,
    get_data_parallel_rank,
    get_data_parallel_world_size,
    get_inner_sequence_parallel_group,
    get_inner_sequence_parallel_rank,
    get_inner_sequence_parallel_world_size,
    get_sequence_parallel_group,
    get_sequence_parallel_rank,
    get_sequence_parallel_world_size,
    init_dist,
    init_inner_sequence_parallel,
    init_sequence_parallel,
    is_inner_sequence_parallel_initialized,
)
from ulysses_accel.compat.xtuner.ops import (
    all_to_all,
    gather_for_sequence_parallel,
    gather_forward_split_backward,
    post_process_for_sequence_parallel_attn,
    pre_process_for_sequence_parallel_attn,
    reduce_sequence_parallel_loss,
    sequence_parallel_wrapper,
    split_forward_gather_backward,
)

__all__ = [
    "SequenceParallelSampler",
    "all_to_all",
    "dispatch_modules",
    "gather_for_sequence_parallel",
    "gather_forward_split_backward",
    "get_data_parallel_group",
    "get_data_parallel_rank",
    "get_data_parallel_world_size",
    "get_inner_sequence_parallel_group",
    "get_inner_sequence_parallel_rank",
    "get_inner_sequence_parallel_world_size",
    "get_sequence_parallel_group",
    "get_sequence_parallel_rank",
    "get_sequence_parallel_world_size",
    "init_dist",
    "init_inner_sequence_parallel",
    "init_sequence_parallel",
    "is_inner_sequence_parallel_initialized",
    "pad_cumulative_len_for_sequence_parallel",
    "pad_for_sequence_parallel",
    "post_process_for_sequence_parallel_attn",
    "pre_process_for_sequence_parallel_attn",
    "reduce_sequence_parallel_loss",
    "sequence_parallel_wrapper",
    "split_for_sequence_parallel",
    "split_forward_gather_backward",
]
