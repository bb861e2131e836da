"""Expert parallelism: each rank holds a part of every layer's experts, and tokens travel to the
experts they chose.

Which parameters are experts' is transformers' own expert plan (`base_model_ep_plan`). They become
DTensors over the ranks of one expert group, so that clipping and checkpoints of the engines know of
their parts. In a sharded forward each rank has tokens of its own: they are sorted by expert and
exchanged by an uneven all-to-all, and their results come back by another. Every token reaches every
expert that it chose.

Gradients. An owner of experts gets the tokens of all ranks of its group, so its gradient is a sum
where the engine's is a mean over ranks: it is summed over the owners of the same experts and
divided by all ranks, here, as the engine is told to leave these parameters alone.

Shapes: T = a rank's tokens, K = experts of a token, E = experts, P = ranks of the expert group, R =
rows that arrive.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ulysses_accel import _private_api
from ulysses_accel.distributed.collectives import all_to_all
from ulysses_accel.errors import ConfigError, UnsupportedModelError
from ulysses_accel.introspection.structure import transformers_model

_STYLE = "grouped_gemm"
_ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")


def expert_parameters(model: nn.Module) -> dict[str, list[str]]:
    """Returns the names of the parameters that transformers' expert plan deals to ranks, by their
    modules' names.

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
    found: dict[str, list[str]] = {}
    for name, _ in inner.named_parameters():
        if any(re.fullmatch(pattern, name) for pattern in patterns):
            owner, _, own = f"{prefix}.{name}".lstrip(".").rpartition(".")
            found.setdefault(owner, []).append(own)
    if not found:
        raise UnsupportedModelError(
            f"{type(inner).__name__} has no experts that transformers' expert plan "
            "(base_model_ep_plan) deals to "
            f"ranks. Use ep_size=1."
        )
    return found


@dataclass(frozen=True)
class ExpertDispatch:
    """Stands in for the forward of a module of experts, of which this rank has its part.

    Args:
        module: the experts.
        names: of its parameters that are dealt.
        group: the P ranks that share its experts.
        num_local: experts on each of them.
    """

    module: Any
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
        with self._local_parameters():
            computed: Tensor = type(self.module).forward(
                self.module, rows, experts, torch.ones_like(experts, dtype=rows.dtype)
            )
        return computed

    @contextmanager
    def _local_parameters(self) -> Iterator[None]:
        """Lets the experts' own code see this rank's part as plain tensors."""
        parameters = _private_api.module_parameters(self.module)
        dealt = {name: parameters[name] for name in self.names}
        parameters.update({name: parameter.to_local() for name, parameter in dealt.items()})
        try:
            yield
        finally:
            parameters.update(dealt)


@dataclass
class DealtExperts:
    """One model's experts, dealt over the ranks of `mesh`, and the way to undo it.

    Args:
        model: that holds them.
        mesh: of `ep_replicate` and `ep`.
        names: of the dealt parameters, by their modules' names.
        handles: the hooks on gradients and states.
        moved: by the id of a parameter that the engine took, this and the DTensor in its place.
    """

    model: nn.Module
    mesh: DeviceMesh
    names: dict[str, list[str]]
    handles: list[Any] = field(default_factory=list)
    moved: dict[int, tuple[nn.Parameter, nn.Parameter]] = field(default_factory=dict)

    @property
    def modules(self) -> dict[str, Any]:
        """The modules of experts by their names."""
        return {name: self.model.get_submodule(name) for name in self.names}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The dealt parameters by their names in the model."""
        return {
            f"{name}.{part}": module.get_parameter(part)
            for name, module in self.modules.items()
            for part in self.names[name]
        }

    def distribute(self) -> None:
        """Makes DTensors of the dealt parameters, behind engines that would refuse them."""
        for name, module in self.modules.items():
            for part in self.names[name]:
                old = module.get_parameter(part)
                new = nn.Parameter(self.as_part(old.detach()), requires_grad=old.requires_grad)
                if old.requires_grad:
                    self.handles.append(new.register_hook(_MeanOverRanks(self.mesh)))
                module.register_parameter(part, new)
                self.moved[id(old)] = (old, new)

    def update(self, optimizer: Any) -> None:
        """Points an optimizer that was made before at the dealt parameters.

        Raises:
            ConfigError: it has moments of whole experts already.
        """
        if any(optimizer.state.get(old) for old, _ in self.moved.values()):
            raise ConfigError(
                f"the optimizer ({type(optimizer).__name__}) has made steps with experts that are "
                "dealt to ranks now. "
                f"Prepare it before its first step, and load its state with accelerator.load_state."
            )
        for group in optimizer.param_groups:
            group["params"] = [self.moved.get(id(old), (old, old))[1] for old in group["params"]]

    def as_part(self, local: Tensor) -> DTensor:
        """Returns this rank's part `[E / P, ...]` as a tensor of all experts."""
        return DTensor.from_local(local, self.mesh["ep"], [Shard(0)], run_check=False)

    def part_of(self, whole: Tensor) -> Tensor:
        """Returns this rank's part `[E / P, ...]` of a tensor of all experts."""
        axis = self.mesh["ep"]
        return whole.chunk(axis.size())[axis.get_local_rank()].clone()

    def uninstall(self) -> None:
        """Gives every rank all experts again; every rank must call it."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        for name, module in self.modules.items():
            for part in self.names[name]:
                dealt = module.get_parameter(part)
                whole = nn.Parameter(whole_tensor(dealt), requires_grad=dealt.requires_grad)
                module.register_parameter(part, whole)
            del module.forward
            module.num_experts *= self.mesh["ep"].size()
        self.moved.clear()


def deal_experts(model: nn.Module, mesh: DeviceMesh) -> DealtExperts:
    """Leaves each rank its part of a model's experts, and makes tokens travel to them.

    Args:
        model: a transformers model, or a module that holds one.
        mesh: of `build_expert_mesh`.

    Returns:
        The installation, to be distributed once the engine has the model; its `uninstall()`
        restores the model.

    Raises:
        UnsupportedModelError: it has no experts that can be dealt.
        ConfigError: their number can't be split over the ranks.
    """
    axis = mesh["ep"]
    dealt = DealtExperts(model, mesh, check_experts(model, axis.size()))
    for parameter in dealt.parameters.values():
        parameter.data = dealt.part_of(parameter.data)
    for name, module in dealt.modules.items():
        module.num_experts //= axis.size()
        module.forward = ExpertDispatch(
            module, tuple(dealt.names[name]), axis.get_group(), module.num_experts
        )
    return dealt


def check_experts(model: nn.Module, ep_size: int) -> dict[str, list[str]]:
    """Returns `expert_parameters`, of a model that can be dealt; nothing is changed.

    Args:
        model: a transformers model, or a module that holds one.
        ep_size: ranks that share the experts of each layer.

    Raises:
        UnsupportedModelError: it has no experts that can be dealt.
        ConfigError: their number can't be split over the ranks.
    """
    names = expert_parameters(model)
    for name, own in names.items():
        _check(name, model.get_submodule(name), own, ep_size)
    return names


def _check(name: str, module: Any, own: list[str], size: int) -> None:
    """Refuses experts that can't be dealt, before anything is changed."""
    numbers = {module.get_parameter(part).shape[0] for part in own}
    if (
        numbers != {getattr(module, "num_experts", None)}
        or "forward" in vars(module)
        or not _takes_rows(module)
    ):
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) is not a module of transformers' stacked experts "
            "that is called with "
            f"{', '.join(_ARGUMENTS)}, or its forward was replaced, as tiled_mlp=True does. Use "
            "ep_size=1, or experts "
            f"as they are."
        )
    (num_experts,) = numbers
    if num_experts % size:
        legal = [number for number in range(1, num_experts + 1) if num_experts % number == 0]
        raise ConfigError(
            f"ep_size={size} does not divide the {num_experts} experts of {name}. Use one of "
            f"{legal}."
        )
    if not all(module.get_parameter(part).is_floating_point() for part in own):
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) has quantized experts. Use ep_size=1."
        )


def _takes_rows(module: Any) -> bool:
    return (
        tuple(inspect.signature(inspect.unwrap(type(module).forward)).parameters)[1:] == _ARGUMENTS
    )


@dataclass(frozen=True)
class _MeanOverRanks:
    """A hook on the gradient of dealt experts: what the engine's mean over ranks is to other
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


def whole_tensor(tensor: Tensor) -> Tensor:
    """Returns all experts of a tensor that is dealt, any other as it is; every rank of the group
    must call it.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    whole: Tensor = tensor.full_tensor()
    return whole.detach()
