"""The forward of a model on a shard of each sequence."""
