"""Process groups, differentiable collectives, and agreement between ranks."""
