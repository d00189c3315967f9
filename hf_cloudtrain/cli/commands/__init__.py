"""TODO room commands."""
