"""Training in less memory: tiled MLPs, norms and losses, activation checkpoints, and a tracker of
allocations. Each works alone, on any transformers model.
"""

from ulysses_accel.memory.tiled_loss.cross_entropy import tiled_cross_entropy
from ulysses_accel.memory.tiled_loss.log_probs import token_log_probs
from ulysses_accel.memory.tiled_loss.model import TiledLoss, tile_loss
from ulysses_accel.memory.tiling.method import InstalledTiles
from ulysses_accel.memory.tiling.mlp import find_tileable, tile_mlp, tile_mlps
from ulysses_accel.memory.tiling.norm import tile_norm, tile_norms
from ulysses_accel.memory.tracker.tracker import AllocationTracker, track_allocations

__all__ = [
    "AllocationTracker",
    "InstalledTiles",
    "TiledLoss",
    "find_tileable",
    "tile_loss",
    "tile_mlp",
    "tile_mlps",
    "tile_norm",
    "tile_norms",
    "tiled_cross_entropy",
    "token_log_probs",
    "track_allocations",
]
