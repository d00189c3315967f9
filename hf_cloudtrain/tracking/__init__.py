"""TODO room tracking."""
