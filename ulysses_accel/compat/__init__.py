"""Other projects' interfaces on this package's functions."""
