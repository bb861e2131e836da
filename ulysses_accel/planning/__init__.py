"""What fits and what is fastest, computed before anything is launched: plain arithmetic, without torch."""
