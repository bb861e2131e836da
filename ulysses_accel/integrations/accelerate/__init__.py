"""A stock `accelerate.Accelerator` on sharded sequences."""
