"""A tracker of allocations: what is live, what was the peak, and which module allocated it."""
