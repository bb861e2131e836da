"""TRL's trainers on sharded sequences."""
