"""Ulysses attention: an all-to-all exchange of sequence shards for heads."""
