"""TODO room checkpoints."""
