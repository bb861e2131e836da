"""Activation checkpoints of layers, with offload to the host."""
