"""The exchanges of attention layers: bytes, memory and time beside other implementations."""
