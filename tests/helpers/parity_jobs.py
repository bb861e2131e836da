"""What both sides of a parity test run: one process over the global batch, and an accelerator's
ranks over shards.

Tolerances. float64: 1e-12 of a parameter's gradient norm. The sums are the same in another order,
over at most a few hundred terms; that costs some 1e-15, and a missing or doubled term at least
1e-4. A gradient whose norm is below `FLOOR` of the whole gradient's (a key bias that softmax
cancels exactly) is measured against that floor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed  # noqa: F401  imported before the fork, so that ranks start warm
import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor

import ulysses_accel
from tests.helpers.batches import Sample

EXACT = 1e-12
FLOOR = 1e-4
Grads = dict[str, Tensor]


@dataclass(frozen=True)
class Engine:
    """How an accelerator is built.

    Args:
        name: `ddp`, `fsdp2` or `deepspeed`.
        stage: of ZeRO.
        reduce_scatter: of ZeRO.
        offload: keep parameters and optimizer on the host, as far as the engine can.
        clipping: DeepSpeed's own gradient clipping, which accelerate leaves to it.
    """

    name: str = "ddp"
    stage: int = 0
    reduce_scatter: bool = True
    offload: bool = False
    clipping: float = 0.0

    def accelerator(
        self, sp_size: int, dp_size: int = 1, steps: int = 1, cp_size: int = 1, **kwargs: Any
    ) -> Accelerator:
        """Returns an accelerator that shares nothing with an earlier one of this process."""
        AcceleratorState._reset_state(True)
        for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
            os.environ.pop(name, None)
        axis = "dp_shard_size" if self.name == "fsdp2" else "dp_replicate_size"
        kwargs["parallelism_config"] = ulysses_accel.ParallelismConfig(
            sp_size=sp_size, cp_size=cp_size, **{axis: dp_size}
        )
        if self.name == "deepspeed":
            plugin = DeepSpeedPlugin(hf_ds_config=self._deepspeed_config(steps))
            return Accelerator(deepspeed_plugin=plugin, **kwargs)
        if self.name == "fsdp2":
            fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                cpu_ram_efficient_loading=False,
                auto_wrap_policy="transformer_based_wrap",
                cpu_offload=CPUOffloadPolicy(pin_memory=False) if self.offload else None,
            )
            kwargs["fsdp_plugin"] = ulysses_accel.use_fsdp_plugin(
                kwargs["parallelism_config"], fsdp_plugin
            )
        return Accelerator(cpu=True, gradient_accumulation_steps=steps, **kwargs)

    def _deepspeed_config(self, steps: int) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.stage, "reduce_scatter": self.reduce_scatter}
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
            if self.stage == 3:
                zero["offload_param"] = {"device": "cpu"}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": steps,
            "gradient_clipping": self.clipping,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }


def full_gradients(model: nn.Module) -> Grads:
    """Returns whole gradients by the plain model's names; every rank must call it."""
    grads = {}
    for name, parameter in model.named_parameters():
        grad = (
            safe_get_full_grad(parameter) if hasattr(model, "zero_optimization") else parameter.grad
        )
        assert grad is not None, name
        grads[name.removeprefix("module.")] = (
            grad.full_tensor() if isinstance(grad, DTensor) else grad
        ).clone()
    return grads


def full_parameters(model: nn.Module) -> Grads:
    """Returns whole parameters by the plain model's names; every rank must call it."""
    whole = {}
    for name, parameter in model.named_parameters():
        value = safe_get_full_fp32_param(parameter) if hasattr(model, "zero_optimization") else None
        value = parameter.detach() if value is None else value
        whole[name.removeprefix("module.")] = (
            value.full_tensor() if isinstance(value, DTensor) else value
        ).clone()
    return whole


def zero_gradients(model: nn.Module) -> None:
    """Sets all gradients to None."""
    for parameter in model.parameters():
        parameter.grad = None


def plain_loss(model: nn.Module, sample: Sample, num_items: int | Tensor | None = None) -> Tensor:
    """Returns one process's loss of a batch that has a counted label."""
    loss: Tensor = model(**sample.plain, num_items_in_batch=num_items).loss
    return loss


def lonely_loss(model: nn.Module, sample: Sample) -> Tensor:
    """Returns the same from every document alone in a batch: no mask and no packing, only its
    tokens and positions.
    """
    ids, labels = sample.plain["input_ids"], sample.plain["labels"]
    positions = sample.plain.get("position_ids", torch.arange(ids.shape[1]).expand_as(ids))
    total = torch.zeros((), dtype=torch.float64)
    for row, segments in enumerate(sample.documents):
        for start, stop in segments:
            part = {"input_ids": ids, "labels": labels, "position_ids": positions}
            alone = {name: tensor[row : row + 1, start:stop] for name, tensor in part.items()}
            total = (
                total + model(**alone, use_cache=False, num_items_in_batch=sample.num_tokens).loss
            )
    return total


def plain_step(
    model: nn.Module, samples: Sequence[Sample], loss_of: Callable[..., Tensor] = plain_loss
) -> tuple[list[float], Grads]:
    """Returns each sample's loss, 0 where no label counts, and the gradients of their mean."""
    zero_gradients(model)
    losses = []
    for sample in samples:
        loss = loss_of(model, sample) if sample.num_tokens else torch.zeros(())
        if sample.num_tokens:
            (loss / len(samples)).backward()
        losses.append(float(loss.detach()))
    grads = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }
    return losses, grads


@dataclass(frozen=True)
class Difference:
    """How far a step is from one process's: relative errors, and the gradient's projection on the
    right one, less 1.
    """

    loss: float
    grad: float
    ratio: float
    worst: str

    def within(self, tolerance: float) -> bool:
        """True when all of it is."""
        return self.loss <= tolerance and self.grad <= tolerance and abs(self.ratio) <= tolerance


def compare(loss: float, grads: Grads, expected_loss: float, expected: Grads) -> Difference:
    """Measures one step; zeros must be met exactly."""
    assert grads.keys() == expected.keys()
    total = float(sum(grad.double().square().sum() for grad in expected.values())) ** 0.5
    floor = FLOOR * total if total else torch.finfo(torch.float64).tiny
    errors = {
        name: float((grads[name].double() - grad).norm()) / max(float(grad.norm()), floor)
        for name, grad in expected.items()
    }
    product = float(sum((grads[name].double() * grad).sum() for name, grad in expected.items()))
    worst = max(errors, key=lambda name: errors[name])
    return Difference(
        loss=abs(loss - expected_loss) / max(abs(expected_loss), 1e-300 if total else 1.0),
        grad=errors[worst] if all(error == error for error in errors.values()) else float("nan"),
        ratio=product / total**2 - 1 if total else 0.0,
        worst=worst,
    )


Report = dict[str, tuple[float, float, float, str]]


def report(difference: Difference) -> tuple[float, float, float, str]:
    """Returns a difference as ranks hand it back."""
    return difference.loss, difference.grad, difference.ratio, difference.worst


def assert_parity(
    reports: Sequence[Report], tolerance: float = EXACT, count: int | None = None
) -> None:
    """Checks every case of every rank."""
    assert reports
    for rank, cases in enumerate(reports):
        assert cases
        assert count is None or len(cases) == count
        failed = {
            name: case for name, case in cases.items() if not Difference(*case).within(tolerance)
        }
        assert not failed, (rank, failed)


def data_rank(accelerator: Accelerator) -> int:
    """Returns which of the samples drawn at once is this rank's."""
    attached = getattr(accelerator, "sequence_parallel", None)
    return int(attached.groups.data_parallel_rank) if attached else accelerator.process_index


@contextmanager
def counted_linear_tokens(model: nn.Module) -> Iterator[list[int]]:
    """Collects the tokens that enter each linear layer."""
    tokens: list[int] = []

    def count(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        tokens.append(args[0].shape[:-1].numel())

    handles = [
        module.register_forward_pre_hook(count)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield tokens
    finally:
        for handle in handles:
            handle.remove()
