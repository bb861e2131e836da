"""Attention strategies over a sharded sequence, and their installation into transformers models."""

from ulysses_accel.attention.checks import check_model
from ulysses_accel.attention.findings import Finding
from ulysses_accel.attention.registry import InstalledAttention, active_description, describe_forward, install
from ulysses_accel.attention.ring import ring_attention
from ulysses_accel.attention.ring_exchange import Exchange
from ulysses_accel.attention.structure import transformers_model
from ulysses_accel.attention.ulysses import head_to_seq, seq_to_head
from ulysses_accel.attention.usp import SequenceAttention, ulysses_attention, usp_attention

__all__ = [
    "Exchange",
    "Finding",
    "InstalledAttention",
    "SequenceAttention",
    "active_description",
    "check_model",
    "describe_forward",
    "head_to_seq",
    "install",
    "ring_attention",
    "seq_to_head",
    "transformers_model",
    "ulysses_attention",
    "usp_attention",
]
