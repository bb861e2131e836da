"""What saves memory: tiled blocks and loss, checkpoints, and a training step with them."""
