"""`sequence_parallelism_mode`: one word for how a sequence is shared, as ColossalAI's plugin has it."""

from __future__ import annotations

from ulysses_accel.config_fields import Setting, Source
from ulysses_accel.errors import ConfigError
from ulysses_accel.resolve import Layer

_ONE = "Leave sequence_parallelism_mode out to use several kinds together"


def settle_mode(settings: Layer) -> dict[str, Setting]:
    """Returns the sizes that a mode decides, and refuses sizes that contradict it.

    `split_gather` shards the sequence over the `tp` axis between the linear layers, which every `tp_size` above 1 does,
    so the word only asks for it; sp_size and cp_size keep what they were given. `all_to_all` is Ulysses over `sp_size`,
    without a ring. `ring_attn` is a ring: its degree is cp_size, or sp_size where cp_size is 1. So ColossalAI's
    `HybridParallelPlugin(tp_size=4, sp_size=1, sequence_parallelism_mode="split_gather")` and
    `(tp_size=2, sp_size=2, sequence_parallelism_mode="all_to_all")` or `"ring_attn"` have the same arguments here; the
    latter two shard over `tp` as well.

    Args:
        settings: every field's setting.

    Returns:
        Settings that replace those of the same name; none where no mode is set.

    Raises:
        ConfigError: the sizes are not those of the mode.
    """
    mode = settings["sequence_parallelism_mode"]
    if mode.value is None:
        return {}
    sizes = {name: settings[name] for name in ("tp_size", "cp_size", "sp_size")}
    shown = ", ".join(f"{name}={setting}" for name, setting in sizes.items())
    here = f"sequence_parallelism_mode={mode.value!r} (from {mode.source})"
    if mode.value == "split_gather":
        if sizes["tp_size"].value == 1:
            raise ConfigError(f"{here} shards the sequence over tensor parallel ranks, but {shown}. Set tp_size.")
        return {}
    ring, ulysses = sizes["cp_size"], sizes["sp_size"]
    if mode.value == "all_to_all":
        if ulysses.value == 1 or ring.value not in (1, "auto"):
            raise ConfigError(f"{here} is Ulysses over sp_size ranks alone, but {shown}. Set sp_size only. {_ONE}.")
        return {"cp_size": _decided(1, mode)}
    if ring.value != 1 and ulysses.value != 1:
        raise ConfigError(f"{here} has one degree, but {shown}. Set sp_size or cp_size. {_ONE}.")
    if ring.value == 1 and ulysses.value == 1:
        raise ConfigError(f"{here} needs the ring's degree, but {shown}. Set sp_size, or cp_size.")
    if ring.value != 1:
        return {"sp_size": _decided(1, mode)}
    taken = Source(
        "derived", f"sp_size={ulysses.value} from {ulysses.source}, as sequence_parallelism_mode='ring_attn'"
    )
    return {"cp_size": Setting(ulysses.value, taken), "sp_size": _decided(1, mode)}


def _decided(size: int, mode: Setting) -> Setting:
    return Setting(size, Source("derived", f"sequence_parallelism_mode={mode.value!r} from {mode.source}"))
