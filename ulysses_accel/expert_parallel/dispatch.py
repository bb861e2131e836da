"""Expert parallelism: each rank holds a part of every layer's experts, and tokens travel to the
experts they chose.

Which parameters belong to experts is transformers' own expert plan (`base_model_ep_plan`). They
become DTensors over the ranks of one expert group, so that the engines' clipping and checkpoints
know of the shards. In a sharded forward each rank has different tokens: they are sorted by expert
and exchanged by an uneven all-to-all, and their results come back by another. Every token reaches
every expert that it chose.

Gradients. A rank computes its experts for the tokens of all ranks of its group, so its gradient is
a sum where the engine's is a mean over ranks: it is summed over the ranks with the same experts and
divided by the number of all ranks, here, as the engine is told to ignore these parameters.

Shapes: T = a rank's tokens, K = experts of a token, E = experts, P = ranks of the expert group, R =
rows that arrive.
"""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils.weak import WeakTensorKeyDictionary

from ulysses_accel import _private_api
from ulysses_accel.distributed.collectives import all_to_all
from ulysses_accel.errors import ConfigError, UnsupportedModelError
from ulysses_accel.installation import Installation
from ulysses_accel.introspection.structure import transformers_model

_STYLE = "grouped_gemm"
_ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")


def expert_parameters(model: nn.Module) -> dict[str, list[str]]:
    """Returns the names of the parameters that transformers' expert plan distributes over ranks, by
    their modules' names.

    Args:
        model: a transformers model, or a module that holds one.

    Raises:
        UnsupportedModelError: it has no plan, or no module with such parameters.
    """
    inner = transformers_model(model)
    plan = getattr(inner, "ep_plan", None) or {}
    patterns = [
        re.escape(key).replace(r"\*", r"[^.]+") for key, style in plan.items() if style == _STYLE
    ]
    prefix = next(name for name, module in model.named_modules() if module is inner)
    names: dict[str, list[str]] = {}
    for name, _ in inner.named_parameters():
        if any(re.fullmatch(pattern, name) for pattern in patterns):
            module, _, part = f"{prefix}.{name}".lstrip(".").rpartition(".")
            names.setdefault(module, []).append(part)
    if not names:
        raise UnsupportedModelError(
            f"{type(inner).__name__} has no experts that transformers' expert plan "
            "(base_model_ep_plan) distributes over ranks. Use ep_size=1."
        )
    return names


@dataclass(frozen=True)
class ExpertDispatch:
    """Overrides the forward of a module of experts, of which this rank has a part.

    Args:
        module: the experts; weak, as the module holds this.
        names: of its distributed parameters.
        group: the P ranks that share its experts.
        num_local: experts on each of them.
    """

    module: weakref.ref[Any]
    names: tuple[str, ...]
    group: ProcessGroup
    num_local: int

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Computes `[T, D]` tokens by the experts `[T, K]` that they chose, weighted by `[T,
        K]`.
        """
        num_chosen = top_k_index.shape[-1]
        chosen = top_k_index.reshape(-1)
        order = chosen.argsort(stable=True)
        send, receive, arriving = self._counts(chosen)
        # [T, D] -> [T*K, D] -> [R, D]
        rows = all_to_all(hidden_states[order // num_chosen], self.group, send, receive)
        experts = torch.arange(self.num_local, device=rows.device).repeat(self.group.size())
        experts = experts.repeat_interleave(arriving.reshape(-1), output_size=sum(receive))
        # [R, D] -> [T*K, D]
        results = all_to_all(self._compute(rows, experts[:, None]), self.group, receive, send)
        results = results[order.argsort()].view(*top_k_index.shape, -1)
        return (results * top_k_weights[..., None]).sum(1).to(hidden_states.dtype)

    def _counts(self, chosen: Tensor) -> tuple[list[int], list[int], Tensor]:
        """Returns the rows for each rank, from each rank, and those for each of this rank's
        experts, `[P, E / P]`.
        """
        size = self.group.size()
        leaving = torch.zeros(size * self.num_local, dtype=torch.long, device=chosen.device)
        leaving = leaving.scatter_add(0, chosen, torch.ones_like(chosen)).view(size, self.num_local)
        arriving = torch.empty_like(leaving)
        dist.all_to_all_single(arriving, leaving, group=self.group)
        send, receive = torch.stack([leaving.sum(1), arriving.sum(1)]).tolist()
        return send, receive, arriving

    def _compute(self, rows: Tensor, experts: Tensor) -> Tensor:
        """Computes `[R, D]` rows by one expert each; the weights belong to the tokens, on the ranks
        that have them.
        """
        if rows.shape[0]:
            return self._forward(rows, experts)
        # One row of zeros keeps the graph of a rank without tokens: its backward must take part in
        # the exchanges.
        return self._forward(rows.sum(0, keepdim=True), experts.new_zeros(1, 1))[:0]

    def _forward(self, rows: Tensor, experts: Tensor) -> Tensor:
        module: Any = self.module()
        weights = torch.ones_like(experts, dtype=rows.dtype)
        with self._local_parameters(module):
            computed: Tensor = type(module).forward(module, rows, experts, weights)
        return computed

    @contextmanager
    def _local_parameters(self, module: Any) -> Iterator[None]:
        """Lets transformers' code of the experts see this rank's part as plain tensors."""
        parameters = _private_api.module_parameters(module)
        distributed = {name: parameters[name] for name in self.names}
        parameters.update({name: tensor.to_local() for name, tensor in distributed.items()})
        try:
            yield
        finally:
            parameters.update(distributed)


class DistributedExperts:
    """One model's experts, distributed over the ranks of a mesh; `close` undoes it.

    Args:
        model: that holds them; held weakly, as its hooks refer to this.
        mesh: of `build_expert_mesh`.
        names: of the distributed parameters, by their modules' names.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh, names: dict[str, list[str]]) -> None:
        self.mesh, self.names = mesh, names
        self.installation = Installation()
        self._model = weakref.ref(model)
        # From each parameter that the engine took to the DTensor in its place. Weak: an entry is of
        # use as long as an optimizer has the earlier parameter.
        self._successors: Any = WeakTensorKeyDictionary()

    @property
    def model(self) -> nn.Module:
        """The model."""
        model = self._model()
        assert model is not None, "only called while somebody uses the model"
        return model

    @property
    def modules(self) -> dict[str, Any]:
        """The modules of experts by their names."""
        return {name: self.model.get_submodule(name) for name in self.names}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The distributed parameters by their names in the model."""
        parameters = {}
        for name, module in self.modules.items():
            for part in self.names[name]:
                parameters[f"{name}.{part}"] = module.get_parameter(part)
        return parameters

    def take_local_experts(self) -> None:
        """Leaves this rank its part of the experts, and has tokens travel to them."""
        axis = self.mesh["ep"]
        for parameter in self.parameters.values():
            parameter.data = self.local_part(parameter.data)
        for name, module in self.modules.items():
            num_local = module.num_experts // axis.size()
            dispatch = ExpertDispatch(
                weakref.ref(module), tuple(self.names[name]), axis.get_group(), num_local
            )
            self.installation.set(module, "num_experts", num_local)
            self.installation.set(module, "forward", dispatch)

    def make_distributed(self) -> None:
        """Makes DTensors of the parameters, after engines that would refuse them."""
        for name, module in self.modules.items():
            for part in self.names[name]:
                old = module.get_parameter(part)
                new = nn.Parameter(self.as_distributed(old.detach()), old.requires_grad)
                if old.requires_grad:
                    self.installation.hooks([new.register_hook(_MeanOverRanks(self.mesh))])
                module.register_parameter(part, new)
                self._successors[old] = new

    def update(self, optimizer: Any) -> None:
        """Gives an optimizer that was built with the earlier parameters the distributed ones.

        Raises:
            ConfigError: it has moments of all experts already.
        """
        if any(optimizer.state.get(old) for old in self._successors):
            raise ConfigError(
                f"the optimizer ({type(optimizer).__name__}) has made steps with experts that are "
                "distributed over ranks now. Prepare it before its first step, and load its state "
                "with accelerator.load_state."
            )
        for group in optimizer.param_groups:
            group["params"] = [self._successors.get(old, old) for old in group["params"]]

    def as_distributed(self, local: Tensor) -> DTensor:
        """Returns this rank's part `[E / P, ...]` as a DTensor of all experts."""
        return DTensor.from_local(local, self.mesh["ep"], [Shard(0)], run_check=False)

    def local_part(self, full: Tensor) -> Tensor:
        """Returns this rank's part `[E / P, ...]` of a tensor of all experts."""
        axis = self.mesh["ep"]
        return full.chunk(axis.size())[axis.get_local_rank()].clone()

    def close(self) -> None:
        """Gives every rank all experts again; every rank must call it."""
        self.installation.close()
        for name, module in self.modules.items():
            for part in self.names[name]:
                parameter = module.get_parameter(part)
                full = nn.Parameter(full_tensor(parameter), requires_grad=parameter.requires_grad)
                module.register_parameter(part, full)
        self._successors.clear()


def distribute_experts(model: nn.Module, mesh: DeviceMesh) -> DistributedExperts:
    """Leaves each rank its part of a model's experts, and makes tokens travel to them.

    Args:
        model: a transformers model, or a module that holds one.
        mesh: of `build_expert_mesh`.

    Returns:
        The experts, whose `make_distributed` is to be called once the engine has the model; its
        `close()` restores the model.

    Raises:
        UnsupportedModelError: it has no experts that can be distributed.
        ConfigError: their number can't be split over the ranks.
    """
    experts = DistributedExperts(model, mesh, check_experts(model, mesh["ep"].size()))
    experts.take_local_experts()
    return experts


def check_experts(model: nn.Module, ep_size: int) -> dict[str, list[str]]:
    """Returns `expert_parameters` of a model whose experts can be distributed; changes nothing.

    Args:
        model: a transformers model, or a module that holds one.
        ep_size: ranks that share the experts of each layer.

    Raises:
        UnsupportedModelError: it has no experts that can be distributed.
        ConfigError: their number can't be split over the ranks.
    """
    names = expert_parameters(model)
    for name, parts in names.items():
        _check(name, model.get_submodule(name), parts, ep_size)
    return names


def _check(name: str, module: Any, parts: list[str], size: int) -> None:
    """Refuses experts that can't be distributed, before anything is changed."""
    numbers = {module.get_parameter(part).shape[0] for part in parts}
    if (
        numbers != {getattr(module, "num_experts", None)}
        or "forward" in vars(module)
        or not _takes_rows(module)
    ):
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) is not a module of transformers' stacked experts "
            f"that is called with {', '.join(_ARGUMENTS)}, or its forward was replaced, as "
            "tiled_mlp=True does. Use ep_size=1, or experts as they are."
        )
    (num_experts,) = numbers
    if num_experts % size:
        legal = [number for number in range(1, num_experts + 1) if num_experts % number == 0]
        raise ConfigError(
            f"ep_size={size} does not divide the {num_experts} experts of {name}. Use one of "
            f"{legal}."
        )
    if not all(module.get_parameter(part).is_floating_point() for part in parts):
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) has quantized experts. Use ep_size=1."
        )


def _takes_rows(module: Any) -> bool:
    return (
        tuple(inspect.signature(inspect.unwrap(type(module).forward)).parameters)[1:] == _ARGUMENTS
    )


@dataclass(frozen=True)
class _MeanOverRanks:
    """A hook on the gradient of distributed experts: what the engine's mean over ranks is to other
    parameters.
    """

    mesh: DeviceMesh

    def __call__(self, grad: Tensor) -> Tensor:
        assert isinstance(grad, DTensor)
        replicas = self.mesh["ep_replicate"]
        local = grad.to_local() / self.mesh.size()
        if replicas.size() > 1:
            dist.all_reduce(local, group=replicas.get_group())
        return DTensor.from_local(local, grad.device_mesh, grad.placements, run_check=False)


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns all experts of a distributed tensor, any other as it is; every rank of the group must
    call it.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    full: Tensor = tensor.full_tensor()
    return full.detach()
