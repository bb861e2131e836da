"""Activation checkpointing of layers, with offload to host memory."""
