"""The output layer of a language model and its loss, computed in tiles of tokens."""
