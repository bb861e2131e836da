"""The settings: fields, their sources, and the `ParallelismConfig` that they make."""
