"""What a rank sends for one attention layer, by heads and ranks, and which split of the ranks is
chosen for it.

    python -m benchmarks.split

Arithmetic, not a measurement: `benchmarks.exchange` counts the same bytes where they are sent.
u = one head of one rank's shard.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks import report
from ulysses_accel.config.split_cost import SplitRequest, choose_split, ring_units, ulysses_units

HEADS = ((32, 32), (32, 8), (64, 8), (32, 4), (32, 2), (32, 1))
RANKS = (2, 4, 8, 16, 32)
RANKS_PER_NODE = 8
# GB/s that one rank sends: NVLink of an H100 one way, and a 400 Gb/s network card.
INSIDE, BETWEEN = 450.0, 50.0
HEADINGS = (
    "heads q/kv",
    "ranks",
    "Ulysses fwd (u)",
    "ring fwd (u)",
    "zigzag fwd (u)",
    "1 + H / K",
    "least fwd",
    "Ulysses step (u)",
    "zigzag step (u)",
    "chosen, one node",
    f"chosen, nodes of {RANKS_PER_NODE}",
)


def row_of(heads: int, kv_heads: int, ranks: int) -> dict[str, Any]:
    """Bytes and choices for one model and number of ranks; a training step in bfloat16."""
    request = SplitRequest(
        num_ranks=ranks,
        num_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        sequence_length=2**20,
        ranks_per_node=ranks,
        bandwidth_inside=INSIDE,
        bandwidth_between=BETWEEN,
    )
    forward = {
        "Ulysses": ulysses_units(heads, kv_heads, ranks, is_training=False),
        "ring": ring_units(replace(request, is_causal=False, is_training=False), ranks),
        "zigzag ring": ring_units(replace(request, is_training=False), ranks),
    }
    step = {
        "Ulysses": ulysses_units(heads, kv_heads, ranks),
        "zigzag ring": ring_units(request, ranks),
    }
    apart = choose_split(replace(request, ranks_per_node=min(RANKS_PER_NODE, ranks)))
    together = choose_split(request)
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "ranks": ranks,
        "forward": forward,
        "step": step,
        "one_node": [together.cp_size, together.sp_size],
        "several_nodes": [apart.cp_size, apart.sp_size],
    }


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table, in the order of `HEADINGS`."""
    forward, step = row["forward"], row["step"]
    least = min(forward.values())
    return [
        f"{row['heads']}/{row['kv_heads']}",
        str(row["ranks"]),
        *(f"{units:.1f}" for units in forward.values()),
        f"{1 + row['heads'] / row['kv_heads']:g}",
        " = ".join(name for name, units in forward.items() if units == least),
        *(f"{units:.1f}" for units in step.values()),
        *("cp={} sp={}".format(*row[key]) for key in ("one_node", "several_nodes")),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, write it to `results/` and to the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    rows = [
        row_of(heads, kv_heads, ranks)
        for heads, kv_heads in HEADS
        for ranks in RANKS
        if ranks <= heads
    ]
    section = report.Section(HEADINGS, [cells(row) for row in rows], rows)
    print(report.table(section.headings, section.lines))
    if not options.no_write:
        report.publish_sections("split", {"split": section}, measured=False)


if __name__ == "__main__":
    main()
