"""A whole training step beside other implementations."""
