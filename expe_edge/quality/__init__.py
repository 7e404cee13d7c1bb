"""Quality by length, of packages and checkpoints."""
