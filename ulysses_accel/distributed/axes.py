"""The mesh's axes: names and order are accelerate's. Imports nothing, as the configuration must."""

from __future__ import annotations

AXES = ("dp_replicate", "dp_shard", "cp", "sp", "tp")
