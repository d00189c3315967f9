"""TODO room loop."""
