"""Every architecture of transformers against one process."""
