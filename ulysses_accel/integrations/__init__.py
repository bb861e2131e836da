"""The libraries that drive training: accelerate, transformers' Trainer, TRL."""
