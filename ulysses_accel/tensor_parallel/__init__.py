"""Tensor parallelism with the sequence sharded between the linear layers."""
