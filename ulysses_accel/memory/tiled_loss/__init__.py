"""The language model head and its loss, computed in tiles of tokens."""
