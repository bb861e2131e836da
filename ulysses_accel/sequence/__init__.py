"""A sequence that several ranks share: its layout, its description, its labels and its loss."""
