"""Gathers predictions for metrics: over data parallel ranks alone, since ranks that share a
sequence have the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from accelerate.utils import recursively_apply
from torch import Tensor
from torch.distributed import ProcessGroup

from ulysses_accel.distributed.collectives import all_gather
from ulysses_accel.distributed.mesh import SequenceGroups, joint_axis
from ulysses_accel.errors import ConfigError
from ulysses_accel.installation import replaced


def gather_for_metrics(
    accelerator: Any, stock: Callable[..., Any], groups: SequenceGroups, value: Any
) -> Any:
    """Returns what accelerate gathers, and truncates at the end of a loader, with each sample once.

    Args:
        accelerator: whose method is called.
        stock: accelerate's `gather_for_metrics`.
        groups: this rank's place in the mesh.
        value: tensors of the same shapes on all ranks, in nested tuples, lists and dicts.

    Raises:
        ConfigError: there is something other than tensors.
    """
    try:
        recursively_apply(lambda tensor: tensor, value, error_on_other_type=True)
    except TypeError as error:
        raise ConfigError(
            f"gather_for_metrics got something other than tensors ({error}), which would be sent "
            "as pickles, once for each rank that shares a sequence. Gather tensors; "
            "accelerate.utils.gather_object takes objects."
        ) from None
    with replaced(accelerator, gather=partial(gather_data_parallel, groups)):
        return stock(value)


def gather_data_parallel(groups: SequenceGroups, value: Any) -> Any:
    """Returns tensors' rows of one rank of each sequence group.

    Args:
        groups: this rank's place in the mesh.
        value: tensors of the same shapes on all ranks, in nested tuples, lists and dicts.
    """
    group = joint_axis(groups.mesh, "dp").get_group() if groups.data_parallel_size > 1 else None
    return recursively_apply(partial(_gathered, group=group), value, error_on_other_type=True)


def _gathered(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    rows = tensor.detach().reshape(1) if tensor.ndim == 0 else tensor.detach()
    return rows if group is None else all_gather(rows.contiguous(), group)
