"""`ParallelismConfig`, `MemoryConfig`, and where each of their values comes from."""
