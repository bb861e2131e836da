"""`sp_size="auto"`: chooses the ring and Ulysses degrees from the heads of the model and the ranks
of the job.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ulysses_accel.config.settings import AUTO, MAX_SIZE, Setting, Source, show
from ulysses_accel.config.sources import Layer
from ulysses_accel.config.split_cost import Split, SplitRequest, candidates, choose_split, refusal
from ulysses_accel.errors import ConfigError, MeshError

_LOGGER = logging.getLogger(__name__)
_UNSET_KINDS = ("default", "launcher")
# Used where only head counts are known: it scales the bytes of every split alike.
_ANY_HEAD_DIM = 128


@dataclass(frozen=True)
class Cluster:
    """The ranks of a job and their bandwidths, of which only the ratio matters for a choice.

    Args:
        num_ranks: processes of the whole job; None where that is not known yet.
        ranks_per_node: processes on one node; all of them where None.
        bandwidth_inside: GB/s at which a rank sends to ranks of its node; by default the NVLink of
            an H100.
        bandwidth_between: GB/s at which a rank sends to other nodes; the default is a 400 Gb/s card
            for each rank.
    """

    num_ranks: int | None
    ranks_per_node: int | None = None
    bandwidth_inside: float = 450.0
    bandwidth_between: float = 50.0

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Cluster:
        """Returns the cluster of the launcher's `WORLD_SIZE` and `LOCAL_WORLD_SIZE`; one process
        where they are not set.

        Raises:
            ConfigError: a variable is not a positive integer.
        """
        environ = os.environ if environ is None else environ
        return cls(_count(environ, "WORLD_SIZE") or 1, _count(environ, "LOCAL_WORLD_SIZE"))


def _count(environ: Mapping[str, str], variable: str) -> int | None:
    text = environ.get(variable, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and 0 < int(text[:20]) <= MAX_SIZE):
        raise ConfigError(
            f"{variable}={show(text)} (from env {variable}) is not a number of "
            "processes. Let a launcher set it."
        )
    return int(text)


@dataclass(frozen=True)
class Heads:
    """The heads of a model's attention.

    Args:
        num_heads: query heads H.
        num_key_value_heads: key/value heads K.
        head_dim: size of a head.
        source: where they were read.
    """

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    source: str


def heads_of(model: Any) -> Heads:
    """Returns the heads of a model.

    Args:
        model: a transformers model, its config, or the name of either on the hub or on disk.

    Raises:
        ConfigError: it has no number of attention heads.
    """
    source = f"model={show(model)}" if isinstance(model, str) else f"model={type(model).__name__}"
    if isinstance(model, str):
        from transformers import AutoConfig

        model = AutoConfig.from_pretrained(model)
    config = getattr(model, "config", model)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    queries = getattr(config, "num_attention_heads", None)
    if not isinstance(queries, int) or queries < 1:
        raise ConfigError(
            f"{source} has no num_attention_heads, so sp_size='auto' can't be chosen. Pass a "
            "transformers model or config, or set sp_auto_heads, such as '32/8'."
        )
    keys = getattr(config, "num_key_value_heads", None) or queries
    size = getattr(config, "head_dim", None) or max(
        1, int(getattr(config, "hidden_size", 0)) // queries
    )
    return Heads(queries, keys, size, source)


def is_auto(settings: Layer) -> bool:
    """Returns whether a degree is to be chosen."""
    return AUTO in (settings["sp_size"].value, settings["cp_size"].value)


def choose_degrees(settings: Layer, model: Any, cluster: Cluster) -> dict[str, Setting]:
    """Chooses the degrees that are `auto`, and with `sp_size="auto"` a ring degree that was left
    out.

    Args:
        settings: every field's setting.
        model: as for `heads_of`; None reads `sp_auto_heads`.
        cluster: the ranks of the job.

    Returns:
        Settings of `sp_size` and `cp_size` with numbers, and the reason in their source.

    Raises:
        ConfigError: the heads or the number of processes are not known, or no choice is legal.
    """
    requested = next(
        settings[name] for name in ("sp_size", "cp_size") if settings[name].value == AUTO
    )
    request = _request(
        settings,
        _known_heads(settings, model, requested),
        _ranks_left(settings, cluster, requested),
        cluster,
    )
    split = _choose(settings, request)
    heads = f"{request.num_heads}/{request.num_key_value_heads} heads"
    reason = f"auto from {requested.source}, {request.num_ranks} ranks and {heads}: {split.reason}"
    if os.environ.get("RANK", "0") == "0":
        _LOGGER.info("sp_size=%d, cp_size=%d: %s", split.sp_size, split.cp_size, reason)
    chosen = {"sp_size": split.sp_size, "cp_size": split.cp_size}
    return {
        name: Setting(size, Source("derived", reason))
        for name, size in chosen.items()
        if _is_open(settings, name)
    }


def _is_open(settings: Layer, name: str) -> bool:
    """Returns whether a degree is to be chosen: it is `auto`, or was left out."""
    return settings[name].value == AUTO or settings[name].source.kind in _UNSET_KINDS


def _known_heads(settings: Layer, model: Any, requested: Setting) -> Heads:
    if model is not None:
        return heads_of(model)
    written = settings["sp_auto_heads"]
    if written.value is None:
        raise ConfigError(
            f"sp_size={AUTO} (from {requested.source}) needs the model's heads, which are not "
            "known. Pass model=... (a model, its config or its name) to ParallelismConfig, or set "
            "sp_auto_heads, such as '32/8' for 32 query and 8 key/value heads."
        )
    queries, keys = str(written.value).split("/")
    return Heads(int(queries), int(keys), _ANY_HEAD_DIM, str(written.source))


def _ranks_left(settings: Layer, cluster: Cluster, requested: Setting) -> int:
    """Returns how many ranks the other axes leave for a sequence."""
    if cluster.num_ranks is None:
        raise ConfigError(
            f"sp_size={AUTO} (from {requested.source}) needs the number of processes, which is not "
            "known. Pass --num_processes."
        )
    ranks = cluster.num_ranks
    for name in ("dp_replicate_size", "dp_shard_size", "tp_size"):
        size = int(settings[name].value or 1)
        if ranks % size:
            raise MeshError(
                f"{name}={size} (from {settings[name].source}) does not divide the {ranks} "
                f"processes that are left of {cluster.num_ranks}, so none can be chosen for a "
                f"sequence. Use sizes whose product divides {cluster.num_ranks}."
            )
        ranks //= size
    return ranks


def _request(settings: Layer, heads: Heads, num_ranks: int, cluster: Cluster) -> SplitRequest:
    tensor_ranks = int(settings["tp_size"].value or 1)
    if heads.num_heads % tensor_ranks or heads.num_key_value_heads % tensor_ranks:
        raise ConfigError(
            f"tp_size={tensor_ranks} (from {settings['tp_size'].source}) does not divide "
            f"{heads.num_heads} query and {heads.num_key_value_heads} key/value heads "
            f"({heads.source}). Use a tp_size that does."
        )
    length = (
        settings["sp_seq_length"].value
        if settings["sp_seq_length_is_variable"].value is False
        else None
    )
    return SplitRequest(
        num_ranks=num_ranks,
        num_heads=heads.num_heads // tensor_ranks,
        num_key_value_heads=heads.num_key_value_heads // tensor_ranks,
        head_dim=heads.head_dim,
        sequence_length=None if length is None else int(length),
        ranks_per_node=cluster.ranks_per_node or cluster.num_ranks or 1,
        bandwidth_inside=cluster.bandwidth_inside,
        bandwidth_between=cluster.bandwidth_between,
        is_causal=settings["cp_layout"].value == "zigzag",
    )


def _choose(settings: Layer, request: SplitRequest) -> Split:
    """Returns the best split, or the only one where one degree has a number."""
    fixed = next((name for name in ("cp_size", "sp_size") if not _is_open(settings, name)), None)
    if fixed is None:
        return choose_split(request)
    size, ranks = int(settings[fixed].value or 1), request.num_ranks
    written = f"{fixed}={size} (from {settings[fixed].source})"
    if ranks % size:
        raise MeshError(
            f"{written} does not divide the {ranks} ranks of a sequence. Use a divisor of {ranks}."
        )
    cp_size, sp_size = (size, ranks // size) if fixed == "cp_size" else (ranks // size, size)
    why = refusal(request, cp_size, sp_size)
    if why is not None:
        raise ConfigError(
            f"{written} leaves cp_size={cp_size}, sp_size={sp_size}: {why}. Let both be '{AUTO}'."
        )
    split = next(split for split in candidates(request) if split.cp_size == cp_size)
    return replace(split, reason=f"the ranks that {fixed}={size} leaves")
