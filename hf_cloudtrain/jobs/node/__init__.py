"""TODO room node."""
