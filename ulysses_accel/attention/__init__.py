"""Attention strategies over a sharded sequence, and their installation into transformers models."""

from ulysses_accel.attention.checks import check_model, transformers_model
from ulysses_accel.attention.registry import InstalledAttention, describe_forward, install
from ulysses_accel.attention.ulysses import head_to_seq, seq_to_head, ulysses_attention

__all__ = [
    "InstalledAttention",
    "check_model",
    "describe_forward",
    "head_to_seq",
    "install",
    "seq_to_head",
    "transformers_model",
    "ulysses_attention",
]
