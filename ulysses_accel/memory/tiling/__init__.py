"""MLPs and norms computed in tiles of tokens."""
