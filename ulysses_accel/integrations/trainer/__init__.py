"""A stock `transformers.Trainer` on sharded sequences."""
