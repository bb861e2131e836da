"""Kernels that compute one block of attention and return its log-sum-exp."""
