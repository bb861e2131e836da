"""The attention of transformers' models: registration, calls and masks."""
