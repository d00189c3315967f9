"""TODO room resume."""
