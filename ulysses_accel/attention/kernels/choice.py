"""Which block kernel computes a call: the first that supports it, or the one requested by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from ulysses_accel.attention.kernels.base import BlockKernel, BoundedKernel, CPUKernel
from ulysses_accel.attention.kernels.chunked import ChunkedKernel
from ulysses_accel.attention.kernels.cuda import (
    AtenCudnn,
    AtenEfficient,
    AtenFlash,
    FlashAttn2,
    FlashAttn3,
)
from ulysses_accel.errors import ConfigError, UnsupportedModelError, closest

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Kind:
    """What a kernel supports.

    Args:
        make: returns the kernel for a soft cap and a dropout probability.
        device: device type; None for any.
        dtypes: of query, key and value.
        capability: least compute capability of a GPU.
        max_head_size: largest size of a head.
        has_softcap: whether it computes soft caps.
        has_dropout: whether it computes dropout.
        has_alibi: whether it computes ALiBi's biases.
        package: module that it needs; None for torch alone.
        by_name_only: whether it is used only when requested.
    """

    make: Callable[[float | None, float], BlockKernel]
    device: str | None = "cuda"
    dtypes: tuple[torch.dtype, ...] = _HALF
    capability: tuple[int, int] = (8, 0)
    max_head_size: int = 256
    has_softcap: bool = False
    has_dropout: bool = False
    has_alibi: bool = False
    package: str | None = None
    by_name_only: bool = False

    def misfit(
        self, query: Tensor, softcap: float | None, dropout: float, alibi: bool
    ) -> str | None:
        """Returns why the kernel does not support a call; None when it does."""
        device = query.device
        if self.device not in (None, device.type):
            return f"runs on {self.device}, not on {device.type}"
        if query.dtype not in self.dtypes:
            return f"does not take {query.dtype}"
        if query.shape[3] > self.max_head_size:
            return f"takes head sizes to {self.max_head_size}, not {query.shape[3]}"
        if (softcap is not None and not self.has_softcap) or (dropout and not self.has_dropout):
            return f"does not compute softcap={softcap}, dropout={dropout}"
        if alibi and not self.has_alibi:
            return "does not compute alibi_slopes"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < self.capability:
            return f"needs a GPU of compute capability {self.capability[0]}.{self.capability[1]}"
        if self.package is not None and not is_installed(self.package):
            return f"needs the package {self.package.partition('.')[0]}, which is not installed"
        return None


_ALL = (*_HALF, torch.float32, torch.float64)
_ANY_SIZE = 2**31
# In the order of preference. Kernels that this project has not measured are used only by name.
_KINDS = {
    "cpu_flash": _Kind(lambda softcap, dropout: CPUKernel(), "cpu", _ALL, max_head_size=_ANY_SIZE),
    "aten_flash": _Kind(lambda softcap, dropout: AtenFlash()),
    "flash_attn_2": _Kind(
        lambda softcap, dropout: FlashAttn2(softcap),
        has_softcap=True,
        package="flash_attn.flash_attn_interface",
    ),
    "aten_efficient": _Kind(
        lambda softcap, dropout: AtenEfficient(),
        dtypes=(*_HALF, torch.float32),
        capability=(5, 0),
        max_head_size=_ANY_SIZE,
    ),
    "aten_cudnn": _Kind(lambda softcap, dropout: AtenCudnn(), by_name_only=True),
    "flash_attn_3": _Kind(
        lambda softcap, dropout: FlashAttn3(softcap),
        capability=(9, 0),
        has_softcap=True,
        package="flash_attn_interface",
        by_name_only=True,
    ),
    "chunked": _Kind(
        ChunkedKernel,
        None,
        _ALL,
        (0, 0),
        max_head_size=_ANY_SIZE,
        has_softcap=True,
        has_dropout=True,
        has_alibi=True,
    ),
}


def is_installed(package: str) -> bool:
    """Returns whether a package, or a module in it, can be imported."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def kernel_for(
    query: Tensor,
    softcap: float | None = None,
    dropout: float = 0.0,
    name: str | None = None,
    alibi: bool = False,
) -> BlockKernel:
    """Returns the block kernel of a call.

    Args:
        query: `[B, H, q, D]`, whose device, dtype and head size it must take.
        softcap: bound of the scores through tanh; None for no bound.
        dropout: probability of dropping an attention weight.
        name: of the kernel; the first that supports the call when None.
        alibi: whether the scores get biases by distance.

    Raises:
        ConfigError: there is no kernel of that name.
        UnsupportedModelError: it does not support the call.
    """
    if name is not None and name not in _KINDS:
        raise ConfigError(f"block_kernel={name!r} is not known.{closest(name, _KINDS)}")
    names = [name] if name is not None else []
    if name is None:
        names = [key for key, kind in _KINDS.items() if not kind.by_name_only]
    for candidate in names:
        kind = _KINDS[candidate]
        reason = kind.misfit(query, softcap, dropout, alibi)
        if reason is None:
            return BoundedKernel(kind.make(softcap, dropout))
    raise UnsupportedModelError(
        f"block_kernel={names[-1]!r} {reason}. Leave block_kernel out to have one chosen."
    )
