"""A strategy with rounds of its own, checkpoints and client state."""
