"""Ring attention: keys and values travel between ranks, queries stay."""
