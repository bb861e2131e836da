"""Whether a model lets tokens see each other outside of attention, from running it."""

from ulysses_accel.introspection.probe.run import Probe, probe

__all__ = ["Probe", "probe"]
