"""How the tensor parallel axis shards one module's weights and tokens: torch's parallel styles, and
some more.

Shapes: B = rows, S = tokens of the sequence, P = ranks that share it, T = tensor parallel ranks, D
= hidden size. Between the linear layers a rank holds `[B, S/(P*T), D]`; inside of attention and MLP
it holds all S/P tokens and 1/T of the features.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

_TOKENS = Shard(1)


class StyleMaker(Protocol):
    """Makes the style of a linear layer from the sizes of the parts that its output is made of."""

    def __call__(self, parts: Sequence[int]) -> ParallelStyle:
        """Returns the style."""


def column(parts: Sequence[int] = ()) -> ParallelStyle:
    """Output features over the ranks: `[B, S/P, D] -> [B, S/P, F/T]`."""
    return ColwiseParallel()


def row(parts: Sequence[int] = ()) -> ParallelStyle:
    """Input features over the ranks, the sum sharded along the sequence:
    `[B, S/P, F/T] -> [B, S/(P*T), D]`.
    """
    return RowwiseParallel(output_layouts=_TOKENS)


def fused(parts: Sequence[int]) -> ParallelStyle:
    """Several matrices in one: `[B, S/P, D] -> [B, S/P, sum(parts)/T]`, one part after another."""
    return FusedColumns(parts)


def norm() -> ParallelStyle:
    """A norm of this rank's tokens: `[B, S/(P*T), D] -> [B, S/(P*T), D]`."""
    return SequenceParallel(use_local_output=True)


def head_norm() -> ParallelStyle:
    """A norm of each of this rank's heads: `[B, S/P, H/T, d] -> [B, S/P, H/T, d]`, in any order of
    the middle dims.
    """
    return SequenceParallel(sequence_dim=2, use_local_output=True)


def embedding() -> ParallelStyle:
    """The vocabulary over the ranks: `[B, S/P] -> [B, S/(P*T), D]`."""
    return RowwiseParallel(input_layouts=Replicate(), output_layouts=_TOKENS)


def vocabulary() -> ParallelStyle:
    """Logits of 1/T of the vocabulary, gathered: `[B, S/P, D] -> [B, S/P, V]`."""
    return ColwiseParallel(output_layouts=Replicate())


class Replicated(ParallelStyle):
    """A module that every rank computes alike, on all of its tokens."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        # The function's return type is annotated as None, but what it returns becomes the module's
        # input.
        take: Any = _replicated_input
        return distribute_module(module, device_mesh, None, take, _local_output)


def _replicated_input(
    _module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh
) -> tuple[Any, ...]:
    return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False), *inputs[1:]


def _local_output(_module: nn.Module, output: Any, _mesh: DeviceMesh) -> Any:
    return output.to_local()


class GatherTokens(ParallelStyle):
    """A module whose first argument is this rank's tokens, and which needs those of all ranks.

    The gathered tensor stays a DTensor, so that the linear layers' gradients are added up before
    they are reduce-scattered: one exchange each way.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(partial(_gather_argument, device_mesh), with_kwargs=True)
        return module


def _gather_argument(
    mesh: DeviceMesh, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    tokens = args[0] if args else kwargs["hidden_states"]
    # [B, S/(P*T), D] -> [B, S/P, D]
    sharded = DTensor.from_local(tokens, mesh, [_TOKENS], run_check=False)
    full = sharded.redistribute(placements=[Replicate()])
    return ((full, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": full})


class GatherOutput(ParallelStyle):
    """The last norm: what comes after it sees all tokens."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = SequenceParallel()._apply(module, device_mesh)
        module.register_forward_hook(_gather_output)
        return module


def _gather_output(_module: nn.Module, _args: Any, output: DTensor) -> Tensor:
    # [B, S/(P*T), D] -> [B, S/P, D]
    return output.redistribute(placements=[Replicate()]).to_local()


class FusedColumns(ParallelStyle):
    """A linear layer whose output is several parts, each of which is sharded over the ranks.

    Its rows are sharded in their own order, as those of any other matrix, and are gathered for the
    product: checkpoints stay what they were, for the exchange of one matrix in a layer.

    Args:
        parts: output features of each part, all divisible by the number of ranks.
    """

    def __init__(self, parts: Sequence[int]) -> None:
        super().__init__()
        self.parts = tuple(parts)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = distribute_module(module, device_mesh, _shard_rows)
        rows = _local_rows(self.parts, device_mesh)
        # Weak: the module holds this function.
        module.forward = partial(_fused_forward, weakref.ref(module), rows)
        return module


def _shard_rows(_name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        shard = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(shard, requires_grad=parameter.requires_grad))


def _local_rows(parts: Sequence[int], mesh: DeviceMesh) -> list[slice]:
    """Returns where this rank's features of each part are among all."""
    rows, start, rank, size = [], 0, mesh.get_local_rank(), mesh.size()
    for part in parts:
        local = part // size
        rows.append(slice(start + rank * local, start + (rank + 1) * local))
        start += part
    return rows


def _fused_forward(linear: weakref.ref[Any], rows: list[slice], hidden: DTensor) -> Tensor:
    module: Any = linear()
    partial_sum: list[Placement] = [Partial()]

    def local_part(parameter: Tensor) -> Tensor:
        # [F/T, D] -> [F, D]
        full: DTensor = parameter.redistribute(placements=[Replicate()])  # type: ignore[attr-defined]
        tensor = full.to_local(grad_placements=partial_sum)
        return torch.cat([tensor[part] for part in rows])

    bias = None if module.bias is None else local_part(module.bias)
    weight = local_part(module.weight)
    # [B, S/P, D] -> [B, S/P, F/T]
    return F.linear(hidden.to_local(grad_placements=partial_sum), weight, bias)
