"""TODO room spec."""
