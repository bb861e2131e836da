"""Process groups and what they do: the mesh, collectives, agreement between ranks."""
