"""Ring attention of this package and of others."""
