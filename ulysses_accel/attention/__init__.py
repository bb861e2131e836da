"""Attention strategies over a sharded sequence, and their installation into transformers models."""

from ulysses_accel.attention.ulysses import ulysses_attention

__all__ = ["ulysses_attention"]
