"""TODO room functions."""
