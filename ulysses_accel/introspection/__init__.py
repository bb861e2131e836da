"""What a model is, read from its code and its configuration."""
