"""Attention strategies over a sharded sequence, and their installation into transformers models."""

from ulysses_accel.attention.huggingface.registry import (
    InstalledAttention,
    active_description,
    describe_forward,
    install,
)
from ulysses_accel.attention.ring.attention import ring_attention
from ulysses_accel.attention.ring.exchange import Exchange
from ulysses_accel.attention.strategy import SequenceAttention, ulysses_attention, usp_attention
from ulysses_accel.attention.ulysses.exchange import head_to_seq, seq_to_head

__all__ = [
    "Exchange",
    "InstalledAttention",
    "SequenceAttention",
    "active_description",
    "describe_forward",
    "head_to_seq",
    "install",
    "ring_attention",
    "seq_to_head",
    "ulysses_attention",
    "usp_attention",
]
